"""What a network predicts, turned into the denoised estimate: the one place, for sampling and for training.

With ``x = α x_0 + σ ε``, every kind of prediction is linear in ``x`` and ``x_0``: *epsilon* is ε, *sample* is
``x_0``, *v_prediction* is ``α ε - σ x_0`` (Salimans & Ho 2022, "Progressive Distillation"), *flow_prediction* is
``ε - x_0`` with ``α = 1 - σ`` (Lipman et al. 2023, Liu et al. 2023). ``α`` and ``σ`` are floats or tensors that
broadcast with ``x``.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

Level = TypeVar("Level", float, Tensor)

KINDS = ("epsilon", "sample", "v_prediction", "flow_prediction")


def check(kind: str, allowed: tuple[str, ...], who: str) -> None:
    """Raise :class:`ValueError` for a prediction type that ``who`` can't do."""
    if kind not in allowed:
        raise ValueError(f"prediction_type={kind!r} is nothing {who} can do; it takes {', '.join(allowed)}")


def denoised(kind: str, alpha: Level, sigma: Level) -> tuple[Level | float, Level | float]:
    """``(a, b)`` such that ``x_0 = a x + b m`` for the model output ``m``."""
    if kind == "epsilon":
        return 1 / alpha, -sigma / alpha
    if kind == "sample":
        return 0.0, 1.0
    if kind == "v_prediction":
        return alpha, -sigma
    if kind == "flow_prediction":
        return 1.0, -sigma
    raise ValueError(f"prediction_type={kind!r}: choose one of {', '.join(KINDS)}")


def noise(kind: str, alpha: Level, sigma: Level) -> tuple[Level | float, Level | float]:
    """``(a, b)`` such that ``ε = a x + b m`` for the model output ``m``."""
    if kind == "epsilon":
        return 0.0, 1.0
    if kind == "sample":
        return 1 / sigma, -alpha / sigma
    if kind == "v_prediction":
        return sigma, alpha
    if kind == "flow_prediction":
        return 1.0, 1 - sigma
    raise ValueError(f"prediction_type={kind!r}: choose one of {', '.join(KINDS)}")


def karras(kind: str, sigma: float) -> tuple[float, float]:
    """:func:`denoised` for samples that are not scaled, ``x = x_0 + σ ε`` (Karras et al. 2022)."""
    if kind == "v_prediction":
        norm = sigma * sigma + 1
        return 1 / norm, -sigma / norm**0.5
    return denoised(kind, 1.0, sigma)


def to_denoised(
    kind: str, model_output: Tensor, sample: Tensor, alpha: Tensor | float, sigma: Tensor | float
) -> Tensor:
    """The denoised estimate ``x_0`` of ``sample``; shapes as ``sample``."""
    a, b = denoised(kind, alpha, sigma)  # type: ignore[type-var]
    return a * sample + b * model_output


def target(kind: str, clean: Tensor, noise: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
    """What the network should have predicted for ``α clean + σ noise``: the training target."""
    if kind == "epsilon":
        return noise
    if kind == "sample":
        return clean
    if kind == "v_prediction":
        return alpha * noise - sigma * clean
    if kind == "flow_prediction":
        return noise - clean
    raise ValueError(f"prediction_type={kind!r}: choose one of {', '.join(KINDS)}")


def threshold(x0: Tensor, ratio: float, limit: float) -> Tensor:
    """Dynamic thresholding: Saharia et al. (2022), "Imagen", section 2.3. ``(B, …) -> (B, …)``."""
    flat = x0.reshape(x0.shape[0], -1)
    flat = flat if flat.dtype in (torch.float32, torch.float64) else flat.float()
    s = torch.quantile(flat.abs(), ratio, dim=1).clamp_(min=1, max=limit).unsqueeze(1)  # (B, 1)
    return torch.clamp(flat, -s, s).div_(s).reshape(x0.shape).to(x0.dtype)
