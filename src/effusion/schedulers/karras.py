"""Base of the solvers of Karras et al. (2022), "Elucidating the Design Space", for samples ``x = x_0 + σ ε``."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import prediction, spacing
from .base import combine, like, logger
from .noise import Array
from .sigma import TRANSFORMS, SigmaScheduler


class KarrasScheduler(SigmaScheduler):
    """Unscaled samples: the network's input is scaled by :meth:`scale_model_input`."""

    is_scale_input_called = False
    _times_dtype: type = np.float32  # in which timesteps are rounded before the table is interpolated

    def _train(self) -> None:
        super()._train()
        self._begin(np.arange(len(self.betas))[::-1], np.append(self._table()[::-1], 0.0), None, torch.float32)

    @property
    def init_noise_sigma(self) -> Any:
        """Standard deviation of the first sample: that of pure noise at the highest level of the run."""
        highest = self.sigmas.max()
        return highest if self.config.timestep_spacing in ("linspace", "trailing") else (highest**2 + 1) ** 0.5

    def scale_model_input(self, sample: Tensor, timestep: Any) -> Tensor:  # type: ignore[override]
        """``x / sqrt(σ² + 1)``, the sample as the network was trained to see it; same shape."""
        sigma = self._sigma(timestep)
        self.is_scale_input_called = True
        return torch.div(sample, (sigma * sigma + 1) ** 0.5)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """``x_0 + σ ε``; samples ``(B, …)``, timesteps ``(B,)`` of this run."""
        sigma = self._near("sigmas", original_samples)[self._positions(timesteps)]
        return original_samples + noise * like(sigma, original_samples)

    def _levels(self, steps: int, timesteps: Any = None, train: int | None = None) -> tuple[Array, Array]:
        """The noise levels of a run ``(steps + 1,)`` and their timesteps ``(steps,)``, descending."""
        c = self.config
        if timesteps is None:
            train = train or c.num_train_timesteps
            given = spacing.timesteps(c.timestep_spacing, steps, train, c.steps_offset, rounded=False)
        else:
            self._check_custom(timesteps, c.num_train_timesteps)
            self._refuse_custom("timesteps", *TRANSFORMS)
            given = np.array(timesteps)
        times: Array = given.astype(self._times_dtype)
        table = self._table()
        levels = self._interpolated(times, table)
        changed = self._transform(levels, steps)
        if changed is not None:
            levels, times = changed, spacing.sigma_to_t(changed, np.log(table))
        return np.append(levels, self._last_sigma()).astype(np.float32), times

    def _interpolated(self, times: Array, table: Array) -> Array:
        return np.interp(times, np.arange(len(table)), table)

    def _denoised(self, model_output: Tensor, sample: Tensor, sigma: float) -> Tensor:
        """The denoised estimate of an unscaled sample; shaped as ``sample``."""
        a, b = prediction.karras(self.config["prediction_type"], sigma)
        return model_output if a == 0 and b == 1 else combine((a, sample), (b, model_output))

    def _refuse_integer(self, timestep: Any) -> None:
        if isinstance(timestep, int) or (isinstance(timestep, Tensor) and not timestep.is_floating_point()):
            raise ValueError(
                f"timestep={timestep!r} is an integer, perhaps from `enumerate(timesteps)`; "
                f"{type(self).__name__}.step takes one of `scheduler.timesteps`"
            )

    def _remind(self) -> None:
        if not self.is_scale_input_called:
            logger.warning("%s.scale_model_input was not called before `step`; the network saw unscaled samples",
                           type(self).__name__)  # fmt: skip
            self.is_scale_input_called = True  # once is enough


def slope(sample: Tensor, x0: Tensor, sigma: float) -> Tensor:
    """``dx/dσ = (x - x_0) / σ``, eq. 3 of the paper for ``σ(t) = t``; a new tensor."""
    return torch.sub(sample, x0).div_(sigma)


def euler(sample: Tensor, x0: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """An Euler step ``x + (σ' - σ) dx/dσ``, which is an interpolation between ``x`` and ``x_0``; a new tensor."""
    return torch.lerp(sample, x0.to(sample.dtype), 1 - sigma_next / sigma)


def ancestral(sigma: float, sigma_next: float, eta: float = 1.0) -> tuple[float, float]:
    """``σ_down, σ_up``: how far to step down, and the noise to add to arrive at ``σ_next`` (DDPM's for ``eta = 1``)."""
    up = eta * max(sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2, 0.0) ** 0.5
    return max(sigma_next**2 - up**2, 0.0) ** 0.5, up
