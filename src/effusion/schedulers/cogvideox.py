"""CogVideoX: a schedule whose signal-to-noise ratio is shifted, and its two samplers (Yang et al. 2024)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..core.config import register_to_config
from ..core.random import Generators, randn_tensor
from .alpha import AlphaScheduler, denoise, root
from .base import KARRAS_COMPATIBLES, DenoisedOutput, Device, combine
from .noise import Array, NoiseSchedule, rescale_alpha_bar


class ShiftedScheduler(AlphaScheduler):
    """``ᾱ`` divided by ``s + (1 - s) ᾱ``: the signal-to-noise ratio divided by ``s``."""

    _compatibles = KARRAS_COMPATIBLES

    @register_to_config
    def __init__(
        self, num_train_timesteps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012,
        beta_schedule: str = "scaled_linear", trained_betas: Array | list[float] | None = None,
        clip_sample: bool = True, set_alpha_to_one: bool = True, steps_offset: int = 0,
        prediction_type: str = "epsilon", clip_sample_range: float = 1.0, sample_max_value: float = 1.0,
        timestep_spacing: str = "leading", rescale_betas_zero_snr: bool = False, snr_shift_scale: float = 3.0,
    ) -> None:  # fmt: skip
        self._train()

    def _train(self, dtype: torch.dtype = torch.float32) -> None:
        c = self.config
        precise = c.trained_betas is None and c.beta_schedule == "scaled_linear"
        schedule = NoiseSchedule.build(
            c.num_train_timesteps,
            c.beta_start,
            c.beta_end,
            c.beta_schedule,
            c.trained_betas,
            dtype=torch.float64 if precise else dtype,
        )
        bar = schedule.alphas_cumprod / (c.snr_shift_scale + (1 - c.snr_shift_scale) * schedule.alphas_cumprod)
        bar = rescale_alpha_bar(bar) if c.rescale_betas_zero_snr else bar
        self._take(NoiseSchedule(schedule.betas, schedule.alphas, bar))

    def set_timesteps(self, num_inference_steps: int, device: Device = None) -> None:
        """Begin a run of ``num_inference_steps`` steps."""
        times = self._spaced(num_inference_steps)
        self.num_inference_steps = num_inference_steps
        self._begin(times, None, device, torch.int64)

    def _step_between(self, timestep: Any) -> tuple[int, int]:
        self._check_run()
        assert self.num_inference_steps is not None
        t = int(self._time(timestep))
        return t, t - len(self) // self.num_inference_steps

    def _x0(self, model_output: Tensor, sample: Tensor, t: int) -> Tensor:
        self._check_shapes(model_output, sample)
        _, alpha, sigma = self._level(t)
        return denoise(self.config["prediction_type"], model_output, sample, float(alpha), float(sigma))


class CogVideoXDDIMScheduler(ShiftedScheduler):
    """Song et al. (2021), eq. 12, on CogVideoX's schedule; deterministic."""

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, eta: float = 0.0,
        use_clipped_model_output: bool = False, generator: Generators = None, variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> DenoisedOutput | tuple[Tensor, Tensor]:  # fmt: skip
        """The deterministic step from ``timestep`` (the options of DDIM are accepted); shapes ``(B, F, C, H, W)``."""
        t, t_prev = self._step_between(timestep)
        x0 = self._x0(model_output, sample, t)
        (bar, alpha, _), (bar_prev, alpha_prev, _) = self._level(t), self._level(t_prev)
        a = root((1 - bar_prev) / (1 - bar))
        prev_sample = combine((float(a), sample), (float(alpha_prev - alpha * a), x0))
        return DenoisedOutput(prev_sample, x0) if return_dict else (prev_sample, x0)


class CogVideoXDPMScheduler(ShiftedScheduler):
    """Lu et al. (2022), SDE-DPM-Solver++(2M), on CogVideoX's schedule; the caller keeps the last estimate."""

    def _lambda(self, t: int) -> float:
        bar = float(self._level(t)[0])
        if bar in (0.0, 1.0):
            return math.inf if bar else -math.inf
        return 0.5 * math.log(bar / (1 - bar))

    def step(
        self, model_output: Tensor, old_pred_original_sample: Tensor | None, timestep: Any, timestep_back: Any,
        sample: Tensor, eta: float = 0.0, use_clipped_model_output: bool = False, generator: Generators = None,
        variance_noise: Tensor | None = None, return_dict: bool = False,
    ) -> DenoisedOutput | tuple[Tensor, Tensor]:  # fmt: skip
        """The step from ``timestep``, of second order once there is an estimate; shapes ``(B, F, C, H, W)``.

        Args:
            old_pred_original_sample: the denoised estimate that the last step returned, ``None`` at first.
            timestep_back: the timestep of the last step, ``None`` at first.
        """
        t, t_prev = self._step_between(timestep)
        x0 = self._x0(model_output, sample, t)
        h = self._lambda(t_prev) - self._lambda(t)
        (bar, _, _), (bar_prev, alpha_prev, sigma_prev) = self._level(t), self._level(t_prev)
        a = float(root((1 - bar_prev) / (1 - bar))) * math.exp(-h)
        b = -math.expm1(-2 * h) * float(alpha_prev)
        noise_scale = float(sigma_prev) * (-math.expm1(-2 * h)) ** 0.5
        noise = randn_tensor(sample.shape, generator, sample.device, sample.dtype)
        terms = [(b, x0)]
        second = old_pred_original_sample is not None and t_prev >= 0
        if second:
            assert old_pred_original_sample is not None
            extra = h / (2 * (self._lambda(t) - self._lambda(int(self._time(timestep_back)))))
            terms = [(b * (1 + extra), x0), (-b * extra, old_pred_original_sample)]
            # the reference draws the noise of a first-order step before: the same seed gives the same video
            noise = randn_tensor(sample.shape, generator, sample.device, sample.dtype)
        prev_sample = combine((a, sample), *terms, (noise_scale, noise))
        return DenoisedOutput(prev_sample, x0) if return_dict and second else (prev_sample, x0)
