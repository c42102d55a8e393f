"""Linear multistep in σ: Adams-Bashforth on the ODE of Karras et al. (2022), as in k-diffusion."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.config import register_to_config
from .base import KARRAS_COMPATIBLES, DenoisedOutput, Device, combine
from .karras import KarrasScheduler, slope
from .noise import Array

LMSDiscreteSchedulerOutput = DenoisedOutput


@cache
def gauss_legendre(points: int) -> tuple[Array, Array]:
    """Places and weights of the quadrature that is exact up to degree ``2 points - 1``, on -1 to 1."""
    places, weights = np.polynomial.legendre.leggauss(points)
    return places, weights


def integral_of_lagrange(nodes: Sequence[float], k: int, start: float, end: float) -> float:
    """``∫ Π_{j≠k} (τ - σ_j) / (σ_k - σ_j) dτ`` from ``start`` to ``end``, exact: Gauss-Legendre."""
    points, weights = gauss_legendre((len(nodes) + 1) // 2)
    tau = (end - start) / 2 * points + (end + start) / 2
    others = [node for j, node in enumerate(nodes) if j != k]
    values = np.prod([(tau - node) / (nodes[k] - node) for node in others], axis=0) if others else np.ones_like(tau)
    return float((end - start) / 2 * np.sum(weights * values))


class LMSDiscreteScheduler(KarrasScheduler):
    """Linear multistep of order up to 4 (:meth:`step` takes it), with exact weights for uneven levels."""

    _compatibles = KARRAS_COMPATIBLES

    @register_to_config
    def __init__(
        self, num_train_timesteps: int = 1000, beta_start: float = 0.0001, beta_end: float = 0.02,
        beta_schedule: str = "linear", trained_betas: Array | list[float] | None = None,
        use_karras_sigmas: bool = False, use_exponential_sigmas: bool = False, use_beta_sigmas: bool = False,
        prediction_type: str = "epsilon", timestep_spacing: str = "linspace", steps_offset: int = 0,
    ) -> None:  # fmt: skip
        self._train()
        self.set_timesteps(num_train_timesteps)
        self.num_inference_steps = None

    def set_timesteps(self, num_inference_steps: int, device: Device = None) -> None:
        """Begin a run of ``num_inference_steps`` steps."""
        levels, times = self._levels(num_inference_steps)
        self.num_inference_steps = num_inference_steps
        self._begin(times, levels, device, torch.float32)
        self.derivatives: list[Tensor] = []  # the last slopes, oldest first

    def get_lms_coefficient(self, order: int, t: int, current_order: int) -> float:
        """The weight of the slope ``current_order`` steps ago in a step from level ``t``."""
        sigmas = self._list("sigmas")
        return integral_of_lagrange([sigmas[t - k] for k in range(order)], current_order, sigmas[t], sigmas[t + 1])

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, order: int = 4, return_dict: bool = True
    ) -> DenoisedOutput | tuple[Tensor, Tensor]:
        """One step of ``order``, or less where a run has just begun; shapes ``(B, C, …)``."""
        i = self._enter(timestep, model_output, sample)
        self._remind()
        sigma = self._list("sigmas")[i]
        x0 = self._denoised(model_output, sample, sigma)
        self.derivatives = [*self.derivatives, slope(sample, x0, sigma)][-order:]
        slopes = self.derivatives[::-1]
        # The ecosystem counts from the schedule's first level, though a run that begins later has fewer slopes.
        weights = [self.get_lms_coefficient(min(i + 1, order), i, k) for k in range(len(slopes))]
        prev_sample = combine((1.0, sample), *zip(weights, slopes, strict=True))
        self._advance()
        return DenoisedOutput(prev_sample, x0) if return_dict else (prev_sample, x0)
