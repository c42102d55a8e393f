"""Lu et al. (2022), "DPM-Solver" and "DPM-Solver++": multistep, singlestep, stochastic and inverted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.config import register_to_config
from ..core.random import Generators, randn_tensor
from . import spacing
from .base import KARRAS_COMPATIBLES, Device, SchedulerOutput, combine, exactly_one, logger, one_of
from .exponential import LambdaScheduler, Level
from .noise import Array
from .sigma import TRANSFORMS, upcast
from .updates import MultistepUpdates, SinglestepUpdates

ALGORITHMS = ("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++")
Weights = tuple[float, list[float], float]  # a, b (newest model output first), c of x' = a x + Σ b m + c z


def integrals(algorithm: str, s: Level, t: Level) -> tuple[float, tuple[float, float, float], float]:
    """``a``, ``φ_1 φ_2 φ_3`` and ``c`` of a step from ``s`` to ``t``.

    The model output is expanded as ``D_0 + D_1 (λ - λ_s) / h + D_2 …``; ``φ_k`` are the exact integrals of these
    terms: eq. 3.5 of DPM-Solver for noise, eq. 9 of DPM-Solver++ for data, appendix of the latter for the SDEs.
    """
    h = t.lam - s.lam
    if h == 0:
        return 1.0, (0.0, 0.0, 0.0), 0.0
    if algorithm == "dpmsolver++":
        e = math.expm1(-h)
        phi = (-t.alpha * e, t.alpha * (e / h + 1), -t.alpha * ((e + h) / h**2 - 0.5))
        return t.sigma / s.sigma, phi, 0.0
    if algorithm == "sde-dpmsolver++":
        e = -math.expm1(-2 * h)
        a = t.sigma / s.sigma * math.exp(-h)
        phi = (t.alpha * e, t.alpha * (1 - e / (2 * h)), t.alpha * ((e - 2 * h) / (2 * h) ** 2 - 0.5))
        return a, phi, t.sigma * math.sqrt(max(e, 0.0))
    e = math.expm1(h)
    phi = (-t.sigma * e, -t.sigma * (e / h - 1), -t.sigma * ((e - h) / h**2 - 0.5))
    if algorithm == "dpmsolver":
        return t.alpha / s.alpha, phi, 0.0
    return t.alpha / s.alpha, (2 * phi[0], 2 * phi[1], 2 * phi[2]), t.sigma * math.sqrt(max(math.expm1(2 * h), 0.0))


def multistep(algorithm: str, solver_type: str, levels: Sequence[Level], order: int) -> Weights:
    """A multistep step of ``order`` 1 to 3; ``levels`` are the target, the current one and the past, backwards.

    The third order takes ``φ_3`` once where the integral of the quadratic term is ``2 φ_3``, as the authors' code
    and the ecosystem do: it converges with order 2. Kept, since the same seed must give the same image.
    """
    t, s = levels[:2]
    a, (phi1, phi2, phi3), c = integrals(algorithm, s, t)
    h = t.lam - s.lam
    if (order > 1 and s.lam == levels[2].lam) or h == 0:  # a repeated level has nothing to extrapolate with
        order = 1
    if order == 1:
        return a, [phi1], c
    r0 = (s.lam - levels[2].lam) / h
    if order == 2 or levels[2].lam == levels[3].lam:
        d = (0.5 * phi1 if solver_type == "midpoint" else phi2) / r0
        return a, [phi1 + d, -d], c
    r1 = (levels[2].lam - levels[3].lam) / h
    k = (phi2 * r0 + phi3) / (r0 + r1)
    near, far = (phi2 + k) / r0, k / r1  # weights of m_0 - m_1 and of m_1 - m_2
    return a, [phi1 + near, -near - far, far], c


def multistep_order(order: int, remembered: int, index: int, steps: int, first: bool, second: bool) -> int:
    """The order that step ``index`` can have; ``first``, ``second``: of the last and second last step at most."""
    order = min(order, remembered + 1)
    if index == steps - 1 and first:
        return 1
    return min(order, 2) if index == steps - 2 and second else order


class DPMSolverScheduler(LambdaScheduler):
    """What the faces of DPM-Solver share: their options, and model outputs as data or as noise."""

    _clips_lambda = True

    def _check_options(self, algorithms: tuple[str, ...]) -> None:
        c = self.config
        if c.algorithm_type == "deis":  # a configuration of DEIS
            self.register_to_config(algorithm_type="dpmsolver++")
        one_of("algorithm_type", self.config.algorithm_type, algorithms)
        if c.solver_type in ("logrho", "bh1", "bh2"):  # of DEIS and UniPC
            self.register_to_config(solver_type="midpoint")
        one_of("solver_type", self.config.solver_type, ("midpoint", "heun"))
        one_of("solver_order", c.solver_order, (1, 2, 3))
        algorithm = self.config.algorithm_type
        if c.get("final_sigmas_type") == "zero" and not algorithm.endswith("++"):
            raise ValueError(
                f"final_sigmas_type='zero' and algorithm_type={algorithm!r} contradict each other (its last step "
                "divides by it): set final_sigmas_type='sigma_min', or take 'dpmsolver++'"
            )
        if algorithm == "sde-dpmsolver" and c.solver_order == 3:
            raise ValueError("algorithm_type='sde-dpmsolver' has no third order: set solver_order to 1 or 2")
        if c.prediction_type == "flow_prediction" and not algorithm.endswith("++"):
            raise ValueError(
                f"prediction_type='flow_prediction' is nothing algorithm_type={algorithm!r} can do; take 'dpmsolver++'"
            )

    def _convert(self, model_output: Tensor, sample: Tensor, level: Level) -> Tensor:
        return self._data_or_noise(self.config["algorithm_type"].endswith("++"), model_output, sample, level)


class DPMSolverMultistepScheduler(DPMSolverScheduler, MultistepUpdates):
    """Lu et al. (2022), "DPM-Solver++", algorithm 2 (2M), its third order, and their SDE variants."""

    _compatibles = KARRAS_COMPATIBLES

    @register_to_config
    def __init__(
        self, num_train_timesteps: int = 1000, beta_start: float = 0.0001, beta_end: float = 0.02,
        beta_schedule: str = "linear", trained_betas: Array | list[float] | None = None, solver_order: int = 2,
        prediction_type: str = "epsilon", thresholding: bool = False, dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0, algorithm_type: str = "dpmsolver++", solver_type: str = "midpoint",
        lower_order_final: bool = True, euler_at_final: bool = False, use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False, use_beta_sigmas: bool = False, use_lu_lambdas: bool = False,
        use_flow_sigmas: bool = False, flow_shift: float = 1.0, final_sigmas_type: str = "zero",
        lambda_min_clipped: float = -float("inf"), variance_type: str | None = None,
        timestep_spacing: str = "linspace", steps_offset: int = 0, rescale_betas_zero_snr: bool = False,
        use_dynamic_shifting: bool = False, time_shift_type: str = "exponential",
    ) -> None:  # fmt: skip
        self._check_options(ALGORITHMS)
        self._train()

    def _rounds_karras(self) -> bool:
        return bool(self.config.beta_schedule != "squaredcos_cap_v2")

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Device = None, mu: float | None = None,
        timesteps: list[int] | None = None,
    ) -> None:  # fmt: skip
        """Begin a run of ``num_inference_steps`` steps, or over descending ``timesteps``; ``mu`` shifts flow levels."""
        exactly_one(num_inference_steps=num_inference_steps, timesteps=timesteps)
        self._shift_by(mu)
        levels, times = self._levels(num_inference_steps or len(timesteps or ()), timesteps)
        self._launch(levels, self._last_sigma(), times, device)

    def _weights(self, order: int) -> Weights:
        i, c, grid = self._here(), self.config, self._grid
        levels = [grid[i + 1], *(grid[i - k] for k in range(order))]
        return multistep(c["algorithm_type"], c["solver_type"], levels, order)

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, generator: Generators = None,
        variance_noise: Tensor | None = None, return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:  # fmt: skip
        """One multistep step; shapes ``(B, C, …)``; ``variance_noise`` replaces the noise of the SDE variants.

        Raises:
            ValueError: no run, or shapes that differ.
        """
        i, c = self._enter(timestep, model_output, sample), self.config
        converted = self._convert(model_output, sample, self._grid[i])
        self._remember(converted)
        lower = c["lower_order_final"] and len(self.timesteps) < 15
        first = c["euler_at_final"] or lower or c.get("final_sigmas_type") == "zero"
        order = multistep_order(c["solver_order"], self.lower_order_nums, i, len(self.timesteps), first, lower)
        a, b, noise_scale = self._weights(order)
        prev_sample = combine((a, upcast(sample)), *self._outputs(b))
        if c["algorithm_type"].startswith("sde"):
            if variance_noise is None:
                variance_noise = randn_tensor(sample.shape, generator, sample.device, torch.float32)
            prev_sample.add_(variance_noise.to(prev_sample), alpha=noise_scale)
        self.lower_order_nums = min(self.lower_order_nums + 1, c["solver_order"])
        self._advance()
        prev_sample = prev_sample.to(converted.dtype)
        return SchedulerOutput(prev_sample) if return_dict else (prev_sample,)


def singlestep(algorithm: str, solver_type: str, levels: Sequence[Level], order: int) -> Weights:
    """The last stage of a singlestep step of ``order`` 1 to 3; ``levels`` are the target and the stages, backwards."""
    base = levels[order]  # where the step began
    a, (phi1, phi2, phi3), c = integrals(algorithm, base, levels[0])
    h = levels[0].lam - base.lam
    if order == 1 or h == 0:
        return a, [phi1] if order == 1 else [0.0] * order, c
    r0 = (levels[1].lam - base.lam) / h
    if order == 2:
        d = (0.5 * phi1 if solver_type == "midpoint" else phi2) / r0
        return a, [d, phi1 - d], c
    if solver_type == "midpoint":
        return a, [phi2 / r0, 0.0, phi1 - phi2 / r0], c
    r1 = (levels[2].lam - base.lam) / h
    near = (2 * phi3 - phi2 * r1) / (r0 - r1) / r0  # weights of m_0 - m_2 and of m_1 - m_2
    far = (phi2 * r0 - 2 * phi3) / (r0 - r1) / r1
    return a, [near, far, phi1 - near - far], c


class DPMSolverSinglestepScheduler(DPMSolverScheduler, SinglestepUpdates):
    """Lu et al. (2022), "DPM-Solver-fast": steps of order 1 to 3 out of 1 to 3 calls, none of them used twice."""

    _compatibles = KARRAS_COMPATIBLES
    _spacing_option = False
    _exclusive = (*TRANSFORMS, "use_flow_sigmas")

    @register_to_config
    def __init__(
        self, num_train_timesteps: int = 1000, beta_start: float = 0.0001, beta_end: float = 0.02,
        beta_schedule: str = "linear", trained_betas: Array | list[float] | None = None, solver_order: int = 2,
        prediction_type: str = "epsilon", thresholding: bool = False, dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0, algorithm_type: str = "dpmsolver++", solver_type: str = "midpoint",
        lower_order_final: bool = False, use_karras_sigmas: bool = False, use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False, use_flow_sigmas: bool = False, flow_shift: float = 1.0,
        final_sigmas_type: str = "zero", lambda_min_clipped: float = -float("inf"), variance_type: str | None = None,
        use_dynamic_shifting: bool = False, time_shift_type: str = "exponential",
    ) -> None:  # fmt: skip
        self._check_options(("dpmsolver", "dpmsolver++", "sde-dpmsolver++"))
        self._train()
        self.sample: Tensor | None = None
        self.order_list = self.get_order_list(num_train_timesteps)

    def get_order_list(self, num_inference_steps: int) -> list[int]:
        """The order of each stage: 1 2 3 1 2 3 …, with lower orders at the end as configured."""
        c, n = self.config, num_inference_steps
        order = c.solver_order
        if c.lower_order_final and n % order == 0 and order > 1:  # a full step less, and a lower one more
            orders: list[int] = [*range(1, order + 1)] * (n // order - 1)
            orders += [*range(1, order), 1]
        else:
            orders = list(range(1, order + 1)) * (n // order)
            orders += list(range(1, n % order + 1)) if c.lower_order_final else []
        if c.final_sigmas_type == "zero":
            orders[-1] = 1
        return orders

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Device = None, mu: float | None = None,
        timesteps: list[int] | None = None,
    ) -> None:  # fmt: skip
        """Begin a run of ``num_inference_steps`` calls, or over descending ``timesteps``; ``mu`` shifts flow levels."""
        exactly_one(num_inference_steps=num_inference_steps, timesteps=timesteps)
        c, steps = self.config, num_inference_steps or len(timesteps or ())
        self._shift_by(mu)
        levels, times = self._levels(steps, timesteps)
        self._launch(levels, self._last_sigma(), times, device)
        self.sample = None
        if not c.lower_order_final and (steps % c.solver_order != 0 or c.final_sigmas_type == "zero"):
            why = f"{steps} steps of order {c.solver_order}" if steps % c.solver_order else "final_sigmas_type='zero'"
            logger.warning("lower_order_final=False is not possible with %s; it is True from here on", why)
            self.register_to_config(lower_order_final=True)
        self.order_list = self.get_order_list(steps)

    def _weights(self, order: int) -> Weights:
        i, c, grid = self._here(), self.config, self._grid
        levels = [grid[i + 1 - k] for k in range(order + 1)]
        return singlestep(c["algorithm_type"], c["solver_type"], levels, order)

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, generator: Generators = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:  # fmt: skip
        """One stage, which begins again from where its step began; shapes ``(B, C, …)``."""
        i, c = self._enter(timestep, model_output, sample), self.config
        self._remember(self._convert(model_output, sample, self._grid[i]))
        order = self.order_list[i]
        while self.model_outputs[-order] is None:  # a run that began in the middle of a step
            order -= 1
        if order == 1:
            self.sample = sample
        assert self.sample is not None
        a, b, noise_scale = self._weights(order)
        prev_sample = combine((a, self.sample), *self._outputs(b))
        if c["algorithm_type"] == "sde-dpmsolver++":
            noise = randn_tensor(sample.shape, generator, sample.device, prev_sample.dtype)
            prev_sample.add_(noise, alpha=noise_scale)
        self._advance()
        return SchedulerOutput(prev_sample) if return_dict else (prev_sample,)


class DPMSolverMultistepInverseScheduler(DPMSolverMultistepScheduler):
    """DPM-Solver++ multistep steps from the sample to the noise, for inversion."""

    @register_to_config
    def __init__(
        self, num_train_timesteps: int = 1000, beta_start: float = 0.0001, beta_end: float = 0.02,
        beta_schedule: str = "linear", trained_betas: Array | list[float] | None = None, solver_order: int = 2,
        prediction_type: str = "epsilon", thresholding: bool = False, dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0, algorithm_type: str = "dpmsolver++", solver_type: str = "midpoint",
        lower_order_final: bool = True, euler_at_final: bool = False, use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False, use_beta_sigmas: bool = False, use_flow_sigmas: bool = False,
        flow_shift: float = 1.0, lambda_min_clipped: float = -float("inf"), variance_type: str | None = None,
        timestep_spacing: str = "linspace", steps_offset: int = 0,
    ) -> None:  # fmt: skip
        self._check_options(ALGORITHMS)
        self._train()
        self.timesteps = self.timesteps.flip(0)

    def set_timesteps(  # type: ignore[override]
        self, num_inference_steps: int | None = None, device: Device = None
    ) -> None:
        """Begin a run of ``num_inference_steps`` rising timesteps."""
        if num_inference_steps is None:
            raise ValueError("give `num_inference_steps`")
        c, table, steps = self.config, self._table(), num_inference_steps
        self.noisiest_timestep = self._last_timestep() - 1
        times = spacing.rising(c.timestep_spacing, steps, c.num_train_timesteps, self.noisiest_timestep, c.steps_offset)
        levels = self._flow_levels(steps) if c.use_flow_sigmas else self._transform(table, steps)
        if levels is None:
            levels, last = np.interp(times, np.arange(len(table)), table), float(table[self.noisiest_timestep])
        else:
            last = float(levels[-1])
            times = levels * len(self) if c.use_flow_sigmas else spacing.sigma_to_t(levels, np.log(table))
            times = times.round() if c.use_karras_sigmas else times
        _, first = np.unique(times, return_index=True)
        self._launch(levels, last, times[np.sort(first)], device)
