"""Stable Diffusion XL's micro-conditioning (Podell et al. 2023, section 2.2): sizes, crop, and a refiner's score."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..core.types import Cond
from . import stable_diffusion as sd
from .base import Family, setting

Size = tuple[int, int]
FROM_NOISE = ("text2image", "controlnet")


def condition(
    family: Family,
    components: Mapping[str, Any],
    config: Mapping[str, Any],
    task: str,
    device: torch.device,
    batch: int,
    latents: Tensor,
    conds: dict[str, Cond],
    original_size: Size | None = None,
    crops_coords_top_left: Size = (0, 0),
    target_size: Size | None = None,
    negative_original_size: Size | None = None,
    negative_crops_coords_top_left: Size = (0, 0),
    negative_target_size: Size | None = None,
    aesthetic_score: float = 6.0,
    negative_aesthetic_score: float = 2.5,
    guidance_scale: float = 5.0,
) -> dict[str, Any]:
    """Micro-conditioning (section 2.2): sizes, crop and, in the refiner, an aesthetic score."""
    scale = family.latent_format(components).downscale
    here = (latents.shape[-2] * scale, latents.shape[-1] * scale)
    target, original = target_size or here, original_size or here
    ends: tuple[tuple[float, ...], tuple[float, ...]] = (target, negative_target_size or target)
    if config.get("requires_aesthetics_score", False):
        ends = ((aesthetic_score,), (negative_aesthetic_score,))
    positive = (*original, *crops_coords_top_left, *ends[0])
    negative = (*(negative_original_size or original), *negative_crops_coords_top_left, *ends[1])
    # Where the ecosystem leaves the caller's negative sizes out, so do we, for the same numbers.
    if ends[0] == target and task in FROM_NOISE and not (negative_original_size and negative_target_size):
        negative = positive
    elif ends[0] == target and task not in FROM_NOISE:
        negative = (*(negative_original_size or original), *crops_coords_top_left, *ends[1])
    pooled = conds["positive"].pooled
    check_ids(components[family.denoiser], len(positive), None if pooled is None else pooled.shape[-1])
    numbers = [negative, positive] if "negative" in conds else [positive]
    ids = torch.tensor(numbers, dtype=latents.dtype, device=device)
    # In text2image the ecosystem tiles the branches together (negative, positive, negative, …), which differs
    # when the two have different sizes and there are several images; kept, for the same numbers.
    ids = ids.repeat(batch, 1) if task in FROM_NOISE else ids.repeat_interleave(batch, dim=0)
    made = {
        name: Cond(cond.tokens, cond.pooled, cond.mask, {**cond.extras, "time_ids": rows})
        for (name, cond), rows in zip(conds.items(), ids.chunk(len(numbers)), strict=True)
    }
    return {"conds": made, **sd.embed_guidance(family, components, device, batch, latents, guidance_scale)}


def check_ids(unet: Any, count: int, pooled_width: int | None) -> None:
    """Does the network expect as many conditioning numbers as the pipeline gives?

    Raises:
        ValueError: it doesn't.
    """
    if pooled_width is None or not hasattr(unet, "add_embedding"):
        return
    given = setting(unet, "addition_time_embed_dim") * count + pooled_width
    if given != (expected := unet.add_embedding.linear_1.in_features):
        raise ValueError(
            f"this UNet takes {expected} conditioning features, the pipeline makes {given} of {count} numbers; "
            "check `requires_aesthetics_score` in the pipeline's configuration (true for refiners) and `text_encoder_2`"
        )
