"""Liu et al. (2022), "Pseudo Numerical Methods for Diffusion Models on Manifolds"."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.config import register_to_config
from . import prediction
from .alpha import AlphaScheduler
from .base import KARRAS_COMPATIBLES, Device, SchedulerMixin, SchedulerOutput, combine
from .noise import Array

# Adams-Bashforth: weights of the newest, second newest, … slope (eq. 12 of the paper is the last row)
ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
RUNGE_KUTTA = (1 / 6, 1 / 3, 1 / 3, 1 / 6)


class PNDMScheduler(AlphaScheduler):
    """Pseudo Runge-Kutta steps (algorithm 1) to start, then pseudo linear multistep (algorithm 2).

    ``skip_prk_steps`` starts with an improved Euler step instead, as Stable Diffusion does.
    """

    _compatibles = KARRAS_COMPATIBLES
    _predictions = ("epsilon", "v_prediction")
    pndm_order = 4

    @register_to_config
    def __init__(
        self, num_train_timesteps: int = 1000, beta_start: float = 0.0001, beta_end: float = 0.02,
        beta_schedule: str = "linear", trained_betas: Array | list[float] | None = None,
        skip_prk_steps: bool = False, set_alpha_to_one: bool = False, prediction_type: str = "epsilon",
        timestep_spacing: str = "leading", steps_offset: int = 0,
    ) -> None:  # fmt: skip
        self._train()
        self._forget()

    def _forget(self) -> None:
        self.counter = 0
        self.ets: list[Tensor] = []  # the last slopes, oldest first
        self.cur_model_output: Tensor | None = None
        self.cur_sample: Tensor | None = None

    def set_timesteps(self, num_inference_steps: int, device: Device = None) -> None:
        """Begin a run; its timesteps repeat those that the starting steps visit more than once."""
        times = self._spaced(num_inference_steps)[::-1]
        self.num_inference_steps = num_inference_steps
        if self.config.skip_prk_steps:
            self.prk_timesteps = np.array([])
            self.plms_timesteps = np.concatenate([times[:-1], times[-2:-1], times[-1:]])[::-1].copy()
        else:
            if num_inference_steps < self.pndm_order:
                raise ValueError(
                    f"num_inference_steps={num_inference_steps}: the starting steps of PNDM need at least "
                    f"{self.pndm_order}; take more steps, or set skip_prk_steps=True"
                )
            middle = np.tile([0, len(self) // num_inference_steps // 2], self.pndm_order)
            visited = times[-self.pndm_order :].repeat(2) + middle
            self.prk_timesteps = visited[:-1].repeat(2)[1:-1][::-1].copy()
            self.plms_timesteps = times[:-3][::-1].copy()
        self._begin(np.concatenate([self.prk_timesteps, self.plms_timesteps]), None, device, torch.int64)
        self._forget()

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor]:
        """One call of the network further: a stage of a starting step, or a multistep step; shapes ``(B, C, …)``."""
        self._check_run()
        if self.counter < len(self.prk_timesteps):
            return self.step_prk(model_output, timestep, sample, return_dict)
        return self.step_plms(model_output, timestep, sample, return_dict)

    def step_prk(
        self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor]:
        """A stage of a pseudo Runge-Kutta step: algorithm 1."""
        self._check_run()
        self._check_shapes(model_output, sample)
        assert self.num_inference_steps is not None
        stage = self.counter % 4
        half = 0 if self.counter % 2 else len(self) // self.num_inference_steps // 2
        before = int(self._time(timestep)) - half
        start = int(self.prk_timesteps[self.counter // 4 * 4])
        if stage == 0:
            self.cur_model_output = model_output * RUNGE_KUTTA[0]
            self.ets.append(model_output)
            self.cur_sample = sample
        else:
            assert self.cur_model_output is not None
            self.cur_model_output.add_(model_output, alpha=RUNGE_KUTTA[stage])
            if stage == 3:
                model_output, self.cur_model_output = self.cur_model_output, None
        assert self.cur_sample is not None
        prev_sample = self._get_prev_sample(self.cur_sample, start, before, model_output)
        self.counter += 1
        return SchedulerOutput(prev_sample) if return_dict else (prev_sample,)

    def step_plms(
        self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor]:
        """A pseudo linear multistep step: algorithm 2; the first of a run without starting steps takes two calls."""
        self._check_run()
        self._check_shapes(model_output, sample)
        assert self.num_inference_steps is not None
        if not self.config.skip_prk_steps and len(self.ets) < 3:
            raise ValueError("a multistep step before the 12 stages of the starting steps; call `step` from the start")
        stride = len(self) // self.num_inference_steps
        now = int(self._time(timestep))
        before = now - stride
        if self.counter == 1:  # second half of the improved Euler step: again from where the first began
            assert self.cur_sample is not None
            now, before = now + stride, now
            slope = torch.add(model_output, self.ets[-1]).mul_(0.5)
            sample, self.cur_sample = self.cur_sample, None
        else:
            self.ets = [*self.ets[-3:], model_output]
            if self.counter == 0:
                self.cur_sample = sample
            weights = ADAMS_BASHFORTH[len(self.ets) - 1]
            slope = combine(*zip(weights, reversed(self.ets), strict=True))
        prev_sample = self._get_prev_sample(sample, now, before, slope)
        self.counter += 1
        return SchedulerOutput(prev_sample) if return_dict else (prev_sample,)

    def _get_prev_sample(self, sample: Tensor, timestep: int, prev_timestep: int, model_output: Tensor) -> Tensor:
        """The transfer φ of eq. 11: from ``timestep`` to ``prev_timestep`` along ``model_output``."""
        (bar, alpha, sigma), (bar_prev, _, sigma_prev) = self._level(timestep), self._level(prev_timestep)
        a, b = prediction.noise(self.config["prediction_type"], float(alpha), float(sigma))
        norm = bar * sigma_prev + np.sqrt(bar * (type(bar)(1) - bar) * bar_prev)
        along = -float((bar_prev - bar) / norm)
        kept = float(np.sqrt(bar_prev / bar))
        return combine((kept + along * a, sample), (along * b, model_output))


class IPNDMScheduler(SchedulerMixin):
    """The improved PNDM of Zhang & Chen (2023): Adams-Bashforth on a circle, ``x = cos(θ) x_0 + sin(θ) ε``."""

    @register_to_config
    def __init__(self, num_train_timesteps: int = 1000, trained_betas: Array | list[float] | None = None) -> None:
        self.set_timesteps(num_train_timesteps)
        self.num_inference_steps = None
        self.pndm_order = 4

    def set_timesteps(self, num_inference_steps: int, device: Device = None) -> None:
        """Begin a run of ``num_inference_steps`` angles from π/2 to 0."""
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps={num_inference_steps}: take at least one step")
        self.num_inference_steps = num_inference_steps
        steps = torch.cat([torch.linspace(1, 0, num_inference_steps + 1)[:-1], torch.tensor([0.0])])
        if self.config.trained_betas is not None:
            self.betas = torch.tensor(self.config.trained_betas, dtype=torch.float32)
        else:
            self.betas = torch.sin(steps * torch.pi / 2) ** 2
        self.alphas = (1.0 - self.betas**2) ** 0.5
        angles = torch.atan2(self.betas, self.alphas) / torch.pi * 2
        self._begin(angles[:-1], None, device, torch.float32)
        self.ets: list[Tensor] = []

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor]:
        """A linear multistep step of up to fourth order; shapes ``(B, C, …)``."""
        i = self._enter(timestep, model_output, sample)
        alphas, betas = self._list("alphas"), self._list("betas")
        slope = combine((betas[i], sample), (alphas[i], model_output))
        self.ets = [*self.ets[-3:], slope]
        if len(self.ets) > 1:
            slope = combine(*zip(ADAMS_BASHFORTH[len(self.ets) - 1], reversed(self.ets), strict=True))
        # x_0 = (x - σ e) / α, then x' = α' x_0 + σ' e; in this order, since α starts at 0
        prev_sample = torch.add(sample, slope, alpha=-betas[i]).div_(max(alphas[i], 1e-8))
        prev_sample.mul_(alphas[i + 1]).add_(slope, alpha=betas[i + 1])
        self._advance()
        return SchedulerOutput(prev_sample) if return_dict else (prev_sample,)
