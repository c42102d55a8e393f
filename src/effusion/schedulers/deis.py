"""Zhang & Chen (2023), "Fast Sampling of Diffusion Models with Exponential Integrator": DEIS, multistep."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..core.config import register_to_config
from .base import KARRAS_COMPATIBLES, Device, SchedulerOutput, combine, one_of
from .dpmsolver import multistep_order
from .exponential import LambdaScheduler, Level
from .noise import Array
from .updates import DEISUpdates


def log_rho(levels: Sequence[Level], order: int) -> tuple[float, list[float]]:
    """``a`` and ``b`` of ``x' = a x + Σ b_k ε_k``: the noise is a polynomial in ``log ρ``, ``ρ = σ / α``.

    The weights are the integrals of its Lagrange basis from ``ρ_s`` to ``ρ_t`` (eq. 15 of the paper).
    """
    t, s = levels[:2]
    a = t.alpha / s.alpha
    rho_t, rho_s = t.sigma / t.alpha, s.sigma / s.alpha
    if order == 1:
        return a, [t.alpha * (rho_t - rho_s)]
    logs = [-level.lam for level in levels[1 : order + 1]]
    weights = []
    for k, node in enumerate(logs):
        others = [other for j, other in enumerate(logs) if j != k]
        norm = math.prod(node - other for other in others)
        weights.append(t.alpha * (_integral(rho_t, others) - _integral(rho_s, others)) / norm)
    return a, weights


def _integral(rho: float, nodes: Sequence[float]) -> float:
    """The antiderivative of ``Π (log ρ - node)`` over one or two nodes."""
    if rho == 0:
        return 0.0
    u = math.log(rho)
    if len(nodes) == 1:
        return rho * (u - 1 - nodes[0])
    c, d = nodes
    return rho * (u * u - 2 * u + 2 - (c + d) * (u - 1) + c * d)


class DEISMultistepScheduler(LambdaScheduler, DEISUpdates):
    """DEIS with the log-ρ interpolation, order 1 to 3 (tAB-DEIS of the paper in ``log ρ``)."""

    _compatibles = KARRAS_COMPATIBLES

    @register_to_config
    def __init__(
        self, num_train_timesteps: int = 1000, beta_start: float = 0.0001, beta_end: float = 0.02,
        beta_schedule: str = "linear", trained_betas: Array | list[float] | None = None, solver_order: int = 2,
        prediction_type: str = "epsilon", thresholding: bool = False, dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0, algorithm_type: str = "deis", solver_type: str = "logrho",
        lower_order_final: bool = True, use_karras_sigmas: bool = False, use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False, use_flow_sigmas: bool = False, flow_shift: float = 1.0,
        timestep_spacing: str = "linspace", steps_offset: int = 0, use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
    ) -> None:  # fmt: skip
        if algorithm_type in ("dpmsolver", "dpmsolver++"):  # of DPM-Solver
            self.register_to_config(algorithm_type="deis")
        one_of("algorithm_type", self.config.algorithm_type, ("deis",))
        if solver_type in ("midpoint", "heun", "bh1", "bh2"):  # of DPM-Solver and UniPC
            self.register_to_config(solver_type="logrho")
        one_of("solver_type", self.config.solver_type, ("logrho",))
        one_of("solver_order", solver_order, (1, 2, 3))
        self._train()

    def set_timesteps(self, num_inference_steps: int, device: Device = None, mu: float | None = None) -> None:
        """Begin a run of ``num_inference_steps`` steps; ``mu`` shifts flow levels."""
        self._shift_by(mu)
        levels, times = self._levels(num_inference_steps)
        given = any(self.config.get(name) for name in self._exclusive)
        self._launch(levels, float(levels[-1]) if given else float(self._table()[0]), times, device)

    def _convert(self, model_output: Tensor, sample: Tensor, level: Level) -> Tensor:
        return self._eps(model_output, sample, level)

    def _weights(self, order: int) -> tuple[float, list[float], float]:
        i, grid = self._here(), self._grid
        return *log_rho([grid[i + 1], *(grid[i - k] for k in range(order))], order), 0.0

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor]:
        """One multistep step; shapes ``(B, C, …)``."""
        i, c = self._enter(timestep, model_output, sample), self.config
        self._remember(self._convert(model_output, sample, self._grid[i]))
        lower = c["lower_order_final"] and len(self.timesteps) < 15
        order = multistep_order(c["solver_order"], self.lower_order_nums, i, len(self.timesteps), lower, lower)
        a, b, _ = self._weights(order)
        prev_sample = combine((a, sample), *self._outputs(b))
        self.lower_order_nums = min(self.lower_order_nums + 1, c["solver_order"])
        self._advance()
        return SchedulerOutput(prev_sample) if return_dict else (prev_sample,)
