"""The calls of a network as data: what is in them, by content, and several of them as one."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .foresight import Known
from .lane import version

Path = tuple[Any, ...]
Call = tuple[tuple[Any, ...], dict[str, Any]]  # args, kwargs
_PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.device, torch.Size)


class Opaque(Exception):
    """An argument that can't be compared by value."""


def leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """The tensors and plain values in the arguments of a call, each with where it is.

    Raises:
        Opaque: there is something else among them.
    """
    if isinstance(value, (Tensor, *_PLAIN)):
        yield path, value
    elif isinstance(value, (tuple, list)):
        yield path, len(value)
        for index, item in enumerate(value):
            yield from leaves(item, (*path, index))
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    else:
        raise Opaque(type(value).__name__)


def unknown_paths(calls: Sequence[Call]) -> frozenset[Path]:
    """Where any of ``calls`` has a tensor on ``meta``."""
    return frozenset(p for call in calls for p, leaf in leaves(call) if isinstance(leaf, Tensor) and leaf.is_meta)


class Keys:
    """Makes calls comparable by content; of tensors it has seen already, unchanged, it knows that."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[weakref.ref[Tensor], int, Any]] = {}

    def form(self, call: Call, unknown: frozenset[Path]) -> Any:
        """What calls must share to be carried out as one: everything but the content of tensors."""
        return tuple((p, *_form(leaf, p not in unknown)) for p, leaf in leaves(call))

    def of(self, call: Call, unknown: frozenset[Path]) -> Any:
        """The key of ``call``: everything in it, but of the tensors at ``unknown`` the form only.

        Raises:
            Opaque: it has an argument that can't be compared.
        """
        return tuple(
            (
                p,
                *_form(leaf, known := p not in unknown),
                self.digest(leaf) if known and isinstance(leaf, Tensor) else None,
            )
            for p, leaf in leaves(call)
        )

    def digest(self, tensor: Tensor) -> bytes:
        """A checksum of the values of ``tensor``."""
        seen = self._seen.get(id(tensor))
        if seen is not None and seen[0]() is tensor and seen[1] == version(tensor) >= 0:
            return seen[2]  # type: ignore[no-any-return]
        dense = tensor.detach().cpu().contiguous()
        raw = dense.as_strided((dense.numel(),), (1,)).view(torch.uint8)
        found = hashlib.blake2b(memoryview(raw.numpy()), digest_size=16).digest()
        self._seen[id(tensor)] = (weakref.ref(tensor), version(tensor), found)
        if len(self._seen) > 256:
            self._seen = {k: v for k, v in self._seen.items() if v[0]() is not None}
        return found


def _form(leaf: Any, known: bool) -> tuple[Any, ...]:
    if isinstance(leaf, Tensor):
        return "tensor" if known else "unknown", leaf.dtype, leaf.shape, leaf.stride() if known else None
    return type(leaf).__name__, leaf


def as_one(calls: Sequence[Call], unknown: frozenset[Path], keys: Keys, device: torch.device) -> Call:
    """``calls`` of one form as a single one, on ``device``: tensors that differ between them are :class:`Known`."""

    def merged(values: Sequence[Any], path: Path) -> Any:
        first = values[0]
        if isinstance(first, Tensor):
            if path in unknown:
                return torch.empty_strided(first.shape, first.stride(), dtype=first.dtype, device="meta")
            parts = [v.to(device) for v in values]
            same = all(v is first for v in values) or len({keys.digest(v) for v in values}) == 1
            return parts[0] if same else Known.of(parts)
        if isinstance(first, (tuple, list)) and not isinstance(first, torch.Size):
            items = [merged([v[i] for v in values], (*path, i)) for i in range(len(first))]
            return type(first)(*items) if hasattr(first, "_fields") else type(first)(items)
        if isinstance(first, dict):
            return type(first)({k: merged([v[k] for v in values], (*path, k)) for k in first})
        return first

    args, kwargs = merged([(c[0], c[1]) for c in calls], ())
    return args, kwargs
