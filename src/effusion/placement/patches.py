"""Deltas on top of weights (LoRA and its like): added where the weight is lent, never to what rests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor, nn

from .engine import engine_for, engine_of
from .packing import codec_of
from .transform import Transform


@dataclass
class LowRank:
    """``scale * up @ down``, added to a weight of shape ``(out, in, …)``; computed in float32.

    Attributes:
        up: ``(out, rank)`` or ``(out, rank, 1, 1)``; down: ``(rank, in)`` or ``(rank, in, kh, kw)``.
    """

    up: Tensor
    down: Tensor
    _there: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False, compare=False)

    def __call__(self, weight: Tensor, scale: float) -> Tensor:
        up, down = self._on(weight.device)
        return _added(weight, (up.float().flatten(1) @ down.float().flatten(1)).view(weight.shape), scale)

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Both on ``device``, where copies stay until :meth:`settle`."""
        if self.up.device == device == self.down.device:
            return self.up, self.down
        if device not in self._there:
            self._there[device] = self.up.to(device), self.down.to(device)
        return self._there[device]

    def settle(self) -> None:
        """Leave nothing on other devices."""
        self._there.clear()

    def nbytes(self, device: torch.device) -> int:
        """Bytes of the copies on ``device``."""
        return sum(t.nbytes for t in (self.up, self.down) if t.device != device)


Delta = Callable[[Tensor, float], Tensor]  # (weight, scale) -> patched weight, a new tensor


@dataclass
class Patch:
    """One named set of deltas on one component."""

    deltas: Mapping[str, Delta]  # qualified parameter name -> delta
    scale: float = 1.0

    def settle(self) -> None:
        """No call is going on: nothing has to stay on a compute device."""
        for delta in self.deltas.values():
            if isinstance(delta, LowRank):
                delta.settle()

    def nbytes(self, device: torch.device) -> int:
        """Bytes of the deltas that stay on ``device`` during a call of the pipeline."""
        return sum(delta.nbytes(device) for delta in self.deltas.values() if isinstance(delta, LowRank))


def add_patch(module: nn.Module, name: str, deltas: Mapping[str, Delta | Tensor], scale: float = 1.0) -> None:
    """Add ``deltas`` (qualified parameter name -> delta) to ``module`` as the patch ``name``, under any policy.

    A tensor is a full delta: ``weight + scale * delta``. What rests, is saved and counted stays unpatched.

    Raises:
        ValueError: the name is taken, or a parameter isn't there or has another shape.
    """
    engine = engine_for(module)
    if name in engine.patches:
        raise ValueError(f"a patch {name!r} is there already; remove it first, or give this one another name")
    parameters = dict(module.named_parameters())
    unknown = sorted(set(deltas) - set(parameters))
    if unknown:
        raise ValueError(f"patch {name!r}: {type(module).__name__} has no parameters {unknown[:5]}")
    shapes = {path: _shape(module, path, parameters[path]) for path in deltas}
    made = {path: _delta(path, shapes[path], delta) for path, delta in deltas.items()}
    engine.settle()
    patch = engine.patches[name] = Patch(made, scale)
    for path, delta in made.items():
        owner, _, leaf = path.rpartition(".")
        layer = module.get_submodule(owner)
        transform = engine.transforms.setdefault(layer, Transform(layer))
        transform.patches.setdefault(leaf, {})[name] = _Applied(patch, delta)
    engine.install()


def _shape(module: nn.Module, path: str, parameter: Tensor) -> tuple[int, ...]:
    """Of the weight that is computed with; what rests may be packed bytes."""
    codec = codec_of(module, path)
    return tuple(parameter.shape) if codec is None else codec.shape


def _delta(path: str, shape: tuple[int, ...], delta: Delta | Tensor) -> Delta:
    if isinstance(delta, LowRank):
        rows, columns = delta.up.shape[0], delta.down[0].numel()
        if rows * columns != prod(shape) or delta.up.shape[1] != delta.down.shape[0]:
            raise ValueError(
                f"{path}: up {list(delta.up.shape)} and down {list(delta.down.shape)} don't make "
                f"a delta of its shape {list(shape)}"
            )
        return delta
    if isinstance(delta, Tensor):
        if tuple(delta.shape) != shape:
            raise ValueError(f"{path}: the delta is {list(delta.shape)}, the weight {list(shape)}")
        return _Full(delta)
    return delta


@dataclass
class _Full:
    tensor: Tensor

    def __call__(self, weight: Tensor, scale: float) -> Tensor:
        return _added(weight, self.tensor.to(weight.device, torch.float32), scale)


def _added(weight: Tensor, delta: Tensor, scale: float) -> Tensor:
    """``weight + scale * delta`` in float32, as what ``weight`` is; beside these two tensors of float32 at most."""
    return weight.to(torch.float32, copy=True).add_(delta, alpha=scale).to(weight.dtype)


class _Applied:
    """A delta with the scale that its patch has at the moment; at 0 the weight is the same object."""

    def __init__(self, patch: Patch, delta: Delta) -> None:
        self.patch = patch
        self.delta = delta

    def __call__(self, weight: Tensor) -> Tensor:
        return self.delta(weight, self.patch.scale) if self.patch.scale else weight


def scale_patch(module: nn.Module, name: str, scale: float) -> None:
    """Change the strength of a patch; 0 switches it off."""
    _patch(module, name).scale = float(scale)


def remove_patch(module: nn.Module, name: str) -> None:
    """Take a patch away; the results are those from before it, bit for bit."""
    _patch(module, name)
    engine = engine_for(module)
    engine.settle()
    del engine.patches[name]
    for layer, transform in list(engine.transforms.items()):
        for patches in transform.patches.values():
            patches.pop(name, None)
        if transform.idle:
            del engine.transforms[layer]
    engine.install()
    engine.close_if_idle()


def patch_names(module: nn.Module) -> dict[str, float]:
    """The patches of ``module`` and their scales."""
    engine = engine_of(module)
    return {name: patch.scale for name, patch in engine.patches.items()} if engine is not None else {}


def _patch(module: nn.Module, name: str) -> Patch:
    engine = engine_of(module)
    if engine is None or name not in engine.patches:
        raise ValueError(f"no patch is called {name!r}; there are {sorted(patch_names(module))}")
    return engine.patches[name]
