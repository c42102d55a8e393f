"""Bytes of weights: at rest, on the compute device, while they are decoded and patched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import nn

from . import allocator
from .engine import engine_of
from .hoisting import Hoistable
from .rehearsal import Rehearsed
from .transform import Transform
from .units import Group, Slot, outer

Forms = Mapping[tuple[int, str], tuple[torch.dtype, torch.dtype]]  # (module, name) -> dtype at rest, dtype of computing


@dataclass(frozen=True)
class Piece:
    """One unit: what travels when it is streamed, and what it takes when it stays."""

    name: str
    nbytes: int
    cost: int  # bytes on the compute device once it was fetched: on the CPU only what is read of the mapped file
    outer: bool = False  # modules of other units are called within its own call: it is there for all of them
    unused: int = 0  # bytes that it takes if it rests there for good, although the call never fetches it
    tensors: int = 7  # of which each keeps its place in a sector or starts a new one

    @property
    def room(self) -> int:
        """Bytes of the ring that it passes through."""
        return (-(-self.nbytes // 512) + self.tensors + 1) * 512


class Sizes:
    """What the weights of ``module`` take.

    Args:
        needs: what its calls have read of them, and in which dtypes.
        forms: of those that rest in a smaller dtype, or will.
    """

    def __init__(self, module: nn.Module, needs: Rehearsed, device: torch.device, forms: Forms) -> None:
        self.used = needs.touched if not needs.failure else None
        self.computed, self.forms = needs.computed, forms
        self.device, self.on_cpu = device, device.type == "cpu"
        engine = engine_of(module)
        self._transforms: Mapping[nn.Module, Transform] = engine.transforms if engine is not None else {}
        patches = engine.patches.values() if engine is not None else ()
        self.deltas = sum(patch.nbytes(device) for patch in patches)  # that stay beside the weights

    def of(self, slot: Slot) -> int:
        """Bytes at rest."""
        form = self.forms.get((id(slot.module), slot.name))
        return slot.tensor.numel() * form[0].itemsize if form is not None else slot.tensor.nbytes

    # -- decoding and patching -----------------------------------------------------------------------

    def decoded(self, group: Group) -> int:
        """Bytes for the weights of ``group`` that are not computed with as they rest, and for making the last of them."""
        found = [(s, self._made(s)) for s in group.slots]
        made = [(s, m) for s, m in found if m is not None]
        return sum(n * dtype.itemsize for _, (n, dtype) in made) + max((self._spare(s, *m) for s, m in made), default=0)

    def unpacking(self, group: Group) -> int:
        """Bytes that are moved to decode ``group`` once."""
        made = [(self.of(s), self._made(s)) for s in group.slots]
        return sum(size + 2 * m[0] * m[1].itemsize for size, m in made if m is not None)

    def _made(self, slot: Slot) -> tuple[int, torch.dtype] | None:
        """Number and dtype of the values that are computed with, if these are made of what rests for each call."""
        transform = self._transforms.get(slot.module)
        if transform is not None and slot.name in transform.codecs:
            codec, dtype = transform.codecs[slot.name]
            return prod(codec.shape), dtype
        rest = slot.tensor.dtype
        stored, compute = self.forms.get((id(slot.module), slot.name), (rest, self.computed.get(slot.path, rest)))
        patched = transform is not None and bool(transform.patches.get(slot.name))
        return (slot.tensor.numel(), compute) if stored != compute or patched else None

    def _spare(self, slot: Slot, count: int, dtype: torch.dtype) -> int:
        """Bytes that are needed for a moment to make a weight of ``count`` values, beside these."""
        transform = self._transforms.get(slot.module)
        if transform is None:
            return 0
        codec = transform.codecs.get(slot.name)
        unpacking = codec[0].spare(dtype, self.device) if codec is not None else 0
        patches = len(transform.patches.get(slot.name, ()))
        if not patches:
            return unpacking
        single = 4 * count  # deltas are added in float32
        before = count * dtype.itemsize * (patches > 1 or codec is not None or slot.name in transform.casts)
        return max(unpacking, before + single * (1 if dtype == torch.float32 else 2))

    # -- units ---------------------------------------------------------------------------------------

    def pieces(self, groups: Sequence[Group], left_out: Hoistable | None = None) -> tuple[Piece, ...]:
        """The units of ``groups``; a weight that several share is counted with the first."""
        gone = tuple(f"{path}." for path in left_out.modules) if left_out is not None else ()
        seen: set[int] = set()
        pieces = []
        for group, is_outer in zip(groups, outer(groups), strict=True):
            slots = [s for s in group.slots if not (gone and s.path.startswith(gone))]
            new = [s for s in slots if not (id(s.tensor) in seen or seen.add(id(s.tensor)))]  # type: ignore[func-returns-value]
            total = sum(map(self.of, new))
            if self.on_cpu:
                cost, unused = min(sum(self._in_memory(slots, new)), total), 0
            else:
                # for good each by itself, for a while as one piece, where others were before
                there = max(sum(allocator.fresh(self.of(s)) for s in new), allocator.used_again(total))
                called = any(self._reads(s) for s in slots)
                cost, unused = there * called, there * (not called)
            pieces.append(Piece(group.name, total, cost, is_outer, unused, len(new)))
        return tuple(pieces)

    def _reads(self, slot: Slot) -> int:
        size = self.of(slot)
        return min(self.used.get(slot.path, 0), size) if self.used is not None else size

    def _in_memory(self, slots: Sequence[Slot], new: Sequence[Slot]) -> Iterator[int]:
        """Bytes of weights that are in memory on the CPU: of views of a file what is read of them."""
        fresh = {id(s) for s in new}
        for slot in slots:
            stored, compute = self.forms.get((id(slot.module), slot.name), (None, None))
            if stored != compute:  # it was cast, and is a view of no file
                yield self.of(slot) * (id(slot) in fresh)
            elif self._made(slot) is not None:  # all of it is read to decode it
                yield self.of(slot) * (id(slot) in fresh) * bool(self._reads(slot))
            else:
                yield self._reads(slot)
