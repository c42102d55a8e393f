"""Ramesh et al. (2022), "Hierarchical Text-Conditional Image Generation with CLIP Latents": Karlo's sampler."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.config import register_to_config
from ..core.random import Generators, randn_tensor
from . import prediction
from .alpha import AlphaScheduler
from .base import DenoisedOutput, Device, combine, one_of
from .noise import NoiseSchedule, betas_for_alpha_bar

UnCLIPSchedulerOutput = DenoisedOutput


class UnCLIPScheduler(AlphaScheduler):
    """DDPM's ancestral sampling on a cosine schedule, from first to last timestep in even strides."""

    _predictions = ("epsilon", "sample")

    @register_to_config
    def __init__(
        self, num_train_timesteps: int = 1000, variance_type: str = "fixed_small_log", clip_sample: bool = True,
        clip_sample_range: float | None = 1.0, prediction_type: str = "epsilon",
        beta_schedule: str = "squaredcos_cap_v2",
    ) -> None:  # fmt: skip
        one_of("beta_schedule", beta_schedule, ("squaredcos_cap_v2",))
        one_of("variance_type", variance_type, ("fixed_small_log", "learned_range"))
        prediction.check(prediction_type, self._predictions, type(self).__name__)
        betas = betas_for_alpha_bar(num_train_timesteps)
        self._take(NoiseSchedule(betas, 1.0 - betas, torch.cumprod(1.0 - betas, dim=0)))
        self.one = torch.tensor(1.0)
        self.variance_type = variance_type

    def set_timesteps(self, num_inference_steps: int, device: Device = None) -> None:
        """Begin a run of ``num_inference_steps`` steps, at least 2."""
        if not 2 <= num_inference_steps <= len(self):
            raise ValueError(f"num_inference_steps={num_inference_steps}: choose 2 to {len(self)}")
        self.num_inference_steps = num_inference_steps
        times = (np.arange(num_inference_steps) * ((len(self) - 1) / (num_inference_steps - 1))).round()
        self._begin(times[::-1], None, device, torch.int64)

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, prev_timestep: Any = None,
        generator: Generators = None, return_dict: bool = True,
    ) -> DenoisedOutput | tuple[Tensor, Tensor]:  # fmt: skip
        """One ancestral step to ``prev_timestep`` (or the one before); shapes ``(B, C, …)``.

        With ``variance_type="learned_range"`` the model output may have twice the channels, variance last.
        """
        predicted: Tensor | None = None
        if self.variance_type == "learned_range" and model_output.shape[1] == 2 * sample.shape[1]:
            model_output, predicted = torch.split(model_output, sample.shape[1], dim=1)
        self._check_shapes(model_output, sample)
        t = int(self._time(timestep))
        t_prev = t - 1 if prev_timestep is None else int(self._time(prev_timestep))
        (bar, root, sigma), (bar_prev, root_prev, _) = self._level(t), self._level(t_prev)
        one = type(bar)(1)
        beta = type(bar)(self._beta(t, t_prev, bar, bar_prev))
        x0 = self._estimate(model_output, sample, root, sigma)
        kept = float(np.sqrt(one - beta) * (one - bar_prev) / (one - bar))
        prev_sample = combine((float(root_prev * beta / (one - bar)), x0), (kept, sample))
        if t > 0:
            noise = randn_tensor(model_output.shape, generator, model_output.device, model_output.dtype)
            small = (one - bar_prev) / (one - bar) * beta
            self._add_variance(prev_sample, noise, small, beta, predicted)
        return DenoisedOutput(prev_sample, x0) if return_dict else (prev_sample, x0)

    def _beta(self, t: int, t_prev: int, bar: Any, bar_prev: Any) -> Any:
        return self._list("betas")[t] if t_prev == t - 1 else type(bar)(1) - bar / bar_prev

    def _add_variance(
        self, prev_sample: Tensor, noise: Tensor, small: Any, beta: Any, predicted: Tensor | None
    ) -> None:
        if self.variance_type == "fixed_small_log":
            log = np.log(np.maximum(small, type(small)(1e-20)))
            prev_sample.add_(noise, alpha=float(np.exp(type(small)(0.5) * log)))
            return
        if predicted is None:
            raise ValueError("variance_type='learned_range' needs a model output with twice the channels of the sample")
        fraction = (predicted + 1) / 2
        log_variance = fraction * float(np.log(beta)) + (1 - fraction) * float(np.log(small))
        prev_sample.add_((0.5 * log_variance).exp_().mul_(noise))
