"""Song et al. (2021), "Score-Based Generative Modeling through SDEs": the variance-exploding process."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.config import register_to_config
from ..core.outputs import BaseOutput
from ..core.random import Generators, randn_tensor
from .base import Device, SchedulerMixin, SchedulerOutput, like


@dataclass
class SdeVeOutput(BaseOutput):
    """``prev_sample`` and ``prev_sample_mean``, the same without its noise; both shaped as the input."""

    prev_sample: Tensor
    prev_sample_mean: Tensor


class ScoreSdeVeScheduler(SchedulerMixin):
    """Reverse-diffusion predictor and Langevin corrector: algorithms 2 and 4 of the paper."""

    discrete_sigmas: Tensor

    @register_to_config
    def __init__(
        self, num_train_timesteps: int = 2000, snr: float = 0.15, sigma_min: float = 0.01, sigma_max: float = 1348.0,
        sampling_eps: float = 1e-5, correct_steps: int = 1,
    ) -> None:  # fmt: skip
        self.set_sigmas(num_train_timesteps)
        self.num_inference_steps = None

    @property
    def init_noise_sigma(self) -> float:
        return float(self.config.sigma_max)

    def set_timesteps(self, num_inference_steps: int, sampling_eps: float | None = None, device: Device = None) -> None:
        """Begin a run over ``num_inference_steps`` times from 1 to ``sampling_eps``."""
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps={num_inference_steps}: take at least one step")
        end = self.config.sampling_eps if sampling_eps is None else sampling_eps
        self.num_inference_steps = num_inference_steps
        self._begin(torch.linspace(1, end, num_inference_steps), None, device, torch.float32)

    def set_sigmas(
        self, num_inference_steps: int, sigma_min: float | None = None, sigma_max: float | None = None,
        sampling_eps: float | None = None,
    ) -> None:  # fmt: skip
        """Set the noise levels: a geometric progression with a level per step."""
        low = self.config.sigma_min if sigma_min is None else sigma_min
        high = self.config.sigma_max if sigma_max is None else sigma_max
        if not hasattr(self, "timesteps"):
            self.set_timesteps(num_inference_steps, sampling_eps)
        self.discrete_sigmas = torch.linspace(math.log(low), math.log(high), num_inference_steps).exp()
        self.sigmas = torch.tensor([low * (high / low) ** t for t in self._list("timesteps")])

    def get_adjacent_sigma(self, timesteps: Tensor, t: Tensor) -> Tensor:
        """The level below that of each index, 0 below the lowest; ``(B,)``."""
        below = self.discrete_sigmas.to(timesteps.device)[timesteps - 1]
        return torch.where(timesteps == 0, torch.zeros_like(t.to(timesteps.device)), below)

    def step_pred(
        self, model_output: Tensor, timestep: Any, sample: Tensor, generator: Generators = None,
        return_dict: bool = True,
    ) -> SdeVeOutput | tuple[Tensor, Tensor]:  # fmt: skip
        """The predictor: a reverse-diffusion step along the score ``model_output``; shapes ``(B, C, …)``."""
        self._check_run()
        self._check_shapes(model_output, sample)
        t = timestep * torch.ones(sample.shape[0], device=sample.device)
        index = (t * (len(self.timesteps) - 1)).long()
        levels = self._near("discrete_sigmas", t)
        below = torch.where(index == 0, torch.zeros_like(t), levels[index - 1])
        diffusion = like((levels[index] ** 2 - below**2) ** 0.5, sample)
        noise = randn_tensor(sample.shape, generator, sample.device, sample.dtype)
        mean = sample + diffusion**2 * model_output
        prev_sample = mean + diffusion * noise
        return SdeVeOutput(prev_sample, mean) if return_dict else (prev_sample, mean)

    def step_correct(
        self, model_output: Tensor, sample: Tensor, generator: Generators = None, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor]:
        """The corrector: a Langevin step whose size gives the signal-to-noise ratio ``snr``; shapes ``(B, C, …)``."""
        self._check_run()
        self._check_shapes(model_output, sample)
        noise = randn_tensor(sample.shape, generator).to(sample.device)
        norms = [torch.norm(v.reshape(v.shape[0], -1), dim=-1).mean() for v in (noise, model_output)]
        size = (self.config.snr * norms[0] / norms[1]) ** 2 * 2
        prev_sample = sample + size * model_output + (size * 2) ** 0.5 * noise
        return SchedulerOutput(prev_sample) if return_dict else (prev_sample,)

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """There is no single step: raise :class:`ValueError` that says what to call."""
        raise ValueError(
            "ScoreSdeVeScheduler has no `step`: call `step_correct` config.correct_steps times, then `step_pred`"
        )

    def add_noise(self, original_samples: Tensor, noise: Tensor | None, timesteps: Tensor) -> Tensor:
        """``x_0 + σ ε``; samples ``(B, …)``, ``timesteps`` indices of levels ``(B,)``."""
        noise = torch.randn_like(original_samples) if noise is None else noise
        sigma = self._near("discrete_sigmas", original_samples)[timesteps.to(original_samples.device)]
        return original_samples + like(sigma, original_samples) * noise
