"""Eight-bit floats that have a scale beside them, as ComfyUI writes them, found among the tensors of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from math import prod

import torch
from torch import Tensor

from ..core.errors import CheckpointError
from ..quant.codec import ScaledFloat
from .entries import Checkpoint, Entry, Packed
from .slices import TensorSlice

_SCALES = (".scale_weight", ".weight_scale")
_ASIDE = (".scale_input", ".input_scale", ".comfy_quant")  # hints for other programs' kernels


def is_scale(name: str) -> bool:
    """Whether a tensor of this name may be the scale of another."""
    return name.endswith(_SCALES)


def scaled(checkpoint: Checkpoint) -> Checkpoint:
    """``checkpoint`` with the weights that have a scale as packed ones; scales and what belongs to them are left out.

    Raises:
        CheckpointError: a scale that fits no rows of its weight.
    """
    entries = dict(checkpoint.items())
    for name, scale in checkpoint.items():
        end = next((e for e in _SCALES if name.endswith(e)), None)
        stem = name.removesuffix(end or "")
        weight = entries.get(f"{stem}.weight") if end else None
        if isinstance(weight, TensorSlice) and weight.dtype.itemsize == 1 and weight.dtype.is_floating_point:
            _check(checkpoint.label, name, scale, weight)
            read = partial(checkpoint.tensor, name)
            entries[f"{stem}.weight"] = _packed(weight, read, prod(scale.shape) == 1)
            del entries[name]
    return checkpoint.replaced(_without_hints(entries))


def _check(label: str, name: str, scale: Entry, weight: TensorSlice) -> None:
    rows = weight.shape[0] if weight.shape else 1
    if prod(scale.shape) not in (1, rows) or not scale.dtype.is_floating_point:
        raise CheckpointError(f"{label}: {name} {list(scale.shape)} is no scale of {list(weight.shape)}")


def _packed(weight: TensorSlice, scale: Callable[[], Tensor], uniform: bool) -> Packed:
    codec = ScaledFloat(weight.dtype, weight.shape, scale, uniform)
    return Packed(replace(weight, dtype=torch.uint8), codec)


def _without_hints(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    packed = {n.removesuffix(".weight") for n, e in entries.items() if isinstance(e, Packed)}
    marks = {n for n in entries if n.split(".")[-1] == "scaled_fp8"}
    marks |= {n for n in entries if n.endswith(_ASIDE) and n.rpartition(".")[0] in packed}
    return {n: e for n, e in entries.items() if n not in marks}
