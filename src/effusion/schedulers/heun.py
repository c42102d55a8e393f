"""Solvers of second order that call the network twice a step: Heun, midpoint, and their stochastic kin."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.config import register_to_config
from ..core.random import Generators, randn_tensor
from . import spacing
from .base import KARRAS_COMPATIBLES, DenoisedOutput, Device, exactly_one
from .brownian import BrownianNoise
from .karras import KarrasScheduler, ancestral, euler, slope
from .noise import Array

HeunDiscreteSchedulerOutput = KDPM2DiscreteSchedulerOutput = DenoisedOutput
KDPM2AncestralDiscreteSchedulerOutput = DPMSolverSDESchedulerOutput = DenoisedOutput


def doubled(levels: Array) -> Array:
    """Each inner level twice, for the two calls of a step: ``(S + 1,) -> (2 S,)``."""
    return np.concatenate([levels[:1], levels[1:-1].repeat(2), levels[-1:]])


def thrice(levels: Tensor) -> Tensor:
    """Each level after the first twice, the last three times: ``(S + 1,) -> (2 S + 2,)``."""
    return torch.cat([levels[:1], levels[1:].repeat_interleave(2), levels[-1:]])


class TwoStageScheduler(KarrasScheduler):
    """A solver whose steps have two stages; ``sample`` holds where the step began, between them."""

    order = 2
    sample: Tensor | None = None

    @property
    def state_in_first_order(self) -> bool:
        """Whether the next call is the first of its step."""
        return self.sample is None

    def _sigma(self, timestep: Any) -> float:
        sigma = super()._sigma(timestep)
        return sigma if self.sample is None else self._inner_sigma()

    def _inner_sigma(self) -> float:
        """The noise level that the second stage calls the network at."""
        assert self._step_index is not None
        return self._list("sigmas")[self._step_index]

    def _stage(self, i: int) -> tuple[float, float]:
        """The noise levels that the step goes between."""
        sigmas = self._list("sigmas")
        return (sigmas[i], sigmas[i + 1]) if self.sample is None else (sigmas[i - 1], sigmas[i])


class HeunDiscreteScheduler(TwoStageScheduler):
    """Karras et al. (2022), algorithm 1: Heun's method."""

    _compatibles = KARRAS_COMPATIBLES

    @register_to_config
    def __init__(
        self, num_train_timesteps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012,
        beta_schedule: str = "linear", trained_betas: Array | list[float] | None = None,
        prediction_type: str = "epsilon", use_karras_sigmas: bool = False, use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False, clip_sample: bool = False, clip_sample_range: float = 1.0,
        timestep_spacing: str = "linspace", steps_offset: int = 0,
    ) -> None:  # fmt: skip
        self._train()
        self.set_timesteps(num_train_timesteps)
        self.num_inference_steps = None

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Device = None, num_train_timesteps: int | None = None,
        timesteps: list[int] | None = None,
    ) -> None:  # fmt: skip
        """Begin a run of ``num_inference_steps`` steps (of two calls each), or over descending ``timesteps``."""
        exactly_one(num_inference_steps=num_inference_steps, timesteps=timesteps)
        steps = num_inference_steps or len(timesteps or ())
        levels, times = self._levels(steps, timesteps, num_train_timesteps)
        self.num_inference_steps = steps
        self._begin(np.append(times[:1], times[1:].repeat(2)), doubled(levels), device, torch.float32)
        self.sample = None
        self.prev_derivative: Tensor | None = None
        self.dt: float | None = None

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True
    ) -> DenoisedOutput | tuple[Tensor, Tensor]:
        """A stage: an Euler step, or the correction of it with the mean slope; shapes ``(B, C, …)``."""
        i, c = self._enter(timestep, model_output, sample), self.config
        first = self.sample is None
        sigma, sigma_next = self._stage(i)
        here = sigma if first else sigma_next
        x0 = self._denoised(model_output, sample, here)
        if c["clip_sample"]:
            x0 = x0.clamp(-c["clip_sample_range"], c["clip_sample_range"])
        derivative = slope(sample, x0, here)
        if first:
            self.sample, self.prev_derivative, self.dt = sample, derivative, sigma_next - sigma
            prev_sample = torch.add(sample, derivative, alpha=self.dt)
        else:
            assert self.sample is not None
            assert self.prev_derivative is not None
            assert self.dt is not None
            prev_sample = torch.add(self.sample, derivative.add_(self.prev_derivative), alpha=self.dt / 2)
            self.sample, self.prev_derivative, self.dt = None, None, None
        self._advance()
        return DenoisedOutput(prev_sample, x0) if return_dict else (prev_sample, x0)


class MidpointScheduler(TwoStageScheduler):
    """Steps by the slope in the middle (in log σ), as DPM-Solver-2 of k-diffusion."""

    _compatibles = KARRAS_COMPATIBLES
    _predictions = ("epsilon", "v_prediction")

    @register_to_config
    def __init__(
        self, num_train_timesteps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012,
        beta_schedule: str = "linear", trained_betas: Array | list[float] | None = None,
        use_karras_sigmas: bool = False, use_exponential_sigmas: bool = False, use_beta_sigmas: bool = False,
        prediction_type: str = "epsilon", timestep_spacing: str = "linspace", steps_offset: int = 0,
    ) -> None:  # fmt: skip
        self._train()
        self.set_timesteps(num_train_timesteps)
        self.num_inference_steps = None

    def set_timesteps(
        self, num_inference_steps: int, device: Device = None, num_train_timesteps: int | None = None
    ) -> None:
        """Begin a run of ``num_inference_steps`` steps of two calls each (the last has one)."""
        levels, times = self._levels(num_inference_steps, None, num_train_timesteps)
        if self.config.use_karras_sigmas:
            times = times.round()
        self.num_inference_steps = num_inference_steps
        self.log_sigmas = torch.from_numpy(np.log(self._table())).to(device)
        self.sample = None
        self._lay_out(torch.from_numpy(levels), times, device)

    def _lay_out(self, sigmas: Tensor, times: Array, device: Device) -> None:
        raise NotImplementedError

    def _interleave(self, middle: Tensor, times: Array, sigmas: Tensor, device: Device) -> None:
        """Lay out the run: each timestep after the first follows that of the middle before it."""
        between = spacing.sigma_to_t(middle.numpy(), np.log(self._table()))[: len(times) - 1]
        mixed = np.append(times[:1], np.stack([between, times[1:]], axis=-1).flatten())
        self._begin(mixed, thrice(sigmas), device, torch.float32 if times.dtype == np.float32 else torch.float64)

    def _second_stage(
        self, model_output: Tensor, x: Tensor, sigma: float, middle: float, end: float
    ) -> tuple[Tensor, Tensor]:
        """``x_0`` at the middle, and the step from the start with the slope there."""
        assert self.sample is not None
        x0 = self._denoised(model_output, x, middle)
        prev_sample = torch.add(self.sample, slope(x, x0, middle), alpha=end - sigma)
        self.sample = None
        return x0, prev_sample


class KDPM2DiscreteScheduler(MidpointScheduler):
    """Karras et al. (2022) with midpoint steps in log σ: DPM-Solver-2 of Lu et al. (2022) as in k-diffusion."""

    def _lay_out(self, sigmas: Tensor, times: Array, device: Device) -> None:
        before = sigmas.roll(1)
        middle = sigmas.log().lerp(before.log(), 0.5).exp()  # (S + 1,), entry i between levels i - 1 and i
        self._interleave(middle[1:], times, sigmas, device)
        self.sigmas_interpol = thrice(middle)

    def _inner_sigma(self) -> float:
        assert self._step_index is not None
        return self._list("sigmas_interpol")[self._step_index]

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True
    ) -> DenoisedOutput | tuple[Tensor, Tensor]:
        """A stage: to the middle, or the whole step with the slope there; shapes ``(B, C, …)``."""
        i = self._enter(timestep, model_output, sample)
        middles = self._list("sigmas_interpol")
        sigma, sigma_next = self._stage(i)
        if self.sample is None:
            x0 = self._denoised(model_output, sample, sigma)
            prev_sample = euler(sample, x0, sigma, middles[i + 1])
            self.sample = sample
        else:
            x0, prev_sample = self._second_stage(model_output, sample, sigma, middles[i], sigma_next)
        self._advance()
        return DenoisedOutput(prev_sample, x0) if return_dict else (prev_sample, x0)


class KDPM2AncestralDiscreteScheduler(MidpointScheduler):
    """Midpoint steps to a lower level than the next, and new noise up to it: DPM2 a of k-diffusion."""

    def _lay_out(self, sigmas: Tensor, times: Array, device: Device) -> None:
        after = torch.cat([sigmas[1:], sigmas.new_zeros(1)])
        up = (after**2 * (sigmas**2 - after**2) / sigmas**2) ** 0.5
        down = (after**2 - up**2) ** 0.5
        down[-1] = 0.0
        middle = sigmas.log().lerp(down.log(), 0.5).exp()  # (S + 1,), entry i below level i
        middle[-2:] = 0.0
        self._interleave(middle, times, sigmas, device)
        self.sigmas_interpol, self.sigmas_up, self.sigmas_down = thrice(middle), thrice(up), thrice(down)

    def _inner_sigma(self) -> float:
        assert self._step_index is not None
        return self._list("sigmas_interpol")[self._step_index - 1]

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, generator: Generators = None,
        return_dict: bool = True,
    ) -> DenoisedOutput | tuple[Tensor, Tensor]:  # fmt: skip
        """A stage: to the middle, or the whole step with the slope there and new noise; shapes ``(B, C, …)``."""
        i = self._enter(timestep, model_output, sample)
        sigma, _ = self._stage(i)
        middles = self._list("sigmas_interpol")
        if self.sample is None:
            x0 = self._denoised(model_output, sample, sigma)
            prev_sample = euler(sample, x0, sigma, middles[i])
            self.sample = sample
        else:
            down, up = self._list("sigmas_down")[i - 1], self._list("sigmas_up")[i - 1]
            x0, prev_sample = self._second_stage(model_output, sample, sigma, middles[i - 1], down)
            noise = randn_tensor(model_output.shape, generator, model_output.device, model_output.dtype)
            prev_sample.add_(noise, alpha=up)
        self._advance()
        return DenoisedOutput(prev_sample, x0) if return_dict else (prev_sample, x0)


class DPMSolverSDEScheduler(TwoStageScheduler):
    """DPM++ SDE of k-diffusion: two ancestral half steps of DPM-Solver++ with the noise of one Brownian path."""

    _compatibles = KARRAS_COMPATIBLES
    _predictions = ("epsilon", "v_prediction")
    _times_dtype = np.float64
    noise_sampler: BrownianNoise | None

    @register_to_config
    def __init__(
        self, num_train_timesteps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012,
        beta_schedule: str = "linear", trained_betas: Array | list[float] | None = None,
        prediction_type: str = "epsilon", use_karras_sigmas: bool = False, use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False, noise_sampler_seed: int | None = None, timestep_spacing: str = "linspace",
        steps_offset: int = 0,
    ) -> None:  # fmt: skip
        self._train()
        self.set_timesteps(num_train_timesteps)
        self.num_inference_steps = None
        self.noise_sampler_seed = noise_sampler_seed

    def set_timesteps(
        self, num_inference_steps: int, device: Device = None, num_train_timesteps: int | None = None
    ) -> None:
        """Begin a run of ``num_inference_steps`` steps of two calls each (the last has one)."""
        levels, times = self._levels(num_inference_steps, None, num_train_timesteps)
        self.num_inference_steps = num_inference_steps
        logs = np.log(levels[:-1].astype(np.float64))
        mixed = np.append(times[:1], times[1:].repeat(2)).astype(np.float64)
        mixed[1::2] = spacing.sigma_to_t(np.exp(logs[:-1] + np.diff(logs) / 2), np.log(self._table()))
        self._begin(mixed, doubled(levels), device, torch.float64)
        self.sample, self.noise_sampler = None, None
        self.mid_point_sigma: Tensor | None = None

    def _inner_sigma(self) -> float:
        assert self.mid_point_sigma is not None
        return float(self.mid_point_sigma)

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True, s_noise: float = 1.0
    ) -> DenoisedOutput | tuple[Tensor, Tensor]:
        """A half step of eq. 4.1 of DPM-Solver++ with ``s_noise`` times its noise; shapes ``(B, C, …)``."""
        i = self._enter(timestep, model_output, sample)
        sigma, sigma_next = self._stage(i)
        first = self.sample is None
        x0 = self._denoised(model_output, sample, sigma if first else self._inner_sigma())
        if sigma_next == 0:
            prev_sample = euler(sample, x0, sigma, 0.0)
        else:
            begin, end = self._path(sigma, sigma_next, first)
            source = sample if self.sample is None else self.sample
            down, up = ancestral(float(begin), float(end))
            prev_sample = torch.lerp(source, x0, 1 - down / float(begin))
            prev_sample.add_(self._noise(source)(begin, end), alpha=s_noise * min(float(end), up))
            self.sample, self.mid_point_sigma = (sample, end) if first else (None, None)
        self._advance()
        return DenoisedOutput(prev_sample, x0) if return_dict else (prev_sample, x0)

    @staticmethod
    def _path(sigma: float, sigma_next: float, first: bool) -> tuple[Tensor, Tensor]:
        """Where on the Brownian path the stage begins and ends; float32, since the path tells bits apart."""
        t, t_next = -torch.tensor(sigma).log(), -torch.tensor(sigma_next).log()
        return (-t).exp(), (-(t + (t_next - t) * 0.5 if first else t_next)).exp()

    def _noise(self, sample: Tensor) -> BrownianNoise:
        if self.noise_sampler is None:
            sigmas = self._list("sigmas")
            lowest = min(s for s in sigmas if s > 0)
            self.noise_sampler = BrownianNoise(sample, lowest, max(sigmas), self.noise_sampler_seed)
        return self.noise_sampler
