"""Consistency models: a network that jumps to the end of the trajectory, in one step or a few."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.config import register_to_config
from ..core.outputs import BaseOutput
from ..core.random import Generators, randn_tensor
from . import prediction, spacing
from .alpha import AlphaScheduler, root
from .base import Device, SchedulerOutput, combine, exactly_one, like, logger
from .karras import KarrasScheduler
from .noise import Array


@dataclass
class LCMSchedulerOutput(BaseOutput):
    """``prev_sample`` and ``denoised``, the consistency function's value; both shaped as the input."""

    prev_sample: Tensor
    denoised: Tensor | None = None


FlowMatchLCMSchedulerOutput = CMStochasticIterativeSchedulerOutput = SchedulerOutput


@dataclass
class TCDSchedulerOutput(BaseOutput):
    """``prev_sample`` and ``pred_noised_sample``, the jump before noise is added; both shaped as the input."""

    prev_sample: Tensor
    pred_noised_sample: Tensor | None = None


class DistilledScheduler(AlphaScheduler):
    """The timesteps of networks distilled along a coarser trajectory (``original_inference_steps``)."""

    custom_timesteps = False

    @register_to_config
    def __init__(
        self, num_train_timesteps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012,
        beta_schedule: str = "scaled_linear", trained_betas: Array | list[float] | None = None,
        original_inference_steps: int = 50, clip_sample: bool = False, clip_sample_range: float = 1.0,
        set_alpha_to_one: bool = True, steps_offset: int = 0, prediction_type: str = "epsilon",
        thresholding: bool = False, dynamic_thresholding_ratio: float = 0.995, sample_max_value: float = 1.0,
        timestep_spacing: str = "leading", timestep_scaling: float = 10.0, rescale_betas_zero_snr: bool = False,
    ) -> None:  # fmt: skip
        self._train()

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Device = None,
        original_inference_steps: int | None = None, timesteps: list[int] | None = None, strength: float = 1.0,
    ) -> None:  # fmt: skip
        """Begin a run of ``num_inference_steps`` steps out of the trajectory, or over descending ``timesteps``."""
        exactly_one(num_inference_steps=num_inference_steps, timesteps=timesteps)
        train = self.config.num_train_timesteps
        coarse = original_inference_steps or self.config.original_inference_steps
        if coarse > train:
            raise ValueError(f"original_inference_steps={coarse} is more than num_train_timesteps={train}")
        path = self._trajectory(original_inference_steps, strength)
        if timesteps is not None:
            self._check_custom(timesteps, train)
            strange = sorted(set(timesteps) - set(path.tolist()))
            if strange:
                logger.warning("timesteps %s are not among those that the network was distilled with", strange)
            self.num_inference_steps = len(timesteps)
            kept = min(int(len(timesteps) * strength), len(timesteps))
            times = np.array(timesteps, dtype=np.int64)[len(timesteps) - kept :]
        else:
            assert num_inference_steps is not None
            if not 1 <= num_inference_steps <= min(coarse, len(path)):
                raise ValueError(
                    f"num_inference_steps={num_inference_steps}, but original_inference_steps={coarse} at "
                    f"strength={strength} leaves {min(coarse, len(path))} timesteps; take fewer steps or raise those"
                )
            self.num_inference_steps = num_inference_steps
            indices = np.floor(np.linspace(0, len(path), num=num_inference_steps, endpoint=False)).astype(np.int64)
            times = path[::-1][indices]
        self.custom_timesteps = timesteps is not None
        self._begin(times, None, device, torch.int64)

    def _trajectory(self, original_inference_steps: int | None, strength: float) -> Array:
        """The rising timesteps that the network was distilled with."""
        coarse = original_inference_steps or self.config.original_inference_steps
        return np.asarray(np.arange(1, int(coarse * strength) + 1) * (self.config.num_train_timesteps // coarse) - 1)

    def previous_timestep(self, timestep: Any) -> int:
        """The timestep that a step from ``timestep`` leads to; -1 after the last."""
        t = int(self._time(timestep))
        if self.num_inference_steps is None:
            return t - 1
        i = self.index_for_timestep(t) + 1
        return int(self._list("timesteps")[i]) if i < len(self.timesteps) else -1


class LCMScheduler(DistilledScheduler):
    """Luo et al. (2023), "Latent Consistency Models": multistep consistency sampling, algorithm 3."""

    sigma_data = 0.5

    def get_scalings_for_boundary_condition_discrete(self, timestep: Any) -> tuple[Any, Any]:
        """``c_skip, c_out`` of eq. 9, which make the function the identity at ``t = 0``."""
        scaled = timestep * self.config["timestep_scaling"]
        norm = scaled**2 + self.sigma_data**2
        return self.sigma_data**2 / norm, scaled / norm**0.5

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, generator: Generators = None,
        return_dict: bool = True,
    ) -> LCMSchedulerOutput | tuple[Tensor, Tensor]:  # fmt: skip
        """Jump to the end, then add the noise of the next timestep; shapes ``(B, C, …)``."""
        i = self._enter(timestep, model_output, sample)
        times = self._list("timesteps")
        t = int(times[i])
        _, alpha, sigma = self._level(t)
        c_skip, c_out = self.get_scalings_for_boundary_condition_discrete(float(t))
        x0 = self._estimate(model_output, sample, alpha, sigma)
        denoised = combine((c_out, x0), (c_skip, sample))
        prev_sample = denoised
        if i != (self.num_inference_steps or 0) - 1:
            noise = randn_tensor(model_output.shape, generator, model_output.device, denoised.dtype)
            _, alpha_next, sigma_next = self._level(int(times[i + 1]))
            prev_sample = combine((float(alpha_next), denoised), (float(sigma_next), noise))
        self._advance()
        return LCMSchedulerOutput(prev_sample, denoised) if return_dict else (prev_sample, denoised)


class TCDScheduler(DistilledScheduler):
    """Zheng et al. (2024), "Trajectory Consistency Distillation": strategic stochastic sampling, algorithm 4."""

    def _trajectory(self, original_inference_steps: int | None, strength: float) -> Array:
        if original_inference_steps is None:
            return super()._trajectory(None, strength)
        return np.arange(int(self.config.num_train_timesteps * strength))

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, eta: float = 0.3, generator: Generators = None,
        return_dict: bool = True,
    ) -> TCDSchedulerOutput | tuple[Tensor, Tensor]:  # fmt: skip
        """Jump to timestep ``s = (1 - eta) t'``, then diffuse up to the next timestep ``t'``; shapes ``(B, C, …)``."""
        i = self._enter(timestep, model_output, sample)
        if not 0 <= eta <= 1:
            raise ValueError(f"eta={eta}: the share of stochasticity is between 0 and 1")
        times = self._list("timesteps")
        t, t_prev = int(times[i]), int(times[i + 1]) if i + 1 < len(times) else 0
        s = int(np.floor(np.float32(1 - eta) * np.float32(t_prev)))
        alpha, sigma = map(float, self._level(t)[1:])
        bar_s, alpha_s, sigma_s = self._level(s)
        alpha_s, sigma_s = float(alpha_s), float(sigma_s)
        kind = self.config["prediction_type"]
        (ax, am), (ex, em) = prediction.denoised(kind, alpha, sigma), prediction.noise(kind, alpha, sigma)
        noised = combine((alpha_s * ax + sigma_s * ex, sample), (alpha_s * am + sigma_s * em, model_output))
        prev_sample = noised
        if eta > 0 and i != (self.num_inference_steps or 0) - 1:
            noise = randn_tensor(model_output.shape, generator, model_output.device, noised.dtype)
            ratio = self._level(t_prev)[0] / bar_s
            prev_sample = combine((float(root(ratio)), noised), (float(root(type(ratio)(1) - ratio)), noise))
        self._advance()
        return TCDSchedulerOutput(prev_sample, noised) if return_dict else (prev_sample, noised)


class CMStochasticIterativeScheduler(KarrasScheduler):
    """Song et al. (2023), "Consistency Models": multistep consistency sampling, algorithm 1."""

    @register_to_config
    def __init__(
        self, num_train_timesteps: int = 40, sigma_min: float = 0.002, sigma_max: float = 80.0,
        sigma_data: float = 0.5, s_noise: float = 1.0, rho: float = 7.0, clip_denoised: bool = True,
    ) -> None:  # fmt: skip
        self._lay_out(np.linspace(0, 1, num_train_timesteps), None)
        self.custom_timesteps = False

    @property
    def init_noise_sigma(self) -> float:
        return float(self.config.sigma_max)

    def _lay_out(self, ramp: Array, device: Device) -> None:
        c = self.config
        low, high = c.sigma_min ** (1 / c.rho), c.sigma_max ** (1 / c.rho)
        sigmas = (high + ramp * (low - high)) ** c.rho
        self._begin(self.sigma_to_t(sigmas), np.append(sigmas, c.sigma_min), device, torch.float64)

    def sigma_to_t(self, sigmas: Any) -> Array:
        """What the network is called with for a noise level: ``250 log σ``."""
        return np.asarray(1000 * 0.25 * np.log(np.asarray(sigmas, dtype=np.float64) + 1e-44))

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Device = None, timesteps: list[int] | None = None,
    ) -> None:  # fmt: skip
        """Begin a run of ``num_inference_steps`` steps, or over descending indices into the training schedule."""
        exactly_one(num_inference_steps=num_inference_steps, timesteps=timesteps)
        train = self.config.num_train_timesteps
        if timesteps is not None:
            self._check_custom(timesteps, train)
            indices = np.array(timesteps, dtype=np.int64)
            self.num_inference_steps = len(timesteps)
        else:
            assert num_inference_steps is not None
            indices = spacing.timesteps("leading", num_inference_steps, train)
            self.num_inference_steps = num_inference_steps
        self.custom_timesteps = timesteps is not None
        self._lay_out(indices[::-1] / (train - 1), device)

    def scale_model_input(self, sample: Tensor, timestep: Any) -> Tensor:  # type: ignore[override]
        """``c_in`` of Karras et al. (2022): divide by the standard deviation of the noisy sample."""
        sigma = self._sigma(timestep)
        return torch.div(sample, (sigma * sigma + self.config.sigma_data**2) ** 0.5)

    def get_scalings(self, sigma: Any) -> tuple[Any, Any]:
        """``c_skip, c_out`` of Karras et al. (2022)."""
        variance = self.config.sigma_data**2
        return variance / (sigma**2 + variance), sigma * variance**0.5 / (sigma**2 + variance) ** 0.5

    def get_scalings_for_boundary_condition(self, sigma: Any) -> tuple[Any, Any]:
        """``c_skip, c_out`` that make the function the identity at ``sigma_min``."""
        variance, above = self.config.sigma_data**2, sigma - self.config.sigma_min
        return variance / (above**2 + variance), above * variance**0.5 / (sigma**2 + variance) ** 0.5

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, generator: Generators = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:  # fmt: skip
        """Jump to the end, then add the noise of the next level; shapes ``(B, C, …)``."""
        i = self._enter(timestep, model_output, sample)
        c, sigmas = self.config, self._list("sigmas")
        c_skip, c_out = self.get_scalings_for_boundary_condition(sigmas[i])
        prev_sample = combine((c_out, model_output), (c_skip, sample))
        if c.clip_denoised:
            prev_sample.clamp_(-1, 1)
        if len(self.timesteps) > 1:
            noise = randn_tensor(model_output.shape, generator, model_output.device, model_output.dtype)
            sigma = min(max(sigmas[i + 1], c.sigma_min), c.sigma_max)
            prev_sample.add_(noise, alpha=c.s_noise * max(sigma**2 - c.sigma_min**2, 0.0) ** 0.5)
        self._advance()
        return SchedulerOutput(prev_sample) if return_dict else (prev_sample,)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """``x_0 + σ ε``; samples ``(B, …)``, timesteps ``(B,)`` of this run."""
        sigma = self._near("sigmas", original_samples)[self._positions(timesteps)]
        return original_samples + noise * like(sigma, original_samples)
