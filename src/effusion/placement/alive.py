"""Counting, operator by operator, what a call holds and works while it is carried out on tensors without values."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from . import allocator, workspaces
from .arena import tensors_in

_FAULT = 64 << 10  # bytes of a mapped file that the system brings in around one that is read
_HUGE = 2 << 20  # as many at most, where its cache holds the file in huge pages


class Alive(TorchDispatchMode):
    """Counts the bytes of the storages that operators make and that are still alive, and what they work."""

    def __init__(self, weights: Mapping[str, Tensor], device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = self.workspace = 0
        self.flops = self.moved = 0.0
        self.touched: dict[str, int] = {}
        self.kernels: set[Any] = set()
        self.on_cpu = device.type == "cpu"
        self._seen: dict[int, weakref.ref[Any]] = {}
        self._weights = {tensor.untyped_storage()._cdata: (name, tensor) for name, tensor in weights.items()}
        for tensor in weights.values():
            self._remember(tensor, counts=False)

    def taken(self, nbytes: int) -> int:
        """What a storage of ``nbytes`` takes."""
        return nbytes if self.on_cpu else allocator.used_again(nbytes)

    def _remember(self, tensor: Tensor, counts: bool = True) -> bool:
        """Whether ``tensor`` is memory that was not there before."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return False
        nbytes = self.taken(storage.nbytes()) if counts else 0
        self.now += nbytes

        def gone(_: Any) -> None:
            self.now -= nbytes
            self._seen.pop(key, None)

        self._seen[key] = weakref.ref(storage, gone)
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = list(tensors_in(out if isinstance(out, (tuple, list)) else [out]))
        fresh = [self._remember(tensor) for tensor in made]
        works = any(fresh) or func._schema.is_mutable
        extra = (workspaces.workspace if self.on_cpu else workspaces.accelerated)(str(func), args, out)
        if self.on_cpu and (found := workspaces.kernel(str(func), args)) is not None:
            self.kernels.add(found)
        if self.now + extra > self.peak + self.workspace:
            self.peak, self.workspace = self.now, extra
        if works:
            self._count(func, args, kwargs or {}, out, made)
        return out

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any, made: list[Tensor]) -> None:
        given = list(tensors_in([args, kwargs]))
        formula = flop_registry.get(getattr(func, "_overloadpacket", None))
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        else:
            self.moved += sum(t.nbytes for t in (*given, *made))
        for tensor in given:
            found = self._weights.get(tensor.untyped_storage()._cdata)
            if found is not None:
                name, weight = found
                known = self.touched.get(name, 0)
                if "embedding" in str(func):
                    read = max(known, given[1].numel() * (weight[:1].nbytes + _FAULT))
                else:
                    read = known + reach(tensor)  # parts of it that several operators read may be different ones
                self.touched[name] = min(read, weight.nbytes)


def reach(view: Tensor) -> int:
    """Bytes of a mapped file that reading ``view``, a part of a weight, brings in, at most."""
    sizes = sorted((stride, size) for stride, size in zip(view.stride(), view.shape, strict=True) if stride)
    run = inside = 1  # elements one after the other, and how many of the view's they are
    for stride, size in sizes:
        if stride > run:
            break
        run += stride * (size - 1)
        inside *= size
    pieces = view.numel() // inside
    extent = 1 + sum(stride * (size - 1) for stride, size in sizes)
    return min(pieces * (run * view.itemsize + _HUGE), extent * view.itemsize + _HUGE)
