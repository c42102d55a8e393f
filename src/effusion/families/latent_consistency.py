"""Latent Consistency Models (Luo et al. 2023): Stable Diffusion distilled to a few steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..blocks.engine import BlockList
from ..blocks.timesteps import retrieve_timesteps
from . import stable_diffusion as sd
from .base import Family


def set_timesteps(
    scheduler: Any,
    device: torch.device,
    num_inference_steps: int = 4,
    original_inference_steps: int | None = None,
    timesteps: Any = None,
    strength: float | None = None,
) -> dict[str, Any]:
    """The consistency schedule: ``num_inference_steps`` of the ``original_inference_steps`` it was distilled from."""
    options: dict[str, Any] = {"original_inference_steps": original_inference_steps}
    if strength is not None:
        options["strength"] = strength
    steps, count = retrieve_timesteps(scheduler, num_inference_steps, device, timesteps, **options)
    return {"timesteps": steps, "num_inference_steps": count}


def take_denoised(denoised: Tensor | None, latents: Tensor) -> dict[str, Any]:
    """The result is the last step's clean estimate, not its re-noised sample."""
    return {"latents": latents if denoised is None else denoised}


def _edit(blocks: BlockList, task: str) -> None:
    blocks.insert_after("denoise", "take_denoised", take_denoised)


LATENT_CONSISTENCY = Family(
    name="Latent Consistency",
    denoiser="unet",
    check=sd.check,
    encode=sd.encode,
    call=sd.call,
    condition=sd.embed_guidance,
    schedule=set_timesteps,
    edit=_edit,
    defaults={
        "text2image": {"guidance_scale": 8.5, "num_inference_steps": 4},
        "image2image": {"guidance_scale": 8.5, "num_inference_steps": 4, "strength": 0.8},
        "inpaint": {"guidance_scale": 8.5, "num_inference_steps": 4, "strength": 1.0},
    },
)
