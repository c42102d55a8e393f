"""Euler steps of Karras et al. (2022): deterministic with optional churn, and ancestral."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..core.config import register_to_config
from ..core.random import Generators, randn_tensor
from . import prediction, spacing
from .base import KARRAS_COMPATIBLES, DenoisedOutput, Device, exactly_one, like, one_of
from .karras import KarrasScheduler, ancestral, euler
from .noise import Array
from .sigma import upcast

EulerDiscreteSchedulerOutput = EulerAncestralDiscreteSchedulerOutput = DenoisedOutput


def churn(
    sample: Tensor, sigma: float, gamma: float, s_noise: float, model_output: Tensor, generator: Generators
) -> Tensor:
    """Raise the noise level of ``sample`` from ``σ`` to ``σ (1 + γ)``: lines 4 to 6 of algorithm 2."""
    noise = randn_tensor(model_output.shape, generator, model_output.device, model_output.dtype)
    return torch.add(sample, noise, alpha=s_noise * sigma * ((1 + gamma) ** 2 - 1) ** 0.5)


class EulerDiscreteScheduler(KarrasScheduler):
    """Karras et al. (2022), algorithm 2 with Euler steps only."""

    _compatibles = KARRAS_COMPATIBLES
    _predictions = (*prediction.KINDS[:3], "original_sample")

    @register_to_config
    def __init__(
        self, num_train_timesteps: int = 1000, beta_start: float = 0.0001, beta_end: float = 0.02,
        beta_schedule: str = "linear", trained_betas: Array | list[float] | None = None,
        prediction_type: str = "epsilon", interpolation_type: str = "linear", use_karras_sigmas: bool | None = False,
        use_exponential_sigmas: bool | None = False, use_beta_sigmas: bool | None = False,
        sigma_min: float | None = None, sigma_max: float | None = None, timestep_spacing: str = "linspace",
        timestep_type: Literal["discrete", "continuous"] = "discrete", steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False, final_sigmas_type: str = "zero",
    ) -> None:  # fmt: skip
        one_of("interpolation_type", interpolation_type, ("linear", "log_linear"))
        one_of("timestep_type", timestep_type, ("discrete", "continuous"))
        self._train()
        if self._continuous:
            self.timesteps = 0.25 * self.sigmas[:-1].log()

    @property
    def _continuous(self) -> bool:
        """Whether the network is called with ``log(σ) / 4``, as EDM's v-prediction networks are."""
        return bool(self.config.timestep_type == "continuous" and self.config.prediction_type == "v_prediction")

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Device = None, timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
    ) -> None:  # fmt: skip
        """Begin a run of ``num_inference_steps`` steps, over descending ``timesteps``, or over ``sigmas`` with its end.

        Raises:
            ValueError: more or less than one of the three, or one that contradicts the configuration.
        """
        exactly_one(num_inference_steps=num_inference_steps, timesteps=timesteps, sigmas=sigmas)
        if sigmas is not None:
            spacing.check_descending("sigmas", sigmas)
            levels = np.array(sigmas, dtype=np.float32)
            times = spacing.sigma_to_t(levels[:-1], np.log(self._table()))
        else:
            if timesteps is not None and self._continuous:
                raise ValueError(
                    "`timesteps` and the options timestep_type='continuous' with prediction_type='v_prediction' "
                    "contradict each other: pass `sigmas` instead"
                )
            levels, times = self._levels(num_inference_steps or len(timesteps or ()), timesteps)
        self.num_inference_steps = len(times)
        if self._continuous:
            times = 0.25 * np.log(levels[:-1])
        self._begin(times, levels, device, torch.float32)

    def _interpolated(self, times: Array, table: Array) -> Array:
        if self.config.interpolation_type == "linear":
            return super()._interpolated(times, table)
        low, high = float(np.log(table[0])), float(np.log(table[-1]))
        return np.asarray(torch.linspace(high, low, len(times) + 1).exp().numpy())

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, s_churn: float = 0.0, s_tmin: float = 0.0,
        s_tmax: float = float("inf"), s_noise: float = 1.0, generator: Generators = None, return_dict: bool = True,
    ) -> DenoisedOutput | tuple[Tensor, Tensor]:  # fmt: skip
        """One Euler step, after raising the noise by ``s_churn`` where ``s_tmin <= σ <= s_tmax``; shapes ``(B, C, …)``.

        Raises:
            ValueError: no run, an integer timestep, shapes that differ.
        """
        self._refuse_integer(timestep)
        i = self._enter(timestep, model_output, sample)
        self._remind()
        sigmas = self._list("sigmas")
        sigma = sigmas[i]
        sample = upcast(sample)
        gamma = min(s_churn / (len(sigmas) - 1), 2**0.5 - 1) if s_tmin <= sigma <= s_tmax else 0.0
        if gamma > 0:
            sample = churn(sample, sigma, gamma, s_noise, model_output, generator)
        x0 = self._predicted(model_output, sample, sigma, sigma * (gamma + 1))
        prev_sample = euler(sample, x0, sigma * (gamma + 1), sigmas[i + 1]).to(model_output.dtype)
        self._advance()
        return DenoisedOutput(prev_sample, x0) if return_dict else (prev_sample, x0)

    def _predicted(self, model_output: Tensor, sample: Tensor, sigma: float, sigma_hat: float) -> Tensor:
        kind = self.config["prediction_type"]
        if kind == "original_sample":
            return model_output
        # a v-prediction network was called at σ, whatever churn added
        return self._denoised(model_output, sample, sigma if kind == "v_prediction" else sigma_hat)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The target of a network with v-prediction; samples ``(B, …)``, timesteps ``(B,)`` of this run."""
        self._refuse_integer(timesteps)
        bar = self._near("alphas_cumprod", sample)[[self.index_for_timestep(t) for t in timesteps.tolist()]]
        return prediction.target("v_prediction", sample, noise, like(bar**0.5, sample), like((1 - bar) ** 0.5, sample))


class EulerAncestralDiscreteScheduler(KarrasScheduler):
    """Euler steps to a lower level than the next, and new noise up to it: ancestral sampling of k-diffusion."""

    _compatibles = KARRAS_COMPATIBLES
    _predictions = ("epsilon", "v_prediction")

    @register_to_config
    def __init__(
        self, num_train_timesteps: int = 1000, beta_start: float = 0.0001, beta_end: float = 0.02,
        beta_schedule: str = "linear", trained_betas: Array | list[float] | None = None,
        prediction_type: str = "epsilon", timestep_spacing: str = "linspace", steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
    ) -> None:  # fmt: skip
        self._train()

    def set_timesteps(self, num_inference_steps: int, device: Device = None) -> None:
        """Begin a run of ``num_inference_steps`` steps."""
        levels, times = self._levels(num_inference_steps)
        self.num_inference_steps = num_inference_steps
        self._begin(times, levels, device, torch.float32)

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, generator: Generators = None,
        return_dict: bool = True,
    ) -> DenoisedOutput | tuple[Tensor, Tensor]:  # fmt: skip
        """One ancestral step; shapes ``(B, C, …)``."""
        self._refuse_integer(timestep)
        i = self._enter(timestep, model_output, sample)
        self._remind()
        sigma, sigma_next = self._list("sigmas")[i : i + 2]
        sample = upcast(sample)
        x0 = self._denoised(model_output, sample, sigma)
        down, up = ancestral(sigma, sigma_next)
        prev_sample = euler(sample, x0, sigma, down)
        noise = randn_tensor(model_output.shape, generator, model_output.device, model_output.dtype)
        prev_sample = prev_sample.add_(noise, alpha=up).to(model_output.dtype)
        self._advance()
        return DenoisedOutput(prev_sample, x0) if return_dict else (prev_sample, x0)
