"""Base of the solvers that work with ᾱ_t at whole timesteps, as DDPM does."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import prediction
from .base import SchedulerMixin, combine, like
from .noise import Array, NoiseSchedule
from .spacing import timesteps as spaced


class AlphaScheduler(SchedulerMixin):
    """A scheduler over a table of ``alphas_cumprod``, indexed by the timestep."""

    betas: Tensor
    alphas: Tensor
    alphas_cumprod: Tensor
    final_alpha_cumprod: Tensor
    _predictions: tuple[str, ...] = prediction.KINDS[:3]

    def _train(self, dtype: torch.dtype = torch.float32) -> None:
        """Make the training schedule of the configuration and a run over all of its timesteps."""
        c = self.config
        prediction.check(c.prediction_type, self._predictions, type(self).__name__)
        schedule = NoiseSchedule.build(
            c.num_train_timesteps,
            c.beta_start,
            c.beta_end,
            c.beta_schedule,
            c.trained_betas,
            c.get("rescale_betas_zero_snr", False),
            dtype=dtype,
        )
        self._take(schedule)

    def _take(self, schedule: NoiseSchedule) -> None:
        self.betas, self.alphas, self.alphas_cumprod = schedule.betas, schedule.alphas, schedule.alphas_cumprod
        final_is_one = self.config.get("set_alpha_to_one", True)
        self.final_alpha_cumprod = torch.tensor(1.0) if final_is_one else self.alphas_cumprod[0]
        self.num_inference_steps = None
        self._begin(np.arange(len(self.betas))[::-1], None, None, torch.int64)

    def _spaced(self, steps: int) -> Array:
        c = self.config
        return spaced(c.timestep_spacing, steps, c.num_train_timesteps, c.steps_offset)

    @property
    def _tables(self) -> tuple[Array, Array, Array]:
        """``ᾱ, sqrt(ᾱ), sqrt(1 - ᾱ)`` on the host, rounded as the table is. ``(T,)`` each."""
        tables: tuple[Array, Array, Array] = self._derived("alphas_cumprod", "tables", _roots)
        return tables

    def _level(self, t: int) -> tuple[Any, ...]:
        """``ᾱ_t, sqrt(ᾱ_t), sqrt(1 - ᾱ_t)``; of ``final_alpha_cumprod`` before the first timestep."""
        tables = self._tables
        if t < 0:
            final = self._derived("final_alpha_cumprod", "tables", _roots)
            return tuple(table.astype(tables[0].dtype)[()] for table in final)
        if t >= len(tables[0]):
            raise ValueError(f"timestep {t}: the network knows 0 to {len(tables[0]) - 1} (num_train_timesteps)")
        return tables[0][t], tables[1][t], tables[2][t]

    def _estimate(self, model_output: Tensor, sample: Tensor, alpha: Any, sigma: Any) -> Tensor:
        """The denoised estimate, thresholded or clipped as configured; shaped as ``sample``."""
        c = self.config
        kind = c["prediction_type"]
        if kind == "epsilon" and alpha == 0:
            raise ValueError(
                "prediction_type='epsilon' can't start from pure noise (rescale_betas_zero_snr=True): "
                "its estimate divides by zero there; use a network with v_prediction, or timestep_spacing='leading'"
            )
        x0 = denoise(kind, model_output, sample, float(alpha), float(sigma))
        if c.get("thresholding"):
            return prediction.threshold(x0, c["dynamic_thresholding_ratio"], c["sample_max_value"])
        if c.get("clip_sample"):
            limit = c.get("clip_sample_range", 1.0)
            return x0.clamp(-limit, limit) if x0 is model_output else x0.clamp_(-limit, limit)
        return x0

    def _mix(self, sample: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """``sqrt(ᾱ_t), sqrt(1 - ᾱ_t)`` for a batch of timesteps, ``(B, 1, …)``."""
        bar = self._near("alphas_cumprod", sample)[timesteps.to(sample.device)]
        return like(bar**0.5, sample), like((1 - bar) ** 0.5, sample)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """``sqrt(ᾱ_t) x_0 + sqrt(1 - ᾱ_t) ε``; samples ``(B, …)``, timesteps ``(B,)``."""
        alpha, sigma = self._mix(original_samples, timesteps)
        return alpha * original_samples + sigma * noise

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The target of a network with v-prediction; samples ``(B, …)``, timesteps ``(B,)``."""
        alpha, sigma = self._mix(sample, timesteps)
        return prediction.target("v_prediction", sample, noise, alpha, sigma)


def denoise(kind: str, model_output: Tensor, sample: Tensor, alpha: float, sigma: float) -> Tensor:
    """The denoised estimate of a scaled sample; the model output itself for networks that predict it."""
    if kind == "epsilon":
        x0 = torch.add(sample, model_output, alpha=-sigma)
        return x0.div_(alpha) if alpha != 1 else x0
    a, b = prediction.denoised(kind, alpha, sigma)
    return model_output if a == 0 and b == 1 else combine((a, sample), (b, model_output))


def root(value: Any) -> Any:
    """The root of a NumPy number in its own precision, as torch rounds it on this machine."""
    return (torch.as_tensor(value) ** 0.5).numpy()[()]


def _roots(bar: Tensor) -> tuple[Array, Array, Array]:
    """``ᾱ, sqrt(ᾱ), sqrt(1 - ᾱ)`` as arrays; torch's roots, whose last bit is not always NumPy's."""
    return bar.cpu().numpy(), (bar**0.5).cpu().numpy(), ((1 - bar) ** 0.5).cpu().numpy()
