"""Zhao et al. (2023), "UniPC: A Unified Predictor-Corrector Framework for Fast Sampling"."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ..core.config import register_to_config
from . import spacing
from .base import KARRAS_COMPATIBLES, Device, SchedulerMixin, SchedulerOutput, combine, one_of
from .exponential import LambdaScheduler, Level
from .noise import Array
from .sigma import TRANSFORMS
from .updates import sample_of


def unipc(
    levels: Sequence[Level], order: int, data: bool, solver_type: str, corrector: bool
) -> tuple[float, list[float], float]:
    """``a``, the weights of the past model outputs (newest first) and that of the one at the target.

    ``levels`` are the target, the current one and the past, backwards. Algorithm 1 (UniC) with ``corrector``,
    algorithm 2 (UniP) without; ``data`` says that the network's outputs are ``x_0`` and not ε.
    """
    t, s, *past = levels
    h = t.lam - s.lam
    hh = -h if data else h
    a, scale = (t.sigma / s.sigma, t.alpha) if data else (t.alpha / s.alpha, t.sigma)
    phi1 = math.expm1(hh)
    b_h = hh if solver_type == "bh1" else phi1
    ratios = [(level.lam - s.lam) / h for level in past[: order - 1]]
    rho = _rho(ratios, hh, phi1, b_h, order, corrector)
    weights = [-scale * b_h * w / r for w, r in zip(rho, ratios, strict=False)]
    target = -scale * b_h * rho[-1] if corrector else 0.0
    return a, [-scale * phi1 - sum(weights) - target, *weights], target


def _rho(ratios: list[float], hh: float, phi1: float, b_h: float, order: int, corrector: bool) -> list[float]:
    """The solution of eq. 5: weights of the differences of model outputs."""
    if order == 1:
        return [0.5] if corrector else []
    if order == 2 and not corrector:
        return [0.5]
    right, phi = [], phi1 / hh - 1
    for k in range(1, order + 1):
        right.append(phi * math.factorial(k) / b_h)
        phi = phi / hh - 1 / math.factorial(k + 1)
    rows = order if corrector else order - 1
    nodes = np.array([*ratios, 1.0])[:rows]
    matrix = np.vander(nodes, rows, increasing=True).T
    return list(map(float, np.linalg.solve(matrix, np.array(right[:rows]))))


class UniPCMultistepScheduler(LambdaScheduler):
    """UniPC: a multistep predictor, and a corrector that reuses the next step's model output."""

    _compatibles = KARRAS_COMPATIBLES
    _exclusive = TRANSFORMS  # with flow levels, these transform before the levels become flow's

    @register_to_config
    def __init__(
        self, num_train_timesteps: int = 1000, beta_start: float = 0.0001, beta_end: float = 0.02,
        beta_schedule: str = "linear", trained_betas: Array | list[float] | None = None, solver_order: int = 2,
        prediction_type: str = "epsilon", thresholding: bool = False, dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0, predict_x0: bool = True, solver_type: str = "bh2",
        lower_order_final: bool = True, disable_corrector: list[int] = [],  # noqa: B006 (the ecosystem's signature; never written to)
        solver_p: SchedulerMixin | None = None, use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False, use_beta_sigmas: bool = False, use_flow_sigmas: bool = False,
        flow_shift: float = 1.0, timestep_spacing: str = "linspace", steps_offset: int = 0,
        final_sigmas_type: str = "zero", rescale_betas_zero_snr: bool = False, use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential", sigma_min: float | None = None, sigma_max: float | None = None,
        shift_terminal: float | None = None,
    ) -> None:  # fmt: skip
        if solver_type in ("midpoint", "heun", "logrho"):  # of DPM-Solver and DEIS
            self.register_to_config(solver_type="bh2")
        one_of("solver_type", self.config.solver_type, ("bh1", "bh2"))
        if shift_terminal is not None and not use_flow_sigmas:
            raise ValueError(f"shift_terminal={shift_terminal} needs use_flow_sigmas=True")
        if prediction_type == "flow_prediction" and not predict_x0:
            raise ValueError("prediction_type='flow_prediction' and predict_x0=False contradict each other")
        self._train()
        self.predict_x0 = predict_x0
        self.disable_corrector = list(disable_corrector)
        self.solver_p = solver_p

    def _forget(self) -> None:
        super()._forget()
        self.last_sample: Tensor | None = None
        self.this_order = 0

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Device = None, sigmas: list[float] | None = None,
        mu: float | None = None,
    ) -> None:  # fmt: skip
        """Begin a run of ``num_inference_steps`` steps, or over given flow levels ``sigmas``; ``mu`` shifts those."""
        c = self.config
        if sigmas is not None:
            spacing.check_descending("sigmas", sigmas)
            if not c.use_flow_sigmas:
                raise ValueError("`sigmas` needs the option use_flow_sigmas=True")
            self._refuse_custom("sigmas", *TRANSFORMS)
            num_inference_steps = len(sigmas)
        if num_inference_steps is None:
            raise ValueError("give `num_inference_steps` or `sigmas`")
        if c.use_dynamic_shifting and mu is None:
            raise ValueError("use_dynamic_shifting=True needs `mu` (the shift at the run's resolution)")
        levels, times = self._run_levels(num_inference_steps, sigmas, mu)
        given = c.use_flow_sigmas or any(c.get(name) for name in TRANSFORMS)
        last = float(levels[-1]) if given and c.final_sigmas_type == "sigma_min" else self._last_sigma()
        self._launch(levels, last, times, device)
        if self.solver_p is not None:
            self.solver_p.set_timesteps(self.num_inference_steps, device=device)  # type: ignore[attr-defined]

    def _run_levels(self, steps: int, sigmas: list[float] | None, mu: float | None) -> tuple[Array, Array]:
        c, table = self.config, self._table()
        changed = self._transform(table[::-1], steps)
        if changed is None and not c.use_flow_sigmas:
            return self._levels(steps)
        if changed is None:
            train = c.num_train_timesteps
            levels = np.linspace(1, 1 / train, steps + 1)[:-1] if sigmas is None else np.array(sigmas)
            levels = self._shifted(levels, mu)
        elif c.use_karras_sigmas and c.use_flow_sigmas:
            levels = changed / (changed + 1)
        else:
            times = spacing.sigma_to_t(changed, np.log(table))
            return changed, times.round() if c.use_karras_sigmas else times
        return levels, levels * c.num_train_timesteps

    def _shifted(self, levels: Array, mu: float | None) -> Array:
        c = self.config
        levels = (
            self.time_shift(mu or 0.0, 1.0, levels) if c.use_dynamic_shifting else spacing.shift(levels, c.flow_shift)
        )
        if c.shift_terminal:
            levels = self.stretch_shift_to_terminal(levels)
        if abs(levels[0] - 1) < 1e-6:  # at α = 0 the predictor would divide by zero
            levels[0] -= 1e-6
        return levels

    def time_shift(self, mu: float, sigma: float, t: Any) -> Any:
        """The resolution-dependent shift of levels ``t`` that ``time_shift_type`` names."""
        curve = spacing.shift_exponential if self.config.time_shift_type == "exponential" else spacing.shift_linear
        return curve(mu, sigma, t)

    def stretch_shift_to_terminal(self, t: Any) -> Any:
        """Levels stretched to end at ``shift_terminal``."""
        return spacing.stretch_to_terminal(t, self.config.shift_terminal)

    def _convert(self, model_output: Tensor, sample: Tensor, level: Level) -> Tensor:
        if self.predict_x0:
            return self._x0(model_output, sample, level)
        return self._data_or_noise(False, model_output, sample, level)

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor]:
        """Correct the sample with the model output at it, then predict the next one; shapes ``(B, C, …)``."""
        i, c = self._enter(timestep, model_output, sample), self.config
        converted = self._convert(model_output, sample, self._grid[i])
        if i > 0 and i - 1 not in self.disable_corrector and self.last_sample is not None:
            sample = self._correct(converted, self.last_sample, self.this_order, i)
        self._remember(converted)
        order = min(c["solver_order"], len(self.timesteps) - i) if c["lower_order_final"] else c["solver_order"]
        self.this_order = min(order, self.lower_order_nums + 1)
        self.last_sample = sample
        prev_sample = self._predict(model_output, timestep, sample, i, self.this_order)
        self.lower_order_nums = min(self.lower_order_nums + 1, c["solver_order"])
        self._advance()
        return SchedulerOutput(prev_sample) if return_dict else (prev_sample,)

    def _correct(self, converted: Tensor, last_sample: Tensor, order: int, i: int) -> Tensor:
        levels = [self._grid[i - k] for k in range(order + 1)]
        a, b, target = unipc(levels, order, self.predict_x0, self.config["solver_type"], True)
        return combine((a, last_sample), *self._outputs(b), (target, converted))

    def _predict(self, model_output: Tensor, timestep: Any, sample: Tensor, i: int, order: int) -> Tensor:
        if self.solver_p is not None:
            prev_sample: Tensor = self.solver_p.step(model_output, timestep, sample).prev_sample  # type: ignore[attr-defined]
            return prev_sample
        grid = self._grid
        order = 1 if math.isinf(grid[i + 1].lam) else order  # nothing to extrapolate with at σ = 0
        levels = [grid[i + 1], *(grid[i - k] for k in range(order))]
        a, b, _ = unipc(levels, order, self.predict_x0, self.config["solver_type"], False)
        return combine((a, sample), *self._outputs(b))

    # -- the parts of a step under the ecosystem's names -----------------------------------------------

    def multistep_uni_p_bh_update(
        self, model_output: Tensor, *args: Any, sample: Tensor | None = None, order: int | None = None, **kwargs: Any
    ) -> Tensor:
        """Predict the sample of the next level from the remembered model outputs.

        Raises:
            ValueError: no ``sample``, no ``order``, or no step under way.
        """
        i = self._here()
        return self._predict(model_output, self.timesteps[i], sample_of(args, sample), i, _order(args, order))

    def multistep_uni_c_bh_update(
        self, this_model_output: Tensor, *args: Any, last_sample: Tensor | None = None,
        this_sample: Tensor | None = None, order: int | None = None, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        """Correct the sample of this level by the converted model output at it; ``this_sample`` has no influence.

        Raises:
            ValueError: no ``last_sample``, no ``order``, or no step under way.
        """
        tensors = [a for a in args if isinstance(a, Tensor) and a.ndim > 0]  # the last and this sample, if by place
        last_sample = sample_of(tensors[:1], last_sample)
        return self._correct(this_model_output, last_sample, _order(args, order), self._here())


def _order(args: Sequence[Any], order: int | None) -> int:
    """By name, or by place as the last argument."""
    if order is None and args and isinstance(args[-1], int):
        order = args[-1]
    if order is None:
        raise ValueError("`order` is missing: give the order of this step")
    return order
