"""Xue et al. (2023), "SA-Solver: Stochastic Adams Solver for Fast Sampling of Diffusion Models"."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.config import register_to_config
from ..core.random import Generators, randn_tensor
from .base import KARRAS_COMPATIBLES, Device, SchedulerOutput, combine, like, one_of
from .exponential import LambdaScheduler, Level
from .noise import Array


def moments(kappa: float, h: float, count: int) -> list[float]:
    """``∫ exp(κ u) u^k du`` from ``-h`` to 0 for ``k`` below ``count``, by parts."""
    decay = math.exp(-kappa * h)
    values = [-math.expm1(-kappa * h) / kappa]
    for k in range(1, count):
        values.append(-((-h) ** k) * decay / kappa - k / kappa * values[-1])
    return values


def lagrange(nodes: Sequence[float], k: int) -> list[float]:
    """The coefficients, lowest first, of the polynomial that is 1 at node ``k`` and 0 at the others."""
    coefficients = [1.0]
    for j, node in enumerate(nodes):
        if j != k:
            norm = nodes[k] - node
            lower, higher = [-node * c / norm for c in coefficients], [c / norm for c in coefficients]
            coefficients = [a + b for a, b in zip([*lower, 0.0], [0.0, *higher], strict=True)]
    return coefficients


def adams(
    levels: Sequence[Level], nodes: Sequence[Level], tau: float, data: bool, corrector: bool
) -> tuple[float, list[float], float]:
    """``a``, the weights of the model outputs at ``nodes`` and the noise scale of a stochastic Adams step.

    ``levels`` are the target and the current one; eq. 14 (Adams-Bashforth) and 17 (Adams-Moulton) of the paper.
    """
    t, s = levels
    h, spread = t.lam - s.lam, 1 + tau**2
    kappa, scale = (spread, spread * t.alpha) if data else (-1.0, -spread * t.sigma)
    places = [node.lam - t.lam for node in nodes]
    powers = moments(kappa, h, len(nodes))
    weights = [scale * sum(c * p for c, p in zip(lagrange(places, k), powers, strict=True)) for k in range(len(nodes))]
    if data and len(nodes) == 2 and h != 0:  # the second-order term of the paper's implementation
        excess = scale * (h * h / 2 - (kappa * h + math.expm1(-kappa * h)) / kappa**2)
        excess /= h if corrector else nodes[0].lam - nodes[1].lam
        weights = [weights[0] + excess, weights[1] - excess]
    if data:
        noise_scale = t.sigma * math.sqrt(max(-math.expm1(-2 * tau**2 * h), 0.0))
        return math.exp(-(tau**2) * h) * t.sigma / s.sigma, weights, noise_scale
    return t.alpha / s.alpha, weights, tau * t.sigma * math.sqrt(max(math.expm1(2 * h), 0.0))


def in_the_middle(t: float) -> float:
    """The paper's choice for latent diffusion: noise between timesteps 200 and 800 only."""
    return 1.0 if 200 <= t <= 800 else 0.0


class SASolverScheduler(LambdaScheduler):
    """Stochastic Adams-Bashforth prediction and Adams-Moulton correction; ``tau_func`` says how stochastic."""

    _compatibles = KARRAS_COMPATIBLES
    _clips_lambda = True

    @register_to_config
    def __init__(
        self, num_train_timesteps: int = 1000, beta_start: float = 0.0001, beta_end: float = 0.02,
        beta_schedule: str = "linear", trained_betas: Array | list[float] | None = None, predictor_order: int = 2,
        corrector_order: int = 2, prediction_type: str = "epsilon", tau_func: Callable[[Any], float] | None = None,
        thresholding: bool = False, dynamic_thresholding_ratio: float = 0.995, sample_max_value: float = 1.0,
        algorithm_type: str = "data_prediction", lower_order_final: bool = True, use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False, use_beta_sigmas: bool = False, use_flow_sigmas: bool = False,
        flow_shift: float = 1.0, lambda_min_clipped: float = -float("inf"), variance_type: str | None = None,
        timestep_spacing: str = "linspace", steps_offset: int = 0,
    ) -> None:  # fmt: skip
        one_of("algorithm_type", algorithm_type, ("data_prediction", "noise_prediction"))
        one_of("predictor_order", predictor_order, (1, 2, 3, 4))
        one_of("corrector_order", corrector_order, (1, 2, 3, 4))
        self.predict_x0 = algorithm_type == "data_prediction"
        if prediction_type == "flow_prediction" and not self.predict_x0:
            raise ValueError(
                "prediction_type='flow_prediction' and algorithm_type='noise_prediction' contradict each other"
            )
        self.tau_func = tau_func or in_the_middle
        self._train()

    @property
    def _memory(self) -> int:
        return int(max(self.config.predictor_order, self.config.corrector_order - 1))

    def _forget(self) -> None:
        super()._forget()
        self.last_sample: Tensor | None = None
        self.last_noise: Tensor | None = None
        self._tau = 0.0
        self.this_corrector_order = 1

    def set_timesteps(self, num_inference_steps: int | None = None, device: Device = None) -> None:
        """Begin a run of ``num_inference_steps`` steps."""
        if num_inference_steps is None:
            raise ValueError("give `num_inference_steps`")
        levels, times = self._levels(num_inference_steps)
        given = any(self.config.get(name) for name in self._exclusive)
        self._launch(levels, float(levels[-1]) if given else float(self._table()[0]), times, device)

    def _convert(self, model_output: Tensor, sample: Tensor, level: Level) -> Tensor:
        return self._data_or_noise(self.predict_x0, model_output, sample, level)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """``sqrt(ᾱ_t) x_0 + sqrt(1 - ᾱ_t) ε``; samples ``(B, …)``, timesteps ``(B,)`` of this run or of training."""
        if self.config.use_flow_sigmas:
            return super().add_noise(original_samples, noise, timesteps)
        bar = like(self._near("alphas_cumprod", original_samples)[timesteps.to(original_samples.device)], noise)
        return torch.add(bar**0.5 * original_samples, (1 - bar) ** 0.5 * noise)

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, generator: Generators = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:  # fmt: skip
        """Correct the sample with the model output at it, then predict the next one; shapes ``(B, C, …)``."""
        i, c = self._enter(timestep, model_output, sample), self.config
        converted = self._convert(model_output, sample, self._grid[i])
        if i > 0 and self.last_sample is not None and self.last_noise is not None:
            sample = self._correct(
                converted, self.last_sample, self.last_noise, self.this_corrector_order, self._tau, i
            )
        self._remember(converted)
        noise = randn_tensor(sample.shape, generator, sample.device, converted.dtype)
        left = len(self.timesteps) - i if c["lower_order_final"] else self._memory + 1
        order = min(c["predictor_order"], left, self.lower_order_nums + 1)
        self.this_corrector_order = min(c["corrector_order"], left + 1, self.lower_order_nums + 2)
        self.last_sample, self.last_noise = sample, noise
        self._tau = float(self.tau_func(self._list("timesteps")[i]))
        prev_sample = self._predict(sample, noise, order, self._tau, i)
        self.lower_order_nums = min(self.lower_order_nums + 1, self._memory)
        self._advance()
        return SchedulerOutput(prev_sample) if return_dict else (prev_sample,)

    def _predict(self, sample: Tensor, noise: Tensor, order: int, tau: float, i: int) -> Tensor:
        grid = self._grid
        nodes = [grid[i - k] for k in range(order)]
        a, b, noise_scale = adams([grid[i + 1], grid[i]], nodes, tau, self.predict_x0, False)
        return combine((a, sample), *self._outputs(b), (noise_scale, noise))

    def _correct(
        self, converted: Tensor, last_sample: Tensor, last_noise: Tensor, order: int, tau: float, i: int
    ) -> Tensor:
        grid = self._grid
        nodes = [grid[i - k] for k in range(order)]
        a, b, noise_scale = adams([grid[i], grid[i - 1]], nodes, tau, self.predict_x0, True)
        return combine((a, last_sample), (b[0], converted), *self._outputs(b[1:]), (noise_scale, last_noise))

    # -- the parts of a step under the ecosystem's names -----------------------------------------------

    def stochastic_adams_bashforth_update(
        self, model_output: Tensor, *args: Any, sample: Tensor, noise: Tensor, order: int, tau: Any, **kwargs: Any
    ) -> Tensor:
        """Predict the sample of the next level from the remembered model outputs."""
        return self._predict(sample, noise, order, float(tau), self._here())

    def stochastic_adams_moulton_update(
        self, this_model_output: Tensor, *args: Any, last_sample: Tensor, last_noise: Tensor, this_sample: Tensor,
        order: int, tau: Any, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        """Correct the sample of this level by the converted model output at it; ``this_sample`` has no influence."""
        return self._correct(this_model_output, last_sample, last_noise, order, float(tau), self._here())
