"""Networks with the preconditioning of Karras et al. (2022), table 1: their Euler and DPM-Solver++ steps."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.config import register_to_config
from ..core.random import Generators, randn_tensor
from . import prediction, spacing
from .base import DenoisedOutput, Device, SchedulerOutput, combine, exactly_one, one_of
from .brownian import BrownianNoise
from .dpmsolver import multistep, multistep_order
from .euler import churn
from .exponential import Level
from .karras import KarrasScheduler, euler
from .sigma import upcast
from .updates import Updates, sample_of

EDMEulerSchedulerOutput = DenoisedOutput


class EDMScheduler(KarrasScheduler):
    """Noise levels between ``sigma_min`` and ``sigma_max``, and the preconditioning of inputs and outputs."""

    _predictions = ("epsilon", "v_prediction")
    _ramp_dtype = torch.float32

    def _train(self) -> None:
        c = self.config
        prediction.check(c.prediction_type, self._predictions, type(self).__name__)
        one_of("sigma_schedule", c.sigma_schedule, ("karras", "exponential"))
        one_of("final_sigmas_type", c.final_sigmas_type, ("zero", "sigma_min"))
        self._lay_out(self._ramp(c.num_train_timesteps), None)
        self.num_inference_steps = None

    def _lay_out(self, ramp: Tensor, device: Device) -> None:
        c = self.config
        if c.sigma_schedule == "karras":  # in the precision of the ramp: a Brownian path tells bits apart
            low, high = c.sigma_min ** (1 / c.rho), c.sigma_max ** (1 / c.rho)
            levels = ((high + ramp * (low - high)) ** c.rho).float().numpy()
        else:
            levels = torch.linspace(math.log(c.sigma_min), math.log(c.sigma_max), len(ramp)).exp().flip(0).numpy()
        self.num_inference_steps = len(levels)
        last = levels[-1] if c.final_sigmas_type == "sigma_min" else np.float32(0)
        times = self.precondition_noise(torch.from_numpy(levels))
        self._begin(times, np.append(levels, last), device, torch.float32)

    def _ramp(self, steps: int) -> Tensor:
        return torch.linspace(0, 1, steps, dtype=self._ramp_dtype)

    @property
    def init_noise_sigma(self) -> float:
        return float((self.config.sigma_max**2 + 1) ** 0.5)

    def precondition_noise(self, sigma: Any) -> Tensor:
        """What the network is called with for a noise level: ``log(σ) / 4``."""
        return 0.25 * torch.log(sigma if isinstance(sigma, Tensor) else torch.tensor([sigma]))

    def _get_conditioning_c_in(self, sigma: Any) -> Any:
        return 1 / (sigma**2 + self.config.sigma_data**2) ** 0.5

    def precondition_inputs(self, sample: Tensor, sigma: Any) -> Tensor:
        """``c_in x``."""
        return torch.mul(sample, self._get_conditioning_c_in(sigma))

    def precondition_outputs(self, sample: Tensor, model_output: Tensor, sigma: Any) -> Tensor:
        """The denoised estimate ``c_skip x + c_out F``."""
        variance = self.config["sigma_data"] ** 2
        sigma = float(sigma)
        c_out = sigma * variance**0.5 / (sigma**2 + variance) ** 0.5
        sign = 1 if self.config["prediction_type"] == "epsilon" else -1
        return combine((variance / (sigma**2 + variance), sample), (sign * c_out, model_output))

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """``c_in x``, the sample as the network was trained to see it; same shape."""
        sigma = self._sigma(timestep)
        self.is_scale_input_called = True
        return self.precondition_inputs(sample, sigma)


class EDMEulerScheduler(EDMScheduler):
    """Karras et al. (2022), algorithm 2 with Euler steps only, for networks with EDM's preconditioning."""

    _ramp_dtype = torch.float64

    @register_to_config
    def __init__(
        self, sigma_min: float = 0.002, sigma_max: float = 80.0, sigma_data: float = 0.5,
        sigma_schedule: str = "karras", num_train_timesteps: int = 1000, prediction_type: str = "epsilon",
        rho: float = 7.0, final_sigmas_type: str = "zero",
    ) -> None:  # fmt: skip
        self._train()

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Device = None,
        sigmas: Tensor | list[float] | None = None,
    ) -> None:  # fmt: skip
        """Begin a run of ``num_inference_steps`` steps; ``sigmas`` are the ramp from 0 to 1 that makes the levels."""
        exactly_one(num_inference_steps=num_inference_steps, sigmas=sigmas)
        if sigmas is not None:
            spacing.check_descending("1 - sigmas", [1 - float(s) for s in sigmas])
            self._lay_out(torch.tensor([float(s) for s in sigmas], dtype=self._ramp_dtype), device)
        else:
            assert num_inference_steps is not None
            self._lay_out(self._ramp(num_inference_steps), device)

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, s_churn: float = 0.0, s_tmin: float = 0.0,
        s_tmax: float = float("inf"), s_noise: float = 1.0, generator: Generators = None, return_dict: bool = True,
        pred_original_sample: Tensor | None = None,
    ) -> DenoisedOutput | tuple[Tensor, Tensor]:  # fmt: skip
        """One Euler step, from ``pred_original_sample`` where it is given; shapes ``(B, C, …)``."""
        self._refuse_integer(timestep)
        i = self._enter(timestep, model_output, sample)
        self._remind()
        sigmas = self._list("sigmas")
        sigma, sample = sigmas[i], upcast(sample)
        gamma = min(s_churn / (len(sigmas) - 1), 2**0.5 - 1) if s_tmin <= sigma <= s_tmax else 0.0
        if gamma > 0:
            sample = churn(sample, sigma, gamma, s_noise, model_output, generator)
        sigma *= gamma + 1
        x0 = pred_original_sample
        if x0 is None:
            x0 = self.precondition_outputs(sample, model_output, sigma)
        prev_sample = euler(sample, x0, sigma, sigmas[i + 1]).to(model_output.dtype)
        self._advance()
        return DenoisedOutput(prev_sample, x0) if return_dict else (prev_sample, x0)


class EDMMultistepScheduler(EDMScheduler, Updates):
    """DPM-Solver++ multistep steps (see :mod:`.dpmsolver`) with ``α = 1``."""

    model_outputs: list[Any]
    lower_order_nums: int

    def set_timesteps(self, num_inference_steps: int | None = None, device: Device = None) -> None:
        """Begin a run of ``num_inference_steps`` steps."""
        if num_inference_steps is None or num_inference_steps < 1:
            raise ValueError(f"num_inference_steps={num_inference_steps!r}: give the number of steps, at least 1")
        self._lay_out(self._ramp(num_inference_steps), device)

    def _lay_out(self, ramp: Tensor, device: Device) -> None:
        super()._lay_out(ramp, device)
        self.model_outputs = [None] * self.config.solver_order
        self.lower_order_nums = 0

    def _check_solver(self) -> None:
        if self.config.solver_type in ("logrho", "bh1", "bh2"):  # of DEIS and UniPC
            self.register_to_config(solver_type="midpoint")
        one_of("solver_type", self.config.solver_type, ("midpoint", "heun"))

    @property
    def _grid(self) -> list[Level]:
        grid: list[Level] = self._derived("sigmas", "grid", lambda t: [Level.of(1.0, s) for s in t.tolist()])
        return grid

    def _algorithm(self) -> str:
        return str(self.config["algorithm_type"])

    def _weights(self, order: int) -> tuple[float, list[float], float]:
        i, grid = self._here(), self._grid
        levels = [grid[i + 1], *(grid[i - k] for k in range(order))]
        return multistep(self._algorithm(), self.config["solver_type"], levels, order)

    def _multistep(self, x0: Tensor, sample: Tensor, i: int) -> tuple[Tensor, float]:
        """The next sample without its noise, and the scale of that."""
        c = self.config
        self.model_outputs = [*self.model_outputs[1:], x0]
        lower = c["lower_order_final"] and len(self.timesteps) < 15
        first = c["euler_at_final"] or lower or c["final_sigmas_type"] == "zero"
        order = multistep_order(c["solver_order"], self.lower_order_nums, i, len(self.timesteps), first, lower)
        a, b, noise_scale = self._weights(order)
        self.lower_order_nums = min(self.lower_order_nums + 1, c["solver_order"])
        terms = zip(b, reversed(self.model_outputs), strict=False)
        return combine((a, sample), *terms), noise_scale


class EDMDPMSolverMultistepScheduler(EDMMultistepScheduler):
    """Lu et al. (2022), "DPM-Solver++", algorithm 2, for networks with EDM's preconditioning."""

    @register_to_config
    def __init__(
        self, sigma_min: float = 0.002, sigma_max: float = 80.0, sigma_data: float = 0.5,
        sigma_schedule: str = "karras", num_train_timesteps: int = 1000, prediction_type: str = "epsilon",
        rho: float = 7.0, solver_order: int = 2, thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995, sample_max_value: float = 1.0,
        algorithm_type: str = "dpmsolver++", solver_type: str = "midpoint", lower_order_final: bool = True,
        euler_at_final: bool = False, final_sigmas_type: str = "zero",
    ) -> None:  # fmt: skip
        if algorithm_type == "deis":
            self.register_to_config(algorithm_type="dpmsolver++")
        one_of("algorithm_type", self.config.algorithm_type, ("dpmsolver++", "sde-dpmsolver++"))
        one_of("solver_order", solver_order, (1, 2, 3))
        self._check_solver()
        self._train()

    # -- the parts of a step under the ecosystem's names -----------------------------------------------

    def convert_model_output(self, model_output: Tensor, sample: Tensor) -> Tensor:
        """The denoised estimate at the current step, thresholded if configured; shaped as ``sample``."""
        c = self.config
        x0 = self.precondition_outputs(sample, model_output, self._list("sigmas")[self._here()])
        if c["thresholding"]:
            return prediction.threshold(x0, c["dynamic_thresholding_ratio"], c["sample_max_value"])
        return x0

    def dpm_solver_first_order_update(
        self, model_output: Tensor, sample: Tensor, noise: Tensor | None = None
    ) -> Tensor:
        """The update of order 1, which is DDIM's; shapes as ``sample``."""
        return self._updated([model_output], 1, (), sample, noise)

    def multistep_dpm_solver_second_order_update(
        self, model_output_list: list[Tensor], sample: Tensor, noise: Tensor | None = None
    ) -> Tensor:
        """The update of order 2 from the last two denoised estimates, newest last."""
        return self._updated(model_output_list, 2, (), sample, noise)

    def multistep_dpm_solver_third_order_update(self, model_output_list: list[Tensor], sample: Tensor) -> Tensor:
        """The update of order 3 from the last three denoised estimates, newest last."""
        return self._updated(model_output_list, 3, (), sample, None)

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, generator: Generators = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:  # fmt: skip
        """One multistep step; shapes ``(B, C, …)``."""
        i, c = self._enter(timestep, model_output, sample), self.config
        x0 = self.convert_model_output(model_output, sample)
        prev_sample, noise_scale = self._multistep(x0, sample, i)
        if c["algorithm_type"] == "sde-dpmsolver++":
            noise = randn_tensor(model_output.shape, generator, model_output.device, model_output.dtype)
            prev_sample.add_(noise, alpha=noise_scale)
        self._advance()
        return SchedulerOutput(prev_sample) if return_dict else (prev_sample,)


class CosineDPMSolverMultistepScheduler(EDMMultistepScheduler):
    """The SDE variant of DPM-Solver++ with Brownian noise and cosine timesteps: Stable Audio Open (2024)."""

    noise_sampler: BrownianNoise | None

    @register_to_config
    def __init__(
        self, sigma_min: float = 0.3, sigma_max: float = 500, sigma_data: float = 1.0,
        sigma_schedule: str = "exponential", num_train_timesteps: int = 1000, solver_order: int = 2,
        prediction_type: str = "v_prediction", rho: float = 7.0, solver_type: str = "midpoint",
        lower_order_final: bool = True, euler_at_final: bool = False, final_sigmas_type: str = "zero",
    ) -> None:  # fmt: skip
        one_of("solver_order", solver_order, (1, 2))
        self._check_solver()
        self._train()

    def _lay_out(self, ramp: Tensor, device: Device) -> None:
        super()._lay_out(ramp, device)
        self.noise_sampler = None

    def precondition_noise(self, sigma: Any) -> Tensor:
        """What the network is called with for a noise level: ``2 atan(σ) / π``."""
        return (sigma if isinstance(sigma, Tensor) else torch.tensor([sigma])).atan() / math.pi * 2

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, generator: Generators = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:  # fmt: skip
        """One multistep step; the generator's seed determines the Brownian path; shapes ``(B, C, …)``."""
        i = self._enter(timestep, model_output, sample)
        sigmas = self._list("sigmas")
        x0 = self.convert_model_output(model_output, sample)
        prev_sample, noise_scale = self._multistep(x0, sample, i)
        if noise_scale > 0:
            path = self._noise(model_output, generator)
            prev_sample.add_(path(torch.tensor(sigmas[i]), torch.tensor(sigmas[i + 1])), alpha=noise_scale)
        self._advance()
        return SchedulerOutput(prev_sample) if return_dict else (prev_sample,)

    def _algorithm(self) -> str:
        return "sde-dpmsolver++"

    # -- the parts of a step under the ecosystem's names -----------------------------------------------

    def convert_model_output(self, model_output: Tensor, sample: Tensor | None = None) -> Tensor:
        """The denoised estimate at the current step; shaped as ``sample``."""
        return self.precondition_outputs(sample_of((), sample), model_output, self._list("sigmas")[self._here()])

    def dpm_solver_first_order_update(
        self, model_output: Tensor, sample: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """The update of order 1, which is DDIM's; shapes as ``sample``."""
        return self._updated([model_output], 1, (), sample, noise)

    def multistep_dpm_solver_second_order_update(
        self, model_output_list: list[Tensor], sample: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """The update of order 2 from the last two denoised estimates, newest last."""
        return self._updated(model_output_list, 2, (), sample, noise)

    def _noise(self, sample: Tensor, generator: Generators) -> BrownianNoise:
        if self.noise_sampler is None:
            seed: int | list[int] | None = None
            if isinstance(generator, torch.Generator):
                seed = generator.initial_seed()
            elif generator is not None:
                seed = [g.initial_seed() for g in generator]
            self.noise_sampler = BrownianNoise(sample, self.config.sigma_min, self.config.sigma_max, seed)
        return self.noise_sampler
