"""Which noise levels a run visits."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def retrieve_timesteps(
    scheduler: Any,
    num_inference_steps: int | None = None,
    device: torch.device | str | None = None,
    timesteps: Sequence[int] | None = None,
    sigmas: Sequence[float] | None = None,
    **options: Any,
) -> tuple[Tensor, int]:
    """Set the scheduler's schedule; returns its timesteps and the number of steps (a step may list several timesteps).

    Raises:
        ValueError: both ``timesteps`` and ``sigmas`` given, or a scheduler that takes no such list.
    """
    if timesteps is not None and sigmas is not None:
        raise ValueError("both `timesteps` and `sigmas` were given; give one of them")
    custom = {"timesteps": timesteps, "sigmas": sigmas}
    custom = {k: v for k, v in custom.items() if v is not None}
    accepted = inspect.signature(scheduler.set_timesteps).parameters
    for name in custom:
        if name not in accepted:
            raise ValueError(
                f"{type(scheduler).__name__} takes no custom `{name}`; leave them out or use a scheduler that does"
            )
    if custom:
        scheduler.set_timesteps(**custom, device=device, **options)
        return scheduler.timesteps, len(scheduler.timesteps)
    if num_inference_steps is None or num_inference_steps < 1:
        raise ValueError(f"`num_inference_steps` has to be at least 1, got {num_inference_steps}")
    scheduler.set_timesteps(num_inference_steps, device=device, **options)
    return scheduler.timesteps, num_inference_steps


def calculate_shift(
    image_seq_len: int,
    base_seq_len: int = 256,
    max_seq_len: int = 4096,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
) -> float:
    """The time shift mu for a picture of ``image_seq_len`` tokens: linear in their number."""
    slope = (max_shift - base_shift) / (max_seq_len - base_seq_len)
    return image_seq_len * slope + (base_shift - slope * base_seq_len)


def noised(scheduler: Any, clean: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
    """``clean`` at the noise level of ``timestep`` (B,); diffusion and flow-matching schedulers name it differently."""
    if hasattr(scheduler, "scale_noise"):
        return scheduler.scale_noise(clean, timestep, noise)  # type: ignore[no-any-return]
    return scheduler.add_noise(clean, noise, timestep)  # type: ignore[no-any-return]


def first_sigma(scheduler: Any) -> Any:
    """What fresh noise is multiplied with; flow matching starts from plain noise."""
    return getattr(scheduler, "init_noise_sigma", 1.0)


def check_strength(strength: float) -> None:
    if not 0 <= strength <= 1:
        raise ValueError(f"`strength` has to be between 0 and 1, got {strength}")


def check_range(denoising_start: float | None, denoising_end: float | None) -> None:
    """The part of the denoising to do, for a base model and its refiner: fractions in order."""
    for name, fraction in (("denoising_start", denoising_start), ("denoising_end", denoising_end)):
        if fraction is not None and not (isinstance(fraction, float) and 0 < fraction < 1):
            raise ValueError(f"`{name}` has to be a float between 0 and 1, got {fraction!r}")
    if denoising_start is not None and denoising_end is not None and denoising_start >= denoising_end:
        raise ValueError(f"`denoising_start` {denoising_start} must come before `denoising_end` {denoising_end}")


def start_at_strength(scheduler: Any, num_inference_steps: int, strength: float) -> tuple[Tensor, int]:
    """The last ``strength`` part of the schedule (SDEdit, Meng et al. 2021), and how many steps it has."""
    kept = num_inference_steps * strength
    # Diffusion schedulers round the part that is run down, flow-matching ones the part that is skipped.
    kept = kept if hasattr(scheduler, "scale_noise") else int(kept)
    start = int(max(num_inference_steps - kept, 0)) * scheduler.order
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start)
    return scheduler.timesteps[start:], num_inference_steps - start // scheduler.order


def cutoff(scheduler: Any, fraction: float) -> int:
    """The training timestep at which ``fraction`` of the denoising is done (1 = all of it)."""
    total = scheduler.config.num_train_timesteps
    return round(total - fraction * total)  # type: ignore[no-any-return]


def start_at_fraction(scheduler: Any, fraction: float) -> tuple[Tensor, int]:
    """The part of the schedule after ``fraction`` of the denoising: a refiner's (SDXL, section 2.5)."""
    below = int((scheduler.timesteps < cutoff(scheduler, fraction)).sum())
    if scheduler.order == 2 and below % 2 == 0:
        below += 1  # a second-order solver lists inner timesteps twice: don't begin between two of a pair
    start = len(scheduler.timesteps) - below
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start)
    return scheduler.timesteps[start:], below


def end_at_fraction(scheduler: Any, timesteps: Tensor, fraction: float) -> Tensor:
    """``timesteps`` up to ``fraction`` of the denoising: a base model's that hands over to a refiner."""
    return timesteps[: int((timesteps >= cutoff(scheduler, fraction)).sum())]


def guidance_embedding(w: Tensor, dim: int = 512, dtype: torch.dtype = torch.float32) -> Tensor:
    """Sinusoidal embedding of guidance scales ``w`` (B,) -> (B, dim), as in LCM (Luo et al. 2023)."""
    if w.ndim != 1:
        raise ValueError(f"guidance scales must be one-dimensional, got shape {tuple(w.shape)}")
    half = dim // 2
    frequencies = torch.exp(
        torch.arange(half, dtype=dtype, device=w.device) * -(torch.log(torch.tensor(10000.0)) / (half - 1)).to(w.device)
    )
    angles = (w.to(dtype) * 1000.0)[:, None] * frequencies[None, :]
    embedding = torch.cat([angles.sin(), angles.cos()], dim=1)
    return torch.nn.functional.pad(embedding, (0, dim % 2))
