"""Blocks that are alike are rehearsed once: what the first one needs, the others need too.

A deep network is a chain of blocks of one kind. Where a block is called with tensors of the same shapes as another one
of its kind was, its call is not carried out: it gives empty tensors and counts what the other one counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .arena import tensors_in
from .units import is_called

PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.device)
PLACES = ("layer_idx", "layer_index")  # attributes that say which of its kind a block is, and change no shape


class Unlike(Exception):
    """A call whose effects can't be told from shapes."""


class Counts(Protocol):
    """What is counted during a rehearsal, see :class:`.alive.Alive`."""

    now: int
    peak: int
    workspace: int
    flops: float
    moved: float
    touched: dict[str, int]

    def taken(self, nbytes: int) -> int: ...


@dataclass(frozen=True)
class Share:
    """What one call has counted, above the level that it found, and what it gave."""

    prefix: str
    peak: int
    workspace: int
    flops: float
    moved: float
    touched: Mapping[str, int]
    out: Any


@dataclass(frozen=True)
class Fresh:
    """A tensor that a call made: the number and bytes of its storage among those made, and its place in it."""

    storage: int
    nbytes: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device


def rehearse_once(network: nn.Module, counts: Counts) -> None:
    """Let blocks of ``network`` that have a twin rehearse once, until their attributes are put back."""
    blocks = [
        (f"{path}.{name}".lstrip("."), block)
        for path, module in network.named_modules()
        if isinstance(module, nn.ModuleList)
        for name, block in module.named_children()
        if is_called(block)
    ]
    kinds = {path: kind_of(block) for path, block in blocks}
    often = Counter(kinds.values())
    known: dict[Any, Share | None] = {}
    for path, block in blocks:
        if often[kinds[path]] > 1:
            block.__dict__["_compiled_call_impl"] = _Twin(block, path, kinds[path], known, counts)


def kind_of(block: nn.Module) -> Any:
    """What two blocks have in common if their calls do the same to the same shapes."""
    return tuple(
        (path, type(m), _settings(m), *(_shapes(s) for s in (m._parameters, m._buffers)))
        for path, m in block.named_modules()
    )


def _settings(module: nn.Module) -> tuple[Any, ...]:
    own = ((n, v) for n, v in module.__dict__.items() if n[0] != "_" and n not in PLACES)
    return tuple((n, repr(v) if isinstance(v, (*PLAIN, tuple, list)) else type(v)) for n, v in own)


def _shapes(store: Mapping[str, Tensor | None]) -> tuple[Any, ...]:
    return tuple((n, t.shape, t.stride(), t.dtype) for n, t in store.items() if t is not None)


class _Twin:
    """Stands in front of a block that has others of its kind."""

    def __init__(self, block: nn.Module, path: str, kind: Any, known: dict[Any, Share | None], counts: Counts) -> None:
        self.block, self.path, self.kind, self.known, self.counts = block, path, kind, known, counts

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        run: Any = self.block._call_impl
        try:
            key = (self.kind, _form([args, kwargs]))
        except Unlike:
            return run(*args, **kwargs)
        if self._watched() or (key in self.known and self.known[key] is None):
            return run(*args, **kwargs)
        share = self.known.get(key)
        return self._again(share) if share is not None else self._first(key, args, kwargs)

    def _watched(self) -> bool:
        """Whether somebody wants to see what happens inside."""
        return any(m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in self.block.modules())

    def _first(self, key: Any, args: Any, kwargs: Any) -> Any:
        """Carry the call out, and note what it counts."""
        c = self.counts
        before = c.now
        outer = c.peak, c.workspace, c.flops, c.moved, c.touched
        c.peak, c.workspace, c.flops, c.moved, c.touched = before, 0, 0.0, 0.0, {}
        try:
            out = self.block._call_impl(*args, **kwargs)  # type: ignore[misc]
        finally:
            counted = c.peak - before, c.workspace, c.flops, c.moved, c.touched
            c.peak, c.workspace, c.flops, c.moved, c.touched = outer
            self._add(Share(self.path, *counted, None), before)
        try:
            made, nbytes = _fresh(out, [args, kwargs], c.taken)
        except Unlike:
            nbytes = -1
        kept = nbytes == c.now - before  # else something stays behind in the block, or went
        self.known[key] = Share(self.path, *counted, made) if kept else None
        return out

    def _again(self, share: Share) -> Any:
        """What the call gives and counts, without carrying it out."""
        level, moved = self.counts.now, self.counts.moved
        out = _made(share.out, {})
        self.counts.moved = moved  # making room is no work
        self._add(share, level)
        return out

    def _add(self, share: Share, level: int) -> None:
        """Count a call that began at ``level``."""
        c = self.counts
        if level + share.peak + share.workspace > c.peak + c.workspace:
            c.peak, c.workspace = level + share.peak, share.workspace
        c.flops += share.flops
        c.moved += share.moved
        for name, nbytes in share.touched.items():
            own = self.path + name[len(share.prefix) :] if name.startswith(share.prefix + ".") else name
            c.touched[own] = max(c.touched.get(own, 0), nbytes)


def _form(value: Any) -> Any:
    """All that shapes depend on in the arguments of a call.

    Raises:
        Unlike: there are objects among them, which may have a state.
    """
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    if type(value) in (list, tuple):
        return tuple(map(_form, value))
    if type(value) is dict:
        return tuple((k, _form(v)) for k, v in value.items())
    if isinstance(value, PLAIN):
        return type(value), value
    raise Unlike


def _fresh(out: Any, given: Any, taken: Callable[[int], int]) -> tuple[Any, int]:
    """``out`` with a :class:`Fresh` for each tensor, and the bytes that their storages have ``taken``.

    Raises:
        Unlike: it is something else than tensors in tuples, or memory of what was given.
    """
    storages: dict[int, int] = {}
    old = {t.untyped_storage()._cdata for t in tensors_in(given)}
    nbytes = 0

    def describe(value: Any) -> Any:
        nonlocal nbytes
        if value is None:
            return None
        if type(value) in (list, tuple):
            return type(value)(map(describe, value))
        if not isinstance(value, Tensor) or value.untyped_storage()._cdata in old:
            raise Unlike
        storage = value.untyped_storage()
        if storage._cdata not in storages:
            storages[storage._cdata] = len(storages)
            nbytes += taken(storage.nbytes())
        place = tuple(value.shape), value.stride(), int(value.storage_offset())
        return Fresh(storages[storage._cdata], storage.nbytes(), *place, value.dtype, value.device)

    return describe(out), nbytes


def _made(value: Any, storages: dict[int, Tensor]) -> Any:
    """What :func:`_fresh` described, of new memory."""
    if isinstance(value, Fresh):
        if value.storage not in storages:
            count = value.nbytes // value.dtype.itemsize
            storages[value.storage] = torch.empty(count, dtype=value.dtype, device=value.device)
        return storages[value.storage].as_strided(value.shape, value.stride, value.offset)
    return type(value)(_made(v, storages) for v in value) if value is not None else None
