"""Stable Diffusion 1.x and 2.x: latent diffusion with a CLIP-conditioned UNet (Rombach et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..blocks.decode import check_output_type
from ..blocks.text import Prompt, as_list, check_prompts, clip_tokens
from ..blocks.timesteps import check_strength, guidance_embedding
from ..core.types import Cond, ModelInput
from . import stable_diffusion_control as control
from .base import TASKS, Family, predict, setting, with_channels

SIZE_MULTIPLE = 8


def check(
    family: Family,
    components: Mapping[str, Any],
    prompt: Prompt = None,
    prompt_embeds: Tensor | None = None,
    negative_prompt: Prompt = None,
    negative_prompt_embeds: Tensor | None = None,
    height: int | None = None,
    width: int | None = None,
    strength: float | None = None,
    guidance_scale: float = 7.5,
    num_images_per_prompt: int = 1,
    output_type: str = "pil",
    ip_adapter_image: Any = None,
    ip_adapter_image_embeds: Any = None,
) -> dict[str, Any]:
    """Validate the call; work out batch, size and whether there is a negative branch."""
    prompts = check_prompts(prompt, prompt_embeds, negative_prompt, negative_prompt_embeds)
    check_output_type(output_type)
    if strength is not None:
        check_strength(strength)
    if ip_adapter_image is not None or ip_adapter_image_embeds is not None:
        raise ValueError("`ip_adapter_image` was given, but no IP-Adapter is loaded in this pipeline")
    height, width = image_size(family, components, height, width)
    unet = components[family.denoiser]
    guide = guidance_scale > 1 and setting(unet, "time_cond_proj_dim") is None
    return {"batch": prompts * (num_images_per_prompt or 1), "height": height, "width": width, "guide": guide}


def image_size(family: Family, components: Mapping[str, Any], height: int | None, width: int | None) -> tuple[int, int]:
    """Size in pixels: the caller's, or the size that the network was trained at.

    Raises:
        ValueError: a side that is not a positive multiple of 8.
    """
    native = setting(components[family.denoiser], "sample_size", 64)
    rows, columns = native if isinstance(native, (list, tuple)) else (native, native)
    scale = family.latent_format(components).downscale
    height, width = height or rows * scale, width or columns * scale
    multiple = 1 if components.get("vae") is None else max(SIZE_MULTIPLE, scale)
    if height <= 0 or width <= 0 or height % multiple or width % multiple:
        raise ValueError(
            f"`height` and `width` have to be divisible by {multiple}, got {height} x {width}; "
            f"the nearest size is {_nearest(height, multiple)} x {_nearest(width, multiple)}"
        )
    return height, width


def _nearest(size: int, multiple: int) -> int:
    return max(round(size / multiple), 1) * multiple


def encode(
    components: Mapping[str, Any],
    device: torch.device,
    prompt: Prompt = None,
    negative_prompt: Prompt = None,
    prompt_embeds: Tensor | None = None,
    negative_prompt_embeds: Tensor | None = None,
    num_images_per_prompt: int = 1,
    guide: bool = True,
    clip_skip: int | None = None,
) -> dict[str, Any]:
    """CLIP hidden states of the prompt and, with guidance, of the negative prompt ("" by default)."""
    encoder, tokenizer = components.get("text_encoder"), components.get("tokenizer")
    if prompt_embeds is None:
        prompt_embeds = clip_tokens(encoder, tokenizer, as_list(prompt), device, clip_skip, None)
    model = encoder if encoder is not None else components["unet"]
    count, length = prompt_embeds.shape[:2]
    conds = {}
    if guide:
        if negative_prompt_embeds is None:
            texts = as_list(negative_prompt, count)
            negative_prompt_embeds = clip_tokens(
                encoder, tokenizer, texts * (count // len(texts)), device, None, length
            )
        conds["negative"] = Cond(tokens=negative_prompt_embeds)
    conds["positive"] = Cond(tokens=prompt_embeds)
    n = num_images_per_prompt or 1
    return {"conds": {k: c.to(device=device, dtype=model.dtype).repeat(n) for k, c in conds.items()}}


def embed_guidance(
    family: Family,
    components: Mapping[str, Any],
    device: torch.device,
    batch: int,
    latents: Tensor,
    guidance_scale: float,
) -> dict[str, Any]:
    """The guidance scale as an input, for networks that were distilled to take it (LCM)."""
    dim = setting(components[family.denoiser], "time_cond_proj_dim")
    if dim is None:
        return {}
    scales = torch.tensor(guidance_scale - 1).repeat(batch)
    return {"guidance": guidance_embedding(scales, dim).to(device=device, dtype=latents.dtype)}


def call(unet: Any, inputs: ModelInput) -> Tensor:
    """Predict with a UNet that attends to text tokens."""
    return predict(
        unet,
        with_channels(inputs),
        inputs.t,
        encoder_hidden_states=inputs.cond.tokens,
        timestep_cond=inputs.guidance,
        cross_attention_kwargs=inputs.attention,
        **inputs.residuals,
    )


STABLE_DIFFUSION = Family(
    name="Stable Diffusion",
    denoiser="unet",
    check=check,
    encode=encode,
    call=call,
    condition=embed_guidance,
    starts=control.CONTROL_STARTS,
    tasks=(*TASKS, *control.CONTROL_STARTS),
    edit=control.edit,
    defaults={
        "text2image": {"guidance_scale": 7.5},
        "image2image": {"guidance_scale": 7.5, "strength": 0.8},
        "inpaint": {"guidance_scale": 7.5, "strength": 1.0},
        "controlnet": {"guidance_scale": 7.5},
        "controlnet_image2image": {"guidance_scale": 7.5, "strength": 0.8, "controlnet_conditioning_scale": 0.8},
        "controlnet_inpaint": {"guidance_scale": 7.5, "strength": 1.0, "controlnet_conditioning_scale": 0.5},
    },
)
