"""Linear layers that are computed as one: queries, keys and values by a single matrix product, undoable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class FusedProjections(nn.Module):
    """Base of attention modules that can join some of their linear layers into one.

    ``_fusible`` maps the joint layer's name to those of the parts. The parts are replaced, not copied; a state
    dict is written and read with the names of the parts, fused or not.
    """

    _fusible: Mapping[str, Sequence[str]] = {}
    fused_projections = False

    def __init__(self) -> None:
        super().__init__()
        self._register_state_dict_hook(_split_state)  # type: ignore[no-untyped-call]
        self._register_load_state_dict_pre_hook(_join_state, with_module=True)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def fuse_projections(self, fuse: bool = True) -> None:
        """Join the layers, or with ``fuse=False`` take them apart again: the same weights, bit for bit.

        Raises:
            ValueError: a layer is not a plain ``nn.Linear`` (an adapter is attached, say).
        """
        for joint, parts in self._present().items():
            if fuse and joint not in self._modules:
                layers = [self._modules[part] for part in parts]
                if any(type(layer) is not nn.Linear for layer in layers):
                    kinds = sorted({type(layer).__name__ for layer in layers})
                    raise ValueError(f"projections {parts} can't be fused: they are {kinds}; remove adapters first")
                self._modules[joint] = _joined(layers)  # type: ignore[arg-type]
                for part in parts:
                    del self._modules[part]
            elif not fuse and joint in self._modules:
                whole = self._modules.pop(joint)
                assert isinstance(whole, nn.Linear)
                self._modules.update(zip(parts, _parted(whole, len(parts)), strict=True))
        self.fused_projections = fuse

    def unfuse_projections(self) -> None:
        """``fuse_projections(fuse=False)``."""
        self.fuse_projections(fuse=False)

    def _present(self) -> dict[str, Sequence[str]]:
        has = self._modules
        return {j: p for j, p in self._fusible.items() if j in has or all(has.get(x) is not None for x in p)}


def project(module: FusedProjections, x: Tensor, joint: str) -> tuple[Tensor, ...]:
    """``x`` through the parts of ``joint``, or through ``joint`` itself if they are fused."""
    parts = module._fusible[joint]
    if module.fused_projections:
        return getattr(module, joint)(x).chunk(len(parts), dim=-1)  # type: ignore[no-any-return]
    return tuple(getattr(module, part)(x) for part in parts)


def _joined(layers: Sequence[nn.Linear]) -> nn.Linear:
    first = layers[0]
    width = sum(layer.out_features for layer in layers)
    joint = nn.Linear(first.in_features, width, bias=first.bias is not None, device="meta")
    joint.weight = nn.Parameter(torch.cat([x.weight.detach() for x in layers]), first.weight.requires_grad)
    if first.bias is not None:
        joint.bias = nn.Parameter(torch.cat([x.bias.detach() for x in layers]), first.bias.requires_grad)
    return joint.train(first.training)


def _parted(joint: nn.Linear, n: int) -> list[nn.Linear]:
    layers = []
    for i in range(n):
        part = nn.Linear(joint.in_features, joint.out_features // n, bias=joint.bias is not None, device="meta")
        for name, value in joint.named_parameters():
            setattr(part, name, nn.Parameter(value.detach().chunk(n)[i].clone(), value.requires_grad))
        layers.append(part.train(joint.training))
    return layers


def _split_state(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    assert isinstance(module, FusedProjections)
    for joint, parts in module._fusible.items():
        for kind in ("weight", "bias"):
            value = state.pop(f"{prefix}{joint}.{kind}", None)
            if value is not None:
                state.update({f"{prefix}{p}.{kind}": v for p, v in zip(parts, value.chunk(len(parts)), strict=True)})


def _join_state(module: nn.Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
    assert isinstance(module, FusedProjections)
    for joint, parts in module._fusible.items():
        for kind in ("weight", "bias"):
            names = [f"{prefix}{part}.{kind}" for part in parts]
            if joint in module._modules and all(name in state for name in names):
                state[f"{prefix}{joint}.{kind}"] = torch.cat([state.pop(name) for name in names])
