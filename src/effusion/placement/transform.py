"""Decoding and patching: the second and third of what the engine does to a weight."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..quant.codec import Codec

lock = threading.RLock()  # held by whoever lends, drops or changes what is lent, on any component


class Transform:
    """Decode and patch the weights of one module: storage dtype or packed bytes -> compute dtype, then add the deltas."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.casts: dict[str, tuple[torch.dtype, torch.dtype]] = {}  # name -> (storage, compute)
        self.codecs: dict[str, tuple[Codec, torch.dtype]] = {}  # name -> (what unpacks it, compute dtype)
        self.patches: dict[str, dict[str, Callable[[Tensor], Tensor]]] = {}  # name -> patch -> function
        self.depth = 0
        self._put: list[tuple[dict[str, Any], str, Tensor, Tensor]] = []

    @property
    def idle(self) -> bool:
        return not self.casts and not self.codecs and not any(self.patches.values())

    def enter(self) -> None:
        """Put decoded, patched weights in place until :meth:`exit`."""
        with lock:
            self.depth += 1
            if self.depth > 1:
                return
            with torch.inference_mode(False), torch.no_grad():
                for name in {**self.casts, **self.codecs, **self.patches}:
                    own = self.module._parameters
                    store: dict[str, Any] = own if name in own else self.module._buffers
                    rest = store.get(name)
                    value = rest if rest is None else self.apply(name, rest)
                    if rest is not None and value is not None and value is not rest:
                        self._put.append((store, name, rest, value))
                        store[name] = value

    def apply(self, name: str, rest: Tensor) -> Tensor:
        """The weight to compute with, from the one that rests (or was fetched)."""
        value = rest
        if name in self.casts and rest.dtype == self.casts[name][0]:
            value = value.to(self.casts[name][1])
        if name in self.codecs and rest.dtype == torch.uint8:
            codec, dtype = self.codecs[name]
            value = codec.decode(value, dtype)
        for patch in self.patches.get(name, {}).values():
            value = patch(value)
        if value is rest or not isinstance(rest, nn.Parameter):
            return value
        return nn.Parameter(value, requires_grad=False)

    def like(self, name: str, rest: Tensor) -> Tensor:
        """What :meth:`apply` gives, without values."""
        if name in self.codecs and rest.dtype == torch.uint8:
            codec, dtype = self.codecs[name]
            return torch.empty(codec.shape, dtype=dtype, device="meta")
        storage, compute = self.casts.get(name, (rest.dtype, rest.dtype))
        dtype = compute if rest.dtype == storage else rest.dtype
        return torch.empty_strided(rest.shape, rest.stride(), dtype=dtype, device="meta")

    def exit(self) -> None:
        with lock:
            self.depth -= 1
            if self.depth:
                return
            for store, name, rest, value in reversed(self._put):
                if store.get(name) is value:  # else the module put something else there: that stays
                    store[name] = rest
            self._put = []
