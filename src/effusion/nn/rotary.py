"""Rotary position embeddings (Su et al., 2021) over several axes, and a memory for their tables.

A table is a real tensor ``(L, D / 2, 2)``: cosine and sine of each token's angle for each pair of channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def rotary_table(ids: Tensor, axes_dim: Sequence[int], theta: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """The table for positions ``ids``.

    Args:
        ids: ``(L, A)``, the position of each token on each axis.
        axes_dim: how many channels of a head each of the A axes turns; even numbers.
        dtype: precision of the angles; the table is float32.

    Returns:
        ``(L, sum(axes_dim) / 2, 2)``.
    """
    angles = []
    for axis, dim in enumerate(axes_dim):
        steps = torch.arange(0, dim, 2, dtype=dtype, device=ids.device) / dim
        angles.append(torch.outer(ids[:, axis].to(dtype), 1.0 / torch.pow(theta, steps)))
    turn = torch.cat(angles, dim=-1)  # (L, D / 2)
    return torch.stack((turn.cos(), turn.sin()), dim=-1).float()


def apply_rotary(x: Tensor, table: Tensor) -> Tensor:
    """Turn each pair of neighbouring channels of ``x`` ``(B, L, H, D)`` by its angle in ``table``, in float32."""
    pairs = x.float().unflatten(-1, (-1, 2))  # (B, L, H, D / 2, 2)
    table = table.unsqueeze(1)  # (L, 1, D / 2, 2)
    if torch.compiler.is_compiling():  # fuses real numbers only
        (a, b), (cos, sin) = pairs.unbind(-1), table.unbind(-1)
        turned = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1)
    else:  # one pass instead of six
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(table))
    return turned.flatten(-2).type_as(x)


class AxialRotary(nn.Module):
    """Tables for token positions on several axes, with angles in float64 where the device has it."""

    def __init__(self, theta: float, axes_dim: Sequence[int]) -> None:
        super().__init__()
        self.theta = theta
        self.axes_dim = tuple(axes_dim)
        self.memo = Memo()

    def forward(self, *ids: Tensor) -> Tensor:
        """The table of the given positions, ``(L, A)`` each, one after the other."""

        def make() -> Tensor:
            joint = torch.cat(ids)
            wide = joint.device.type not in ("mps", "npu")
            return rotary_table(joint, self.axes_dim, self.theta, torch.float64 if wide else torch.float32)

        table: Tensor = self.memo.get(ids[0], ids, make)
        return table


class Memo:
    """The last few results of a function, so that what is the same at each step of a run is computed at the first.

    Arguments are the same if they are equal; tensors, if they are the same object and were not written to
    since. Nothing is remembered while compiling, under inference mode, or of fake tensors.
    """

    def __init__(self, size: int = 4) -> None:
        self._size = size
        self._entries: tuple[tuple[list[Any], Any], ...] = ()

    def get(self, witness: Tensor, keys: Sequence[Any], make: Callable[[], Any]) -> Any:
        """The remembered result for ``keys``, or that of ``make``; ``witness`` tells the kind of tensors at work."""
        if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or type(witness) is not Tensor:
            return make()
        tensors = [k for k in keys if isinstance(k, Tensor)]
        if any(t.is_inference() or t.requires_grad for t in tensors):
            return make()
        marks = [_Same(k) if isinstance(k, Tensor) else k for k in keys]
        entries = self._entries
        for known, value in entries:
            if known == marks:
                return value
        value = make()
        self._entries = ((marks, value), *entries[: self._size - 1])
        return value

    def __reduce__(self) -> Any:  # copies and pickles start empty
        return Memo, (self._size,)


class _Same:
    """A tensor in the state it is in now; equal to itself only."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.version = tensor._version

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.tensor is other.tensor and self.version == other.version
