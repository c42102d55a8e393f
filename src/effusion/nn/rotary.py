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


# -- the ecosystem's forms of such tables ------------------------------------------------------------


def as_table(turns: Any) -> Tensor:
    """Our table ``(L, D / 2, 2)`` of what the ecosystem's networks pass on.

    That is either cosine and sine, ``(L, D)`` each with every value twice, or complex ``(L, D / 2)`` for image tokens
    and for text tokens, which come first here.
    """
    if isinstance(turns, Tensor):
        return torch.view_as_real(turns) if turns.is_complex() else turns
    one, two = turns
    if one.is_complex():
        return torch.view_as_real(torch.cat((two, one)))
    return torch.stack((one[:, ::2], two[:, ::2]), dim=-1)


def as_cos_sin(table: Any) -> Any:
    """Cosine and sine of our table, ``(L, D)`` each with every value twice; anything else as it is."""
    if not isinstance(table, Tensor) or table.is_complex():
        return table
    cos, sin = table.repeat_interleave(2, dim=1).unbind(-1)
    return cos, sin


def get_1d_rotary_pos_embed(
    dim: int,
    pos: Any,
    theta: float = 10000.0,
    use_real: bool = False,
    linear_factor: float = 1.0,
    ntk_factor: float = 1.0,
    repeat_interleave_real: bool = True,
    freqs_dtype: torch.dtype = torch.float32,
) -> Any:
    """The turns of positions ``pos``, ``(L,)`` or a number of them, for ``dim`` channels.

    Args:
        use_real: cosine and sine, ``(L, dim)`` each in float32, instead of complex ``(L, dim / 2)``.
        linear_factor: slows all turns down.
        ntk_factor: multiplies ``theta``, which slows the slow ones down.
        repeat_interleave_real: each value twice in a row (for neighbouring channels), or the whole twice (for halves).

    Raises:
        ValueError: ``dim`` is odd.
    """
    if dim % 2:
        raise ValueError(f"dim must be even, as channels turn in pairs, not {dim}")
    pos = torch.arange(pos) if isinstance(pos, int) else torch.as_tensor(pos)
    steps = torch.arange(0, dim, 2, dtype=freqs_dtype, device=pos.device) / dim
    angles = torch.outer(pos, 1.0 / ((theta * ntk_factor) ** steps) / linear_factor)  # (L, dim / 2)
    if not use_real:
        return torch.polar(torch.ones_like(angles), angles)
    parts = (angles.cos(), angles.sin())
    if repeat_interleave_real:
        return tuple(part.repeat_interleave(2, dim=1).float() for part in parts)
    return tuple(torch.cat((part, part), dim=-1).float() for part in parts)


def apply_rotary_emb(
    x: Tensor, freqs_cis: Any, use_real: bool = True, use_real_unbind_dim: int = -1, sequence_dim: int = 2
) -> Tensor:
    """Turn the channels of ``x``, ``(B, H, L, D)``, or ``(B, L, H, D)`` with ``sequence_dim=1``, in float32.

    Args:
        freqs_cis: cosine and sine, ``(L, D)`` each (or our own table); complex ``(B, L, D / 2)`` without ``use_real``,
            and ``x`` is then ``(B, L, H, D)``.
        use_real_unbind_dim: pairs are neighbours (-1) or lie half of the channels apart (-2).

    Raises:
        ValueError: another ``sequence_dim`` or ``use_real_unbind_dim``.
    """
    if not use_real:
        turned = torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * freqs_cis.unsqueeze(2)
        return torch.view_as_real(turned).flatten(3).type_as(x)
    if sequence_dim not in (1, 2):
        raise ValueError(f"sequence_dim={sequence_dim}; tokens are along dimension 1 or 2")
    if use_real_unbind_dim not in (-1, -2):
        raise ValueError(f"use_real_unbind_dim={use_real_unbind_dim}; -1 pairs neighbours, -2 the two halves")
    cos, sin = (t.to(x.device).unsqueeze(1 if sequence_dim == 1 else 0) for t in as_cos_sin(freqs_cis))
    if use_real_unbind_dim == -1:
        real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
        quarter = torch.stack((-imaginary, real), dim=-1).flatten(3)
    else:
        real, imaginary = x.chunk(2, dim=-1)
        quarter = torch.cat((-imaginary, real), dim=-1)
    return (x.float() * cos + quarter.float() * sin).to(x.dtype)


class FluxPosEmbed(nn.Module):
    """Positions ``(L, A)`` to cosine and sine ``(L, D)``, as the ecosystem's FLUX has them."""

    def __init__(self, theta: int, axes_dim: Sequence[int]) -> None:
        super().__init__()
        self.theta, self.axes_dim = theta, axes_dim

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        wide = torch.float64 if ids.device.type not in ("mps", "npu") else torch.float32
        cos, sin = as_cos_sin(rotary_table(ids.float(), self.axes_dim, self.theta, wide))
        return cos, sin


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
