"""Flow matching: ``x = (1 - σ) x_0 + σ ε`` and a network that predicts the velocity ``ε - x_0``.

Lipman et al. (2023), "Flow Matching for Generative Modeling"; Liu et al. (2023), "Flow Straight and Fast";
shifted noise levels of Esser et al. (2024), "Scaling Rectified Flow Transformers".
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.config import register_to_config
from ..core.random import Generators, randn_tensor
from . import spacing
from .base import Device, SchedulerMixin, SchedulerOutput, at_most_one, combine, like, logger, one_of
from .euler import churn
from .heun import doubled
from .noise import Array
from .sigma import TRANSFORMS, upcast

FlowMatchEulerDiscreteSchedulerOutput = FlowMatchHeunDiscreteSchedulerOutput = SchedulerOutput


class FlowScheduler(SchedulerMixin):
    """Noise levels from 1 to 0 and their shifts."""

    _shift: float

    def _train(self) -> None:
        c = self.config
        at_most_one(**{name: c.get(name) for name in TRANSFORMS})
        one_of("time_shift_type", c.get("time_shift_type", "exponential"), ("exponential", "linear"))
        train = c.num_train_timesteps
        levels = np.arange(train, 0, -1, dtype=np.float32) / np.float32(train)
        if not c.get("use_dynamic_shifting"):
            levels = spacing.shift(levels, c.shift)
        self._shift = c.shift
        self.num_inference_steps = None
        self._begin(levels * train, levels, None, torch.float32)
        self.sigma_min, self.sigma_max = float(self.sigmas[-1]), float(self.sigmas[0])

    @property
    def shift(self) -> float:
        """The static shift of the noise levels."""
        return self._shift

    def set_shift(self, shift: float) -> None:
        """Shift the noise levels of the next runs by ``shift``."""
        self._shift = shift

    def _sigma_to_t(self, sigma: Any) -> Any:
        return sigma * self.config.num_train_timesteps

    def time_shift(self, mu: float, sigma: float, t: Any) -> Any:
        """The resolution-dependent shift of levels ``t`` that ``time_shift_type`` names."""
        curve = spacing.shift_exponential if self.config.time_shift_type == "exponential" else spacing.shift_linear
        return curve(mu, sigma, t)

    def stretch_shift_to_terminal(self, t: Any) -> Any:
        """Levels stretched to end at ``shift_terminal``."""
        return spacing.stretch_to_terminal(t, self.config.shift_terminal)

    def _shifted(self, levels: Array, mu: float | None) -> Array:
        c = self.config
        if c.use_dynamic_shifting:
            if mu is None:
                raise ValueError("use_dynamic_shifting=True needs `mu` (the shift at the run's resolution)")
            levels = self.time_shift(mu, 1.0, levels)
        else:
            levels = spacing.shift(levels, self._shift)
        return self.stretch_shift_to_terminal(levels) if c.shift_terminal else levels

    def _transform(self, levels: Array) -> Array:
        c, low, high = self.config, float(levels[-1]), float(levels[0])
        if c.use_karras_sigmas:
            return spacing.karras(low, high, len(levels))
        if c.use_exponential_sigmas:
            return spacing.exponential(low, high, len(levels))
        return spacing.beta(low, high, len(levels)) if c.use_beta_sigmas else levels

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Device = None, sigmas: list[float] | None = None,
        mu: float | None = None, timesteps: list[float] | None = None,
    ) -> None:  # fmt: skip
        """Begin a run of ``num_inference_steps`` steps, or over given levels or timesteps.

        Args:
            sigmas: descending noise levels without the end, before shifting.
            mu: the dynamic shift.
            timesteps: what the network is called with; kept as given, while the levels are shifted.

        Raises:
            ValueError: nothing that says the number of steps, lengths that differ, no ``mu`` with dynamic shifting.
        """
        steps = self._count(num_inference_steps, sigmas, timesteps)
        c = self.config
        if timesteps is not None and sigmas is None:
            logger.warning("`timesteps` without `sigmas`: the timesteps stay as given, the noise levels are shifted")
        if sigmas is not None:
            levels: Array = np.array(sigmas, dtype=np.float32)
        elif timesteps is not None:
            levels = np.array(timesteps, dtype=np.float32) / c.num_train_timesteps
        else:
            train = c.num_train_timesteps
            levels = spacing.flow(self.sigma_max * train, self.sigma_min * train, steps) / train
        levels = self._transform(self._shifted(levels, mu)).astype(np.float32)
        if c.invert_sigmas:
            levels, times, end = 1 - levels, None, 1.0
        else:
            times, end = timesteps, 0.0
        given = levels * np.float32(c.num_train_timesteps) if times is None else np.array(times, dtype=np.float32)
        self.num_inference_steps = steps
        self._begin(given, np.append(levels, np.float32(end)), device, torch.float32)
        listed = self._list("sigmas")
        self.sigmas = self.sigmas.to(device)
        self._held["sigmas", "list"] = (self.sigmas, listed)

    @staticmethod
    def _count(steps: int | None, sigmas: Any, timesteps: Any) -> int:
        given = {name: len(v) for name, v in (("sigmas", sigmas), ("timesteps", timesteps)) if v is not None}
        if steps is not None:
            given["num_inference_steps"] = steps
        if not given:
            raise ValueError("give `num_inference_steps`, `sigmas` or `timesteps`")
        if len(set(given.values())) > 1:
            raise ValueError(f"these must agree on the number of steps, but say {given}")
        for name, values in (("sigmas", sigmas), ("timesteps", timesteps)):
            if values is not None:
                spacing.check_descending(name, values)
        if steps is not None and steps < 1:
            raise ValueError(f"num_inference_steps={steps}: take at least one step")
        return next(iter(given.values()))

    def scale_noise(self, sample: Tensor, timestep: Any, noise: Tensor | None = None) -> Tensor:
        """``(1 - σ) x_0 + σ ε``; samples ``(B, …)``, timesteps ``(B,)`` of this run."""
        if noise is None:
            raise ValueError("`noise` is missing: pass noise of the sample's shape")
        sigma = like(self._near("sigmas", sample)[self._positions(timestep)], sample)
        return sigma * noise + (1.0 - sigma) * sample

    def _refuse_integer(self, timestep: Any) -> None:
        if isinstance(timestep, int) or (isinstance(timestep, Tensor) and not timestep.is_floating_point()):
            raise ValueError(
                f"timestep={timestep!r} is an integer, perhaps from `enumerate(timesteps)`; "
                f"{type(self).__name__}.step takes one of `scheduler.timesteps`"
            )


class FlowMatchEulerDiscreteScheduler(FlowScheduler):
    """Euler steps along the predicted velocity; with ``stochastic_sampling``, new noise for the estimate each step."""

    @register_to_config
    def __init__(
        self, num_train_timesteps: int = 1000, shift: float = 1.0, use_dynamic_shifting: bool = False,
        base_shift: float | None = 0.5, max_shift: float | None = 1.15, base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096, invert_sigmas: bool = False, shift_terminal: float | None = None,
        use_karras_sigmas: bool = False, use_exponential_sigmas: bool = False, use_beta_sigmas: bool = False,
        time_shift_type: str = "exponential", stochastic_sampling: bool = False,
    ) -> None:  # fmt: skip
        self._train()

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, s_churn: float = 0.0, s_tmin: float = 0.0,
        s_tmax: float = float("inf"), s_noise: float = 1.0, generator: Generators = None,
        per_token_timesteps: Tensor | None = None, return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:  # fmt: skip
        """One Euler step; shapes ``(B, …)``, or ``(B, L, C)`` with a timestep per token ``(B, L)``.

        ``s_churn`` and its companions are accepted, as the signature of Euler's scheduler has them; flow
        matching has no churn.

        Raises:
            ValueError: no run, an integer timestep, shapes that differ.
        """
        self._refuse_integer(timestep)
        i = self._enter(timestep, model_output, sample)
        sample = upcast(sample)
        if per_token_timesteps is not None:
            prev_sample = self._per_token(model_output, sample, per_token_timesteps, generator)
        else:
            sigma, sigma_next = self._list("sigmas")[i : i + 2]
            if self.config["stochastic_sampling"]:
                x0 = torch.add(sample, model_output, alpha=-sigma)
                noise = randn_tensor(sample.shape, generator, sample.device, torch.float32)
                prev_sample = combine((1.0 - sigma_next, x0), (sigma_next, noise))
            else:
                prev_sample = torch.add(sample, model_output, alpha=sigma_next - sigma)
            prev_sample = prev_sample.to(model_output.dtype)
        self._advance()
        return SchedulerOutput(prev_sample) if return_dict else (prev_sample,)

    def _per_token(self, model_output: Tensor, sample: Tensor, timesteps: Tensor, generator: Generators) -> Tensor:
        """A step of each token from its own level to the next lower one of the run."""
        now = timesteps / self.config.num_train_timesteps  # (B, L)
        levels = self._near("sigmas", now)[:, None, None]  # (S + 1, 1, 1)
        below = torch.where(levels < now - 1e-6, levels, torch.zeros_like(levels)).amax(dim=0)  # (B, L)
        now, below = now[..., None], below[..., None]
        if self.config["stochastic_sampling"]:
            noise = randn_tensor(sample.shape, generator, sample.device, torch.float32)
            return torch.add((1.0 - below) * (sample - now * model_output), below * noise)
        return torch.add(sample, (now - below) * model_output)


class FlowMatchHeunDiscreteScheduler(FlowScheduler):
    """Heun's method along the predicted velocity; two calls of the network a step (the last has one)."""

    order = 2
    sample: Tensor | None = None

    @register_to_config
    def __init__(self, num_train_timesteps: int = 1000, shift: float = 1.0) -> None:
        self._train()

    def set_timesteps(self, num_inference_steps: int, device: Device = None) -> None:  # type: ignore[override]
        """Begin a run of ``num_inference_steps`` steps."""
        steps, train = self._count(num_inference_steps, None, None), self.config.num_train_timesteps
        levels = spacing.flow(self.sigma_max * train, self.sigma_min * train, steps) / train
        levels = spacing.shift(levels, self._shift).astype(np.float32)
        times = levels * np.float32(train)
        self.num_inference_steps = steps
        levels = doubled(np.append(levels, np.float32(0)))
        self._begin(np.append(times[:1], times[1:].repeat(2)), levels, device, torch.float32)
        self.sample = None
        self.prev_derivative: Tensor | None = None
        self.dt: float | None = None

    @property
    def state_in_first_order(self) -> bool:
        """Whether the next call is the first of its step."""
        return self.sample is None

    def scale_noise(self, sample: Tensor, timestep: Any, noise: Tensor | None = None) -> Tensor:
        """``(1 - σ) x_0 + σ ε`` at the step of ``timestep``; samples ``(B, …)``."""
        if noise is None:
            raise ValueError("`noise` is missing: pass noise of the sample's shape")
        if self._step_index is None:
            self._init_step_index(timestep)
        assert self._step_index is not None
        sigma = self._list("sigmas")[self._step_index]
        return combine((sigma, noise), (1.0 - sigma, sample))

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, s_churn: float = 0.0, s_tmin: float = 0.0,
        s_tmax: float = float("inf"), s_noise: float = 1.0, generator: Generators = None, return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:  # fmt: skip
        """A stage: an Euler step (after churn), or the correction of it with the mean slope; shapes ``(B, …)``."""
        self._refuse_integer(timestep)
        i = self._enter(timestep, model_output, sample)
        sigmas, first = self._list("sigmas"), self.sample is None
        sigma, sigma_next = (sigmas[i], sigmas[i + 1]) if first else (sigmas[i - 1], sigmas[i])
        sample = upcast(sample)
        gamma = min(s_churn / (len(sigmas) - 1), 2**0.5 - 1) if s_tmin <= sigma <= s_tmax else 0.0
        if gamma > 0:
            sample = churn(sample, sigma, gamma, s_noise, model_output, generator)
        if first:  # the velocity at σ is used at the raised level: dx/dσ = (x - x_0) / σ_hat
            derivative = model_output.to(sample.dtype) / (gamma + 1)
            self.sample, self.prev_derivative, self.dt = sample, derivative, sigma_next - sigma * (gamma + 1)
            prev_sample = torch.add(sample, derivative, alpha=self.dt)
        else:
            assert self.sample is not None
            assert self.prev_derivative is not None
            assert self.dt is not None
            mean = torch.add(self.prev_derivative, model_output)
            prev_sample = torch.add(self.sample, mean, alpha=self.dt / 2)
            self.sample, self.prev_derivative, self.dt = None, None, None
        self._advance()
        prev_sample = prev_sample.to(model_output.dtype)
        return SchedulerOutput(prev_sample) if return_dict else (prev_sample,)


class FlowMatchLCMScheduler(FlowScheduler):
    """Multistep consistency sampling on a flow, optionally growing the sample between steps (scale-wise models)."""

    @register_to_config
    def __init__(
        self, num_train_timesteps: int = 1000, shift: float = 1.0, use_dynamic_shifting: bool = False,
        base_shift: float = 0.5, max_shift: float = 1.15, base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096, invert_sigmas: bool = False, shift_terminal: float | None = None,
        use_karras_sigmas: bool | None = False, use_exponential_sigmas: bool | None = False,
        use_beta_sigmas: bool | None = False, time_shift_type: str = "exponential",
        scale_factors: list[float] | None = None, upscale_mode: str = "bicubic",
    ) -> None:  # fmt: skip
        self._train()
        self._init_size: Any = None
        self.set_scale_factors(scale_factors, upscale_mode)

    def set_scale_factors(self, scale_factors: list[float] | None, upscale_mode: str) -> None:
        """Grow the sample to these multiples of its first size, one after each step but the last."""
        self._scale_factors, self._upscale_mode = scale_factors, upscale_mode

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, generator: Generators = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:  # fmt: skip
        """Jump to the end, grow if asked to, add the noise of the next level; shapes ``(B, C, H, W)``."""
        self._refuse_integer(timestep)
        factors = self._scale_factors or []
        if factors and len(self.timesteps) != len(factors) + 1:
            raise ValueError(
                f"{len(factors)} scale_factors for {len(self.timesteps)} timesteps: there must be one less than steps"
            )
        if self._init_size is None or self._step_index is None:
            self._init_size = model_output.shape[2:]
        i = self._enter(timestep, model_output, sample)
        sigma, sigma_next = self._list("sigmas")[i : i + 2]
        x0 = torch.add(upcast(sample), model_output, alpha=-sigma)
        if i < len(factors) and self._upscale_mode:
            size = [round(factors[i] * side) for side in self._init_size]
            x0 = torch.nn.functional.interpolate(x0, size=size, mode=self._upscale_mode)
        noise = randn_tensor(x0.shape, generator, x0.device, x0.dtype)
        prev_sample = combine((1.0 - sigma_next, x0), (sigma_next, noise)).to(model_output.dtype)
        self._advance()
        return SchedulerOutput(prev_sample) if return_dict else (prev_sample,)
