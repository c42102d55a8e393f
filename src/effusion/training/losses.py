"""What a diffusion network is trained to predict, and how much each noise level counts."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ..schedulers import prediction

WEIGHTINGS = ("none", "min_snr")


class NoiseSchedule(Protocol):
    """What the loss needs of a scheduler: the cumulative products of its alphas, by timestep."""

    alphas_cumprod: Tensor


def levels(schedule: NoiseSchedule, timesteps: Tensor, dims: int) -> tuple[Tensor, Tensor]:
    """``α`` and ``σ`` of ``x = α x_0 + σ ε`` at ``timesteps`` (N,), float32, shaped to broadcast with ``dims`` axes."""
    cumprod = schedule.alphas_cumprod.to(timesteps.device, torch.float32)[timesteps]
    shape = (-1,) + (1,) * (dims - 1)
    return cumprod.sqrt().view(shape), (1 - cumprod).sqrt().view(shape)


def snr(schedule: NoiseSchedule, timesteps: Tensor) -> Tensor:
    """Signal-to-noise ratio ``α² / σ²`` at ``timesteps`` (N,)."""
    alpha, sigma = levels(schedule, timesteps, 1)
    return (alpha / sigma) ** 2


def min_snr_weight(kind: str, ratio: Tensor, gamma: float = 5.0) -> Tensor:
    """Weight of the loss on a prediction of ``kind`` at a signal-to-noise ``ratio`` (N,).

    Hang et al. (2023), "Efficient Diffusion Training via Min-SNR Weighting Strategy": ``min(SNR, γ)`` for a
    network that predicts ``x_0``; divided by ``SNR`` for ε and by ``SNR + 1`` for v, whose errors are those
    multiples of the error of ``x_0``.

    Raises:
        ValueError: a prediction without such a weight.
    """
    capped = ratio.clamp(max=gamma)
    if kind == "sample":
        return capped
    if kind == "epsilon":
        return capped / ratio.clamp(min=torch.finfo(ratio.dtype).tiny)
    if kind == "v_prediction":
        return capped / (ratio + 1)
    raise ValueError(f"no min-SNR weight for prediction type {kind!r}; for 'epsilon', 'sample', 'v_prediction' only")


def diffusion_loss(
    output: Tensor,
    clean: Tensor,
    noise: Tensor,
    schedule: NoiseSchedule,
    timesteps: Tensor,
    kind: str = "epsilon",
    weighting: str = "none",
    gamma: float = 5.0,
) -> Tensor:
    """Mean squared error of ``output`` against what ``kind`` should have predicted, a scalar in float32.

    Args:
        output: the network's answer to ``α clean + σ noise``, (N, …) like ``clean`` and ``noise``.
        weighting: ``none``, or ``min_snr`` with ``gamma``.

    Raises:
        ValueError: unknown ``kind`` or ``weighting``.
    """
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting={weighting!r}: one of {', '.join(WEIGHTINGS)}")
    alpha, sigma = levels(schedule, timesteps, clean.dim())
    wanted = prediction.target(kind, clean.float(), noise.float(), alpha, sigma)
    error = (output.float() - wanted).square().flatten(1).mean(dim=1)  # (N,)
    if weighting == "min_snr":
        error = error * min_snr_weight(kind, snr(schedule, timesteps), gamma)
    return error.mean()


def flow_loss(output: Tensor, clean: Tensor, noise: Tensor) -> Tensor:
    """Rectified flow (Liu et al., 2022): the error against the straight way from data to noise, a scalar."""
    wanted = prediction.target("flow_prediction", clean.float(), noise.float(), 0.0, 1.0)
    return (output.float() - wanted).square().mean()
