"""Base of the solvers that work with noise levels σ of a network trained on ᾱ_t."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import prediction, spacing
from .base import SchedulerMixin, at_most_one, one_of
from .noise import Array, NoiseSchedule

# the smallest ᾱ that solvers get which divide by it: the square of float16's smallest normal number
SMALLEST_ALPHA_BAR = 2**-24
TRANSFORMS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")


class SigmaScheduler(SchedulerMixin):
    """A scheduler over noise-to-signal ratios ``σ = sqrt((1 - ᾱ) / ᾱ)``, and transforms of them."""

    betas: Tensor
    alphas: Tensor
    alphas_cumprod: Tensor
    _predictions: tuple[str, ...] = prediction.KINDS[:3]
    _exclusive: tuple[str, ...] = (*TRANSFORMS, "use_lu_lambdas", "use_flow_sigmas")

    def _train(self) -> None:
        """Check the options that all of these have, and make the training schedule."""
        c = self.config
        at_most_one(**{name: c.get(name) for name in self._exclusive})
        prediction.check(c.prediction_type, self._predictions, type(self).__name__)
        if "final_sigmas_type" in c:
            one_of("final_sigmas_type", c.final_sigmas_type, ("zero", "sigma_min"))
        schedule = NoiseSchedule.build(
            c.num_train_timesteps,
            c.beta_start,
            c.beta_end,
            c.beta_schedule,
            c.trained_betas,
            c.get("rescale_betas_zero_snr", False),
            last_alpha_bar=SMALLEST_ALPHA_BAR,
        )
        self.betas, self.alphas, self.alphas_cumprod = schedule.betas, schedule.alphas, schedule.alphas_cumprod
        self.num_inference_steps = None

    def _table(self) -> Array:
        """The noise level of every training timestep, rising; float32 ``(T,)``."""
        bar = self.alphas_cumprod
        return np.asarray((((1 - bar) / bar) ** 0.5).cpu().numpy())

    def _refuse_custom(self, what: str, *flags: str) -> None:
        """Raise :class:`ValueError` when a given run contradicts an option that makes one."""
        for flag in flags:
            if self.config.get(flag):
                raise ValueError(f"`{what}` and the option `{flag}=True` contradict each other: use only one of them")

    def _transform(self, levels: Array, steps: int) -> Array | None:
        """The descending ``levels`` replaced as the configuration says, ``(steps,)``; ``None`` if it says nothing."""
        c = self.config
        low, high = c.get("sigma_min"), c.get("sigma_max")
        low = float(levels[-1]) if low is None else low
        high = float(levels[0]) if high is None else high
        if c.get("use_karras_sigmas"):
            return spacing.karras(low, high, steps)
        if c.get("use_exponential_sigmas"):
            return spacing.exponential(low, high, steps)
        if c.get("use_beta_sigmas"):
            return spacing.beta(low, high, steps)
        return None

    def _last_sigma(self) -> float:
        """The noise level that a run ends at."""
        return float(self._table()[0]) if self.config.get("final_sigmas_type") == "sigma_min" else 0.0

    def _sigma(self, timestep: Any) -> float:
        """The noise level of this step; finds out where the run begins, if it has not begun."""
        if self._step_index is None:
            self._init_step_index(timestep)
        assert self._step_index is not None
        return self._list("sigmas")[self._step_index]


def upcast(sample: Tensor) -> Tensor:
    """``sample`` in at least float32: half precision loses what small steps add."""
    return sample if sample.dtype in (torch.float32, torch.float64) else sample.to(torch.float32)
