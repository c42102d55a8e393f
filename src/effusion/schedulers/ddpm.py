"""Ho et al. (2020), "Denoising Diffusion Probabilistic Models": ancestral sampling, algorithm 2."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..core.config import register_to_config
from ..core.random import Generators, randn_tensor
from . import prediction
from .alpha import AlphaScheduler
from .base import KARRAS_COMPATIBLES, DenoisedOutput, Device, combine, exactly_one, like, one_of
from .noise import Array

DDPMSchedulerOutput = DDPMParallelSchedulerOutput = DenoisedOutput
VarianceType = Literal["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range"]
VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range")


class DDPMScheduler(AlphaScheduler):
    """Ho et al. (2020), algorithm 2, with the variances of Nichol & Dhariwal (2021)."""

    _compatibles = KARRAS_COMPATIBLES

    @register_to_config
    def __init__(
        self, num_train_timesteps: int = 1000, beta_start: float = 0.0001, beta_end: float = 0.02,
        beta_schedule: str = "linear", trained_betas: Array | list[float] | None = None,
        variance_type: VarianceType = "fixed_small", clip_sample: bool = True, prediction_type: str = "epsilon",
        thresholding: bool = False, dynamic_thresholding_ratio: float = 0.995, clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0, timestep_spacing: str = "leading", steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
    ) -> None:  # fmt: skip
        one_of("variance_type", variance_type, VARIANCES)
        self._train()
        self.one = torch.tensor(1.0)
        self.variance_type = variance_type
        self.custom_timesteps = False

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Device = None, timesteps: list[int] | None = None,
    ) -> None:  # fmt: skip
        """Begin a run of ``num_inference_steps`` steps, or over the given descending ``timesteps``."""
        exactly_one(num_inference_steps=num_inference_steps, timesteps=timesteps)
        if timesteps is not None:
            self._check_custom(timesteps, self.config.num_train_timesteps)
            times = np.array(timesteps, dtype=np.int64)
        else:
            assert num_inference_steps is not None
            times = self._spaced(num_inference_steps)
            self.num_inference_steps = num_inference_steps
        self.custom_timesteps = timesteps is not None
        self._begin(times, None, device, torch.int64)
        visited = self._list("timesteps")
        self._next = dict(zip(visited, [*visited[1:], -1], strict=True))

    def previous_timestep(self, timestep: Any) -> int:
        """The timestep that a step from ``timestep`` leads to; -1 after the last."""
        t = int(self._time(timestep))
        if not (self.custom_timesteps or self.num_inference_steps):
            return t - 1
        if t not in self._next:
            return int(self._index_of_unknown(t))
        return int(self._next[t])

    def _get_variance(self, t: Any, predicted_variance: Tensor | None = None, variance_type: str | None = None) -> Any:
        """The variance (or its logarithm, or the deviation, as the type says) of the step from ``t``."""
        t = int(self._time(t))
        _, beta, small = self._posterior(self._level(t)[0], self._level(self.previous_timestep(t))[0])
        kind = variance_type or self.variance_type
        if kind == "fixed_small":
            return small
        if kind == "fixed_small_log":
            return np.exp(type(small)(0.5) * np.log(small))
        if kind == "fixed_large":
            return beta
        if kind == "fixed_large_log":
            return np.log(beta)
        if predicted_variance is None or kind == "learned":
            return predicted_variance
        fraction = (predicted_variance + 1) / 2
        return fraction * float(np.log(beta)) + (1 - fraction) * float(np.log(small))

    @staticmethod
    def _posterior(bar: Any, bar_prev: Any) -> tuple[Any, Any, Any]:
        """α_t, β_t and the posterior variance β̃_t (eq. 7) of a step between two ᾱ."""
        one = type(bar)(1)
        alpha = bar / bar_prev
        beta = one - alpha
        return alpha, beta, np.maximum((one - bar_prev) / (one - bar) * beta, type(bar)(1e-20))

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, generator: Generators = None,
        return_dict: bool = True,
    ) -> DenoisedOutput | tuple[Tensor, Tensor]:  # fmt: skip
        """One ancestral step, eq. 6 and 7; shapes ``(B, C, …)``, the output of twice the channels with its variance.

        Raises:
            ValueError: a timestep that is not in the run, shapes that differ.
        """
        model_output, predicted_variance = self._split(model_output, sample)
        t = int(self._time(timestep))
        (bar, root, sigma), (bar_prev, root_prev, _) = self._level(t), self._level(self.previous_timestep(t))
        one = type(bar)(1)
        alpha, beta, _ = self._posterior(bar, bar_prev)
        x0 = self._estimate(model_output, sample, root, sigma)
        mean_x0 = float(root_prev * beta / (one - bar))
        mean_x = float(np.sqrt(alpha) * (one - bar_prev) / (one - bar))
        prev_sample = combine((mean_x0, x0), (mean_x, sample))
        if t > 0:
            noise = randn_tensor(model_output.shape, generator, model_output.device, model_output.dtype)
            self._add_variance(prev_sample, noise, t, predicted_variance)
        return DenoisedOutput(prev_sample, x0) if return_dict else (prev_sample, x0)

    def _split(self, model_output: Tensor, sample: Tensor) -> tuple[Tensor, Tensor | None]:
        learned = self.variance_type in ("learned", "learned_range")
        if learned and model_output.shape[1] == sample.shape[1] * 2:
            model_output, variance = torch.split(model_output, sample.shape[1], dim=1)
            return model_output, variance
        self._check_shapes(model_output, sample)
        return model_output, None

    def _add_variance(self, prev_sample: Tensor, noise: Tensor, t: int, predicted: Tensor | None) -> None:
        if predicted is None and self.variance_type in ("learned", "learned_range"):
            raise ValueError(
                f"variance_type={self.variance_type!r} needs a model output with twice the channels of the sample"
            )
        variance = self._get_variance(t, predicted)
        if self.variance_type == "fixed_small_log":  # it is the deviation already
            prev_sample.add_(noise, alpha=float(variance))
        elif self.variance_type == "learned_range":
            prev_sample.add_(torch.exp(0.5 * variance).mul_(noise))
        elif isinstance(variance, Tensor):
            prev_sample.add_((variance**0.5).mul_(noise))
        else:
            prev_sample.add_(noise, alpha=float(np.sqrt(variance)))


class DDPMParallelScheduler(DDPMScheduler):
    """DDPM for Picard iteration over all timesteps at once: Shih et al. (2023), "Parallel Sampling"."""

    _is_ode_scheduler = False

    def batch_step_no_noise(self, model_output: Tensor, timesteps: Tensor, sample: Tensor) -> Tensor:
        """The mean of the step of each item of the batch from its own timestep ``(B,)``."""
        model_output, _ = self._split(model_output, sample)
        stride = self.config.num_train_timesteps // (self.num_inference_steps or self.config.num_train_timesteps)
        table = self.alphas_cumprod.to(sample.device)
        before = timesteps - stride
        bar = like(table[timesteps], sample)
        bar_prev = like(torch.where(before < 0, torch.ones_like(table[0]), table[before.clip(min=0)]), sample)
        alpha = bar / bar_prev
        x0 = self._restricted(model_output, sample, bar)
        return bar_prev**0.5 * (1 - alpha) / (1 - bar) * x0 + alpha**0.5 * (1 - bar_prev) / (1 - bar) * sample

    def _restricted(self, model_output: Tensor, sample: Tensor, bar: Tensor) -> Tensor:
        c = self.config
        x0 = prediction.to_denoised(c.prediction_type, model_output, sample, bar**0.5, (1 - bar) ** 0.5)
        if c.thresholding:
            return prediction.threshold(x0, c.dynamic_thresholding_ratio, c.sample_max_value)
        return x0.clamp(-c.clip_sample_range, c.clip_sample_range) if c.clip_sample else x0
