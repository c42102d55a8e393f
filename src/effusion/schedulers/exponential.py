"""Base of the exponential integrators: solvers in the half log-SNR ``λ = log(α / σ)``.

Lu et al. (2022), "DPM-Solver" and "DPM-Solver++"; Zhang & Chen (2023), "DEIS"; Zhao et al. (2023), "UniPC".
Every one of their steps is linear, ``x' = a x + Σ b_k m_k + c z``, in the sample, the last model outputs and
new noise; the coefficients depend on the noise levels only.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import prediction, spacing
from .alpha import denoise
from .base import Device, combine, like
from .noise import Array
from .sigma import TRANSFORMS, SigmaScheduler
from .updates import Updates, sample_of


class Level(NamedTuple):
    """A noise level: ``x = alpha x_0 + sigma ε``, ``lam = log(alpha / sigma)``."""

    alpha: float
    sigma: float
    lam: float

    @staticmethod
    def of(alpha: float, sigma: float) -> Level:
        return Level(alpha, sigma, _log(alpha) - _log(sigma))


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf


class LambdaScheduler(SigmaScheduler, Updates):
    """Scaled samples ``α x_0 + σ ε``, a memory of the last model outputs, and runs laid out in λ."""

    _predictions = prediction.KINDS
    _extra_point = 1  # runs are laid out with one more point, which is the end
    _clips_lambda = False
    _spacing_option = True
    model_outputs: list[Any]  # the last ones, newest last; None before there are so many
    lower_order_nums: int

    def _train(self) -> None:
        super()._train()
        self.alpha_t = torch.sqrt(self.alphas_cumprod)
        self.sigma_t = torch.sqrt(1 - self.alphas_cumprod)
        self.lambda_t = torch.log(self.alpha_t) - torch.log(self.sigma_t)
        self._flow_shift = float(self.config.get("flow_shift", 1.0))
        self._begin(np.arange(len(self.betas))[::-1], self._table(), None, torch.float32)
        self._forget()

    def _forget(self) -> None:
        self.model_outputs = [None] * self._memory
        self.lower_order_nums = 0

    @property
    def _memory(self) -> int:
        return int(self.config.solver_order)

    # -- laying out a run ------------------------------------------------------------------------

    def _shift_by(self, mu: float | None) -> None:
        """Take the shift of flow levels from ``mu`` for this run, as the configuration must allow."""
        c = self.config
        self._flow_shift = float(c.get("flow_shift", 1.0))
        if mu is None:
            return
        if not c.get("use_dynamic_shifting") or c.get("time_shift_type") != "exponential":
            raise ValueError("`mu` needs the options use_dynamic_shifting=True and time_shift_type='exponential'")
        self._flow_shift = math.exp(mu)

    def _last_timestep(self) -> int:
        """The number of training timesteps whose λ is not below ``lambda_min_clipped``."""
        train = int(self.config.num_train_timesteps)
        if not self._clips_lambda:
            return train
        return train - int(np.searchsorted(self.lambda_t.numpy()[::-1], self.config.lambda_min_clipped))

    def _spaced(self, steps: int) -> Array:
        c = self.config
        kind = c.timestep_spacing if self._spacing_option else "linspace"
        offset = c.get("steps_offset", 0)
        return spacing.timesteps(
            kind, steps, c.num_train_timesteps, offset, last=self._last_timestep(), extra=self._extra_point
        )

    def _rounds_karras(self) -> bool:
        return True

    def _levels(self, steps: int, timesteps: Any = None) -> tuple[Array, Array]:
        """The noise levels of a run, ``(steps,)``, without its end, and their timesteps, ``(steps,)``."""
        c = self.config
        table = self._table()
        if timesteps is not None:
            self._check_custom(timesteps, c.num_train_timesteps)
            self._refuse_custom("timesteps", *TRANSFORMS, "use_lu_lambdas")
        if c.get("use_flow_sigmas"):
            levels = self._flow_levels(steps)
            return levels, levels * c.num_train_timesteps
        times = np.array(timesteps).astype(np.int64) if timesteps is not None else self._spaced(steps).astype(np.int64)
        if c.get("use_lu_lambdas"):
            changed: Array | None = spacing.lu(float(np.log(table[0])), float(np.log(table[-1])), steps)
        else:
            changed = self._transform(table[::-1], steps)
        if changed is None:
            return np.interp(times, np.arange(len(table)), table), times
        times = spacing.sigma_to_t(changed, np.log(table))
        if (c.get("use_karras_sigmas") or c.get("use_lu_lambdas")) and self._rounds_karras():
            times = times.round()
        return changed, times

    def _flow_levels(self, steps: int) -> Array:
        """Descending flow-matching levels, shifted; ``(steps,)``."""
        levels = 1.0 - np.linspace(1, 1 / self.config.num_train_timesteps, steps + 1)
        return np.asarray(spacing.shift(levels, self._flow_shift)[::-1][:-1].copy())

    def _launch(self, levels: Array, last: float, times: Array, device: Device) -> None:
        self.num_inference_steps = len(times)
        self._begin(times, np.append(levels, last).astype(np.float32), device, torch.int64)
        self._forget()

    # -- noise levels ----------------------------------------------------------------------------

    def _alpha_sigma(self, sigma: Any) -> tuple[Any, Any]:
        """``α, σ`` of a noise-to-signal ratio (or of a flow-matching level)."""
        if self.config.get("use_flow_sigmas"):
            return 1 - sigma, sigma
        alpha = 1 / (sigma * sigma + 1) ** 0.5
        return alpha, sigma * alpha

    def _sigma_to_alpha_sigma_t(self, sigma: Any) -> tuple[Any, Any]:
        return self._alpha_sigma(sigma)

    @property
    def _grid(self) -> list[Level]:
        """The noise levels of this run on the host."""
        grid: list[Level] = self._derived(
            "sigmas", "grid", lambda tensor: [Level.of(*self._alpha_sigma(s)) for s in tensor.tolist()]
        )
        return grid

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """``α x_0 + σ ε``; samples ``(B, …)``, timesteps ``(B,)`` of this run."""
        sigma = like(self._near("sigmas", original_samples)[self._positions(timesteps)], original_samples)
        alpha, sigma = self._alpha_sigma(sigma)
        noisy: Tensor = alpha * original_samples + sigma * noise
        return noisy

    def _index_of_unknown(self, value: float) -> int:
        return len(self.timesteps) - 1  # a timestep beside the run counts as its end

    # -- model outputs ---------------------------------------------------------------------------

    def _check_shapes(self, model_output: Tensor, sample: Tensor) -> None:
        learned = self.config.get("variance_type") in ("learned", "learned_range")
        if not (learned and model_output.shape[1] == 2 * sample.shape[1]):
            super()._check_shapes(model_output, sample)

    def _data_or_noise(self, data: bool, model_output: Tensor, sample: Tensor, level: Level) -> Tensor:
        """What the solver integrates: the denoised estimate, or the noise; a learned variance is left out."""
        model_output = model_output[:, : sample.shape[1]]
        return self._x0(model_output, sample, level) if data else self._eps(model_output, sample, level)

    def _convert(self, model_output: Tensor, sample: Tensor, level: Level) -> Tensor:
        return self._data_or_noise(True, model_output, sample, level)

    def convert_model_output(
        self, model_output: Tensor, *args: Any, sample: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """What the solver integrates, at the current step; shaped as ``sample``.

        Raises:
            ValueError: no ``sample``, or no step under way.
        """
        sample = sample_of(args, sample)
        self._check_shapes(model_output, sample)
        return self._convert(model_output, sample, self._grid[self._here()])

    def _x0(self, model_output: Tensor, sample: Tensor, level: Level) -> Tensor:
        """The denoised estimate, thresholded if configured; shaped as ``sample``."""
        c = self.config
        x0 = denoise(c["prediction_type"], model_output, sample, level.alpha, level.sigma)
        if c.get("thresholding"):
            return prediction.threshold(x0, c["dynamic_thresholding_ratio"], c["sample_max_value"])
        return x0

    def _eps(self, model_output: Tensor, sample: Tensor, level: Level) -> Tensor:
        """The noise in ``sample``, of the thresholded estimate if configured; shaped as ``sample``."""
        if self.config.get("thresholding"):
            x0 = self._x0(model_output, sample, level)
            return torch.sub(sample, x0, alpha=level.alpha).div_(level.sigma)
        a, b = prediction.noise(self.config["prediction_type"], level.alpha, level.sigma)
        return model_output if a == 0 and b == 1 else combine((b, model_output), (a, sample))

    def _remember(self, model_output: Tensor) -> None:
        self.model_outputs = [*self.model_outputs[1:], model_output]

    def _outputs(self, weights: list[float]) -> list[tuple[float, Tensor]]:
        """The last model outputs, newest first, each with its weight."""
        return list(zip(weights, reversed(self.model_outputs), strict=False))
