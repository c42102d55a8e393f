"""What the ecosystem's training scripts call around their loop: seeds, timestep densities, loss weights, memory."""

from __future__ import annotations

import gc
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .losses import NoiseSchedule, snr


def set_seed(seed: int) -> None:
    """Seed ``random``, ``numpy`` and ``torch`` on every device."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (the generator that scripts draw from)
    torch.manual_seed(seed)


def compute_snr(noise_scheduler: NoiseSchedule, timesteps: Tensor) -> Tensor:
    """Signal-to-noise ratio at ``timesteps``, of their shape."""
    return snr(noise_scheduler, timesteps.flatten()).view(timesteps.shape)


def cast_training_params(model: nn.Module | list[nn.Module], dtype: torch.dtype = torch.float32) -> None:
    """Turn the parameters that are trained into ``dtype``, and leave the others as they are."""
    for part in model if isinstance(model, list) else [model]:
        for parameter in part.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.to(dtype)


def compute_density_for_timestep_sampling(
    weighting_scheme: str,
    batch_size: int,
    logit_mean: float | None = None,
    logit_std: float | None = None,
    mode_scale: float | None = None,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> Tensor:
    """``(B,)`` times from 0 to 1: ``"logit_normal"``, ``"mode"`` (Esser et al., 2024, section 3.1), or evenly.

    Raises:
        ValueError: a scheme without the numbers that it needs.
    """
    needs = {"logit_normal": {"logit_mean": logit_mean, "logit_std": logit_std}, "mode": {"mode_scale": mode_scale}}
    if missing := [name for name, value in needs.get(weighting_scheme, {}).items() if value is None]:
        raise ValueError(f"weighting_scheme={weighting_scheme!r} needs {' and '.join(missing)}")
    if weighting_scheme == "logit_normal":
        assert logit_mean is not None and logit_std is not None
        normal = torch.normal(logit_mean, logit_std, size=(batch_size,), device=device, generator=generator)
        return normal.sigmoid()
    u = torch.rand(size=(batch_size,), device=device, generator=generator)
    if weighting_scheme == "mode":
        assert mode_scale is not None
        u = 1 - u - mode_scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)
    return u


def compute_loss_weighting_for_sd3(weighting_scheme: str, sigmas: Tensor | None = None) -> Tensor:
    """Weights of the loss by noise level: ``"sigma_sqrt"``, ``"cosmap"`` (Esser et al., 2024), or 1."""
    if sigmas is None:
        raise ValueError("`sigmas` are needed: the noise levels that the loss is taken at")
    if weighting_scheme == "sigma_sqrt":
        return (sigmas**-2.0).float()
    if weighting_scheme == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigmas + 2 * sigmas**2))
    return torch.ones_like(sigmas)


def free_memory() -> None:
    """Collect garbage, and give cached memory of the accelerator back."""
    gc.collect()
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        torch.get_device_module(accelerator).empty_cache()


@contextmanager
def offload_models(*modules: Any, device: torch.device | str, offload: bool = True) -> Iterator[None]:
    """Networks (or a pipeline) on ``device`` while the context lasts, and back where they were after it."""
    homes = [_home(module) for module in modules] if offload else []
    for module in modules if offload else ():
        module.to(device)
    try:
        yield
    finally:
        for module, home in zip(modules, homes, strict=False):
            module.to(home)


def _home(module: Any) -> Any:
    return next(module.parameters()).device if isinstance(module, nn.Module) else module.device
