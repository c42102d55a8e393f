"""Song et al. (2021), "Denoising Diffusion Implicit Models": eq. 12, and the same step backwards."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.config import register_to_config
from ..core.random import Generators, randn_tensor
from . import prediction
from .alpha import AlphaScheduler, root
from .base import KARRAS_COMPATIBLES, DenoisedOutput, Device, combine, like, one_of
from .noise import Array

DDIMSchedulerOutput = DDIMParallelSchedulerOutput = DenoisedOutput


class DDIMScheduler(AlphaScheduler):
    """Song et al. (2021), eq. 12: deterministic for ``eta = 0``, DDPM's variance for ``eta = 1``."""

    _compatibles = KARRAS_COMPATIBLES

    @register_to_config
    def __init__(
        self, num_train_timesteps: int = 1000, beta_start: float = 0.0001, beta_end: float = 0.02,
        beta_schedule: str = "linear", trained_betas: Array | list[float] | None = None, clip_sample: bool = True,
        set_alpha_to_one: bool = True, steps_offset: int = 0, prediction_type: str = "epsilon",
        thresholding: bool = False, dynamic_thresholding_ratio: float = 0.995, clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0, timestep_spacing: str = "leading", rescale_betas_zero_snr: bool = False,
    ) -> None:  # fmt: skip
        self._train()

    def set_timesteps(self, num_inference_steps: int, device: Device = None) -> None:
        """Begin a run of ``num_inference_steps`` steps."""
        times = self._spaced(num_inference_steps)
        self.num_inference_steps = num_inference_steps
        self._begin(times, None, device, torch.int64)

    def _get_variance(self, timestep: Any, prev_timestep: Any) -> Tensor:
        """σ_t² of eq. 16 for ``eta = 1``."""
        return torch.as_tensor(_variance(self._level(int(timestep))[0], self._level(int(prev_timestep))[0]))

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, eta: float = 0.0,
        use_clipped_model_output: bool = False, generator: Generators = None, variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> DenoisedOutput | tuple[Tensor, Tensor]:  # fmt: skip
        """The step of eq. 12 from ``timestep``; shapes ``(B, C, …)``.

        Args:
            eta: weight of the noise, 0 to 1.
            use_clipped_model_output: take ε from the clipped estimate (as GLIDE does).
            variance_noise: the noise to use instead of a new one.

        Raises:
            ValueError: no run, shapes that differ, or both ``generator`` and ``variance_noise``.
        """
        self._check_run()
        self._check_shapes(model_output, sample)
        assert self.num_inference_steps is not None
        t = int(self._time(timestep))
        t_prev = t - len(self) // self.num_inference_steps
        return self._between(
            model_output, sample, t, t_prev, eta, use_clipped_model_output, generator, variance_noise, return_dict
        )

    def _between(
        self, model_output: Tensor, sample: Tensor, t: int, t_prev: int, eta: float = 0.0,
        use_clipped_model_output: bool = False, generator: Generators = None, variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> DenoisedOutput | tuple[Tensor, Tensor]:  # fmt: skip
        """Eq. 12 between any two timesteps."""
        (bar, alpha, sigma), (bar_prev, alpha_prev, sigma_prev) = self._level(t), self._level(t_prev)
        x0 = self._estimate(model_output, sample, alpha, sigma)
        if sigma == 0 and (use_clipped_model_output or self.config["prediction_type"] == "sample"):
            raise ValueError(
                "set_alpha_to_one=True makes the first sample free of noise, and prediction_type='sample' (or "
                "use_clipped_model_output) divides by its noise level: set set_alpha_to_one=False"
            )
        kept, direction, std = float(alpha_prev), float(sigma_prev), 0.0
        if eta > 0:
            scaled_std = type(bar)(eta) * root(_variance(bar, bar_prev))
            rest = type(bar)(1) - bar_prev - scaled_std * scaled_std
            direction, std = float(root(max(rest, 0 * rest))), float(scaled_std)
        if use_clipped_model_output:  # ε = (x - α x_0) / σ of the clipped x_0
            scaled = direction / float(sigma)
            prev_sample = combine((kept - scaled * float(alpha), x0), (scaled, sample))
        else:
            a, b = prediction.noise(self.config["prediction_type"], float(alpha), float(sigma))
            prev_sample = combine((kept, x0), (direction * b, model_output), (direction * a, sample))
        if eta > 0:
            if variance_noise is None:
                variance_noise = randn_tensor(model_output.shape, generator, model_output.device, model_output.dtype)
            elif generator is not None:
                raise ValueError("`generator` and `variance_noise` contradict each other: pass only one of them")
            prev_sample.add_(variance_noise, alpha=std)
        return DenoisedOutput(prev_sample, x0) if return_dict else (prev_sample, x0)


def _variance(bar: Any, bar_prev: Any) -> Any:
    """σ_t² of eq. 16 for ``eta = 1``, in the precision of its arguments."""
    one = type(bar)(1)
    return (one - bar_prev) / (one - bar) * (one - bar / bar_prev)


class DDIMParallelScheduler(DDIMScheduler):
    """DDIM for Picard iteration over all timesteps at once: Shih et al. (2023), "Parallel Sampling"."""

    _is_ode_scheduler = True

    def _get_variance(self, timestep: Any, prev_timestep: Any = None) -> Tensor:
        """σ_t² of eq. 16 for ``eta = 1``; ``prev_timestep`` is that of this run where it is not given."""
        if prev_timestep is None:
            self._check_run()
            assert self.num_inference_steps is not None
            prev_timestep = int(timestep) - len(self) // self.num_inference_steps
        return super()._get_variance(timestep, prev_timestep)

    def batch_step_no_noise(
        self, model_output: Tensor, timesteps: Tensor, sample: Tensor, eta: float = 0.0,
        use_clipped_model_output: bool = False,
    ) -> Tensor:  # fmt: skip
        """The deterministic step of each item of the batch from its own timestep ``(B,)``."""
        self._check_run()
        if eta != 0:
            raise ValueError(f"eta={eta}: a step of many timesteps at once is deterministic; leave eta at 0")
        assert self.num_inference_steps is not None
        c = self.config
        table = self.alphas_cumprod.to(sample.device)
        before = timesteps - len(self) // self.num_inference_steps
        bar = like(table[timesteps], sample)
        bar_prev = like(torch.where(before < 0, torch.ones_like(table[0]), table[before.clip(min=0)]), sample)
        alpha, sigma = bar**0.5, (1 - bar) ** 0.5
        x0 = prediction.to_denoised(c.prediction_type, model_output, sample, alpha, sigma)
        a, b = prediction.noise(c.prediction_type, alpha, sigma)
        noise = a * sample + b * model_output
        if c.thresholding:
            x0 = prediction.threshold(x0, c.dynamic_thresholding_ratio, c.sample_max_value)
        elif c.clip_sample:
            x0 = x0.clamp(-c.clip_sample_range, c.clip_sample_range)
        if use_clipped_model_output:
            noise = (sample - alpha * x0) / sigma
        return bar_prev**0.5 * x0 + (1 - bar_prev) ** 0.5 * noise


class DDIMInverseScheduler(DDIMScheduler):
    """Eq. 12 of Song et al. (2021) run from the sample to the noise: Mokady et al. (2023), "Null-text Inversion"."""

    ignore_for_config = ["kwargs"]
    _compatibles = []

    @register_to_config
    def __init__(
        self, num_train_timesteps: int = 1000, beta_start: float = 0.0001, beta_end: float = 0.02,
        beta_schedule: str = "linear", trained_betas: Array | list[float] | None = None, clip_sample: bool = True,
        set_alpha_to_one: bool = True, steps_offset: int = 0, prediction_type: str = "epsilon",
        clip_sample_range: float = 1.0, timestep_spacing: str = "leading", rescale_betas_zero_snr: bool = False,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        if "set_alpha_to_zero" in kwargs:  # the name it had in old configurations
            self.register_to_config(set_alpha_to_one=kwargs["set_alpha_to_zero"])
        one_of("timestep_spacing", timestep_spacing, ("leading", "trailing"))
        self._train()
        self.initial_alpha_cumprod = self.final_alpha_cumprod
        self.timesteps = self.timesteps.flip(0)

    def set_timesteps(self, num_inference_steps: int, device: Device = None) -> None:
        """Begin a run of ``num_inference_steps`` rising timesteps."""
        times = self._spaced(num_inference_steps)[::-1]
        self.num_inference_steps = num_inference_steps
        self._begin(times, None, device, torch.int64)

    def step(  # type: ignore[override]
        self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True
    ) -> DenoisedOutput | tuple[Tensor, Tensor]:
        """The step up to ``timestep`` from the one before it; shapes ``(B, C, …)``."""
        self._check_run()
        self._check_shapes(model_output, sample)
        assert self.num_inference_steps is not None
        t = int(self._time(timestep))
        source = min(t - len(self) // self.num_inference_steps, len(self) - 1)
        return self._between(model_output, sample, source, t, return_dict=return_dict)
