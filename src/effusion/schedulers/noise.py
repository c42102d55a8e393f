"""Training noise schedules as values: betas, their cumulative products, noise levels.

A variance-preserving process mixes ``x_t = sqrt(ᾱ_t) x_0 + sqrt(1 - ᾱ_t) ε`` with ``ᾱ_t = Π (1 - β_s)``
(Ho et al. 2020, "Denoising Diffusion Probabilistic Models"). Everything a solver needs follows from the betas.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[Any]
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace", "exp")


def _cosine(t: float) -> float:
    """Nichol & Dhariwal (2021), "Improved Denoising Diffusion Probabilistic Models", eq. 17."""
    return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2


def _laplace(t: float) -> float:
    """Hang & Gu (2024), "Improved Noise Schedule for Diffusion Training": Laplace-distributed log-SNR."""
    log_snr = -0.5 * math.copysign(1, 0.5 - t) * math.log(1 - 2 * abs(0.5 - t) + 1e-6)
    return math.sqrt(1 / (1 + math.exp(-log_snr)))


def _exponential(t: float) -> float:
    """The decay that Karlo's and Kandinsky's priors were trained with."""
    return math.exp(-12.0 * t)


ALPHA_BARS: dict[str, Callable[[float], float]] = {
    "cosine": _cosine,
    "laplace": _laplace,
    "exp": _exponential,
}


def betas_for_alpha_bar(num_diffusion_timesteps: int, max_beta: float = 0.999, alpha_transform_type: str = "cosine",
                        dtype: torch.dtype = torch.float32) -> Tensor:  # fmt: skip
    """The betas whose products follow a curve ᾱ(t), ``t`` from 0 to 1; each at most ``max_beta``. ``(T,)``."""
    alpha_bar = ALPHA_BARS[alpha_transform_type]
    n = num_diffusion_timesteps
    return torch.tensor([min(1 - alpha_bar((i + 1) / n) / alpha_bar(i / n), max_beta) for i in range(n)], dtype=dtype)


def make_betas(schedule: str, n: int, start: float, end: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """The betas of a named schedule, ``(n,)``.

    Raises:
        ValueError: no schedule has this name.
    """
    if schedule == "linear":
        return torch.linspace(start, end, n, dtype=dtype)
    if schedule == "scaled_linear":  # linear in sqrt(β): the latent diffusion models
        return torch.linspace(start**0.5, end**0.5, n, dtype=dtype) ** 2
    if schedule == "squaredcos_cap_v2":
        return betas_for_alpha_bar(n, dtype=dtype)
    if schedule == "sigmoid":  # GeoDiff
        return torch.sigmoid(torch.linspace(-6, 6, n, dtype=dtype)) * (end - start) + start
    if schedule in ("laplace", "exp"):
        return betas_for_alpha_bar(n, alpha_transform_type=schedule, dtype=dtype)
    raise ValueError(f"beta_schedule={schedule!r}: choose one of {', '.join(BETA_SCHEDULES)}, or pass `trained_betas`")


def rescale_alpha_bar(alpha_bar: Tensor) -> Tensor:
    """Shift and scale sqrt(ᾱ) so that the last step is pure noise; ``(T,) -> (T,)``.

    Lin et al. (2024), "Common Diffusion Noise Schedules and Sample Steps Are Flawed", algorithm 1.
    """
    root = alpha_bar.sqrt()
    first, last = root[0].clone(), root[-1].clone()
    return ((root - last) * (first / (first - last))) ** 2


def rescale_zero_terminal_snr(betas: Tensor) -> Tensor:
    """The betas after :func:`rescale_alpha_bar`; the last becomes 1. ``(T,) -> (T,)``."""
    alpha_bar = rescale_alpha_bar(torch.cumprod(1.0 - betas, dim=0))
    return 1 - torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])


@dataclass(frozen=True)
class NoiseSchedule:
    """What a network was trained with: ``betas``, ``alphas`` and ``alphas_cumprod``, each ``(T,)``."""

    betas: Tensor
    alphas: Tensor
    alphas_cumprod: Tensor

    @staticmethod
    def build(
        num_train_timesteps: int, beta_start: float, beta_end: float, beta_schedule: str,
        trained_betas: Sequence[float] | Array | None = None, rescale_betas_zero_snr: bool = False,
        last_alpha_bar: float | None = None, dtype: torch.dtype = torch.float32,
    ) -> NoiseSchedule:  # fmt: skip
        """The schedule of a scheduler's configuration.

        ``last_alpha_bar`` replaces the zero that a zero-terminal-SNR schedule ends with, for the
        solvers that divide by it.
        """
        if trained_betas is not None:
            betas = torch.as_tensor(np.asarray(trained_betas)).to(dtype).clone()
        else:
            betas = make_betas(beta_schedule, num_train_timesteps, beta_start, beta_end, dtype)
        if rescale_betas_zero_snr:
            betas = rescale_zero_terminal_snr(betas)
        alphas = 1.0 - betas
        alphas_cumprod = torch.cumprod(alphas, dim=0)
        if rescale_betas_zero_snr and last_alpha_bar is not None:
            alphas_cumprod[-1] = last_alpha_bar
        return NoiseSchedule(betas, alphas, alphas_cumprod)

    @property
    def sigmas(self) -> Tensor:
        """Noise-to-signal ratios ``sqrt((1 - ᾱ) / ᾱ)``, rising. ``(T,)``."""
        return ((1 - self.alphas_cumprod) / self.alphas_cumprod) ** 0.5
