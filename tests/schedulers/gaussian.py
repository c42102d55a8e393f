"""A model that knows the answer: data from N(μ, s²), whose probability-flow ODE has a closed form.

For ``x = α x_0 + σ ε`` the denoised estimate is ``μ + α s² (x - α μ) / (α² s² + σ²)``, and a trajectory of the
ODE keeps ``(x - α μ) / sqrt(α² s² + σ²)``.
"""

from __future__ import annotations

from typing import Any

import torch

MU, S = 0.3, 0.6


class Exact:
    """The exact network of a scheduler, and the exact solution, at the noise levels that the scheduler is at."""

    def __init__(self, scheduler: Any, kind: str | None = None) -> None:
        self.scheduler = scheduler
        self.kind = kind or scheduler.config.get("prediction_type", "flow_prediction")
        self.name = type(scheduler).__name__
        self.edm = self.name.startswith(("EDM", "Cosine"))

    def level(self, t: Any, index: int) -> tuple[float, float]:
        """``α, σ`` at which the network is called."""
        s = self.scheduler
        if self.name.startswith("FlowMatch"):
            return 1 - float(s.sigmas[index]), float(s.sigmas[index])
        if self.name.startswith("IPNDM"):
            return float(s.alphas[index]), float(s.betas[index])
        if hasattr(s, "_grid") and not self.edm:
            return s._grid[index].alpha, s._grid[index].sigma
        if hasattr(s, "sigmas"):
            ratio = float(s.scale_model_input(torch.ones((), dtype=torch.float64), t))
            return 1.0, (1 / ratio**2 - (s.config.sigma_data**2 if self.edm else 1)) ** 0.5
        bar = float(s.alphas_cumprod[int(t)])
        return bar**0.5, (1 - bar) ** 0.5

    def __call__(self, x: torch.Tensor, t: Any, index: int) -> torch.Tensor:
        """The model output at ``x``."""
        alpha, sigma = self.level(t, index)
        x0 = MU + alpha * S**2 / (alpha**2 * S**2 + sigma**2) * (x - alpha * MU)
        if self.edm:
            variance = self.scheduler.config.sigma_data**2
            c_out = sigma * variance**0.5 / (sigma**2 + variance) ** 0.5
            c_out = c_out if self.kind == "epsilon" else -c_out
            return (x0 - variance / (sigma**2 + variance) * x) / c_out
        noise = (x - alpha * x0) / sigma
        if self.kind == "v_prediction" and alpha == 1.0:  # unscaled samples: the network saw x / sqrt(σ² + 1)
            alpha, sigma = 1 / (sigma**2 + 1) ** 0.5, sigma / (sigma**2 + 1) ** 0.5
        return {
            "epsilon": noise,
            "sample": x0,
            "v_prediction": alpha * noise - sigma * x0,
            "flow_prediction": noise - x0,
        }[self.kind]


def spread(alpha: float, sigma: float) -> float:
    """Standard deviation of noisy data."""
    return float((alpha**2 * S**2 + sigma**2) ** 0.5)


def moved(x: torch.Tensor, start: tuple[float, float], end: tuple[float, float]) -> torch.Tensor:
    """The exact solution of the ODE at the level ``end`` from ``x`` at ``start``."""
    return end[0] * MU + spread(*end) / spread(*start) * (x - start[0] * MU)
