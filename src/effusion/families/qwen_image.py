"""Qwen-Image and Qwen-Image-Edit (Wu et al. 2025): a two-stream flow transformer that reads a vision-language model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..blocks.decode import check_output_type
from ..blocks.guiders import NormPreserving
from ..blocks.latents import dtype_of, encode_pixels, match_batch, pack, start_from_noise
from ..blocks.text import Prompt, check_prompts, check_tokens
from ..blocks.timesteps import check_strength
from ..core import log
from ..core.random import Generators
from ..core.types import Cond, LatentFormat, ModelInput
from . import flux
from .base import Family, predict, setting
from .qwen_image_text import MAX_TOKENS, encode

logger = log.get_logger(__name__)
EDIT_AREA = 1024 * 1024  # pixels of the reference picture, and of the result unless a size is given


def vae_format(vae: Any) -> LatentFormat:
    """Sixteen channels, each with its own mean and deviation; the VAE is a video one."""
    c = vae.config
    scale = 2 ** len(c.temperal_downsample)
    return LatentFormat(c.z_dim, scale, mean=tuple(c.latents_mean), std=tuple(c.latents_std), frames=True)


def check(
    family: Family,
    components: Mapping[str, Any],
    task: str,
    prompt: Prompt = None,
    prompt_embeds: Tensor | None = None,
    prompt_embeds_mask: Tensor | None = None,
    negative_prompt: Prompt = None,
    negative_prompt_embeds: Tensor | None = None,
    negative_prompt_embeds_mask: Tensor | None = None,
    true_cfg_scale: float = 4.0,
    guidance_scale: float | None = None,
    height: int | None = None,
    width: int | None = None,
    strength: float | None = None,
    num_images_per_prompt: int = 1,
    max_sequence_length: int = 512,
    output_type: str = "pil",
    image: Any = None,
) -> dict[str, Any]:
    """Validate the call; work out batch, size and whether there is a negative branch."""
    prompts = check_prompts(prompt, prompt_embeds)
    negative = negative_prompt is not None or negative_prompt_embeds is not None
    if negative:  # of any length: branches are evaluated in turn
        check_prompts(negative_prompt, negative_prompt_embeds)
    check_tokens(max_sequence_length, MAX_TOKENS)
    check_output_type(output_type)
    if strength is not None:
        check_strength(strength)
    _check_guidance(setting(components[family.denoiser], "guidance_embeds", False), guidance_scale)
    if task == "edit" and (height is None or width is None):
        fitted = edit_size(image)
        height, width = height or fitted[0], width or fitted[1]
    height, width = flux.image_size(family, components, height, width)
    if true_cfg_scale > 1 and not negative:
        logger.warning("`true_cfg_scale` %s needs a `negative_prompt`; without one it has no effect", true_cfg_scale)
    batch, guide = prompts * (num_images_per_prompt or 1), true_cfg_scale > 1 and negative
    return {"batch": batch, "height": height, "width": width, "guide": guide}


def _check_guidance(distilled: bool, scale: float | None) -> None:
    if distilled and scale is None:
        raise ValueError("this checkpoint is distilled for guidance: pass `guidance_scale`")
    if not distilled and scale is not None:
        logger.warning(
            "`guidance_scale` %s has no effect: this checkpoint is not distilled; see `true_cfg_scale`", scale
        )


def condition(
    family: Family,
    components: Mapping[str, Any],
    device: torch.device,
    batch: int,
    height: int,
    width: int,
    true_cfg_scale: float = 4.0,
    guidance_scale: float | None = None,
    reference_shape: tuple[int, int, int] | None = None,
) -> dict[str, Any]:
    """Shapes of the pictures in tokens, and the guider."""
    side = family.latent_format(components).downscale * family.packing
    shapes = [(1, height // side, width // side)]
    shapes += [reference_shape] if reference_shape else []
    made: dict[str, Any] = {"positions": {"img_shapes": [shapes] * batch}, "guider": NormPreserving(true_cfg_scale)}
    if guidance_scale is not None and setting(components[family.denoiser], "guidance_embeds", False):
        made["guidance"] = torch.full([batch], guidance_scale, device=device, dtype=torch.float32)
    return made


def call(transformer: Any, inputs: ModelInput) -> Tensor:
    """Predict the flow of the picture's tokens; reference tokens are read but not predicted."""
    x, length = inputs.x, inputs.x.shape[1]
    if inputs.tokens is not None:
        x = torch.cat([x, inputs.tokens], dim=1)
    flow = predict(
        transformer,
        hidden_states=x,
        timestep=inputs.t.expand(x.shape[0]).to(x.dtype) / 1000,
        guidance=inputs.guidance,
        encoder_hidden_states=inputs.cond.tokens,
        encoder_hidden_states_mask=inputs.cond.mask,
        attention_kwargs=inputs.attention,
        **inputs.positions,
        **inputs.residuals,
    )
    return flow if inputs.tokens is None else flow[:, :length]


def edit_size(image: Any, area: int = EDIT_AREA) -> tuple[int, int]:
    """(height, width) of about ``area`` pixels with the picture's aspect, multiples of 32."""
    first = image[0] if isinstance(image, (list, tuple)) else image
    if not hasattr(first, "size"):
        raise ValueError("`image` is missing: editing needs a picture")
    columns, rows = first.size if not torch.is_tensor(first) else (first.shape[-1], first.shape[-2])
    width, height, _ = calculate_dimensions(area, columns / rows)
    return height, width


def calculate_dimensions(target_area: int, ratio: float) -> tuple[int, int, None]:
    """(width, height) of about ``target_area`` pixels, multiples of 32; and ``None``, as in the ecosystem."""
    width = math.sqrt(target_area * ratio)
    return round(width / 32) * 32, round(width / ratio / 32) * 32, None


def read_reference(
    family: Family,
    components: Mapping[str, Any],
    device: torch.device,
    batch: int,
    image: Any,
    image_processor: Any,
    conds: dict[str, Cond],
    generator: Generators = None,
) -> dict[str, Any]:
    """Editing: the reference picture as extra tokens."""
    dtype = dtype_of(conds, components[family.denoiser])
    size = edit_size(image)
    pixels = image_processor.preprocess(image_processor.resize(image, *size), *size).to(device=device, dtype=dtype)
    z = match_batch(encode_pixels(family, components["vae"], pixels, generator, "argmax"), batch, "images")
    shape = (1, z.shape[-2] // family.packing, z.shape[-1] // family.packing)
    return {"tokens": pack(z, family.packing), "reference_shape": shape}


def show_image(image: Any, image_processor: Any) -> dict[str, Any]:
    """Editing: the picture at the size at which the text encoder sees it."""
    return {"prompt_image": image_processor.resize(image, *edit_size(image))}


QWEN_IMAGE = Family(
    name="Qwen-Image",
    denoiser="transformer",
    check=check,
    encode=encode,
    call=call,
    condition=condition,
    schedule=flux.set_timesteps,
    format=vae_format,
    packing=2,
    one_by_one=True,
    resizes_image=True,
    masks_by_channels=False,
    starts={
        "edit": lambda family: [
            ("set_timesteps", family.schedule),
            ("read_reference", read_reference),
            ("start_noise", start_from_noise),
        ]
    },
    edit=lambda blocks, task: blocks.insert_before("encode", "show_image", show_image) if task == "edit" else None,
    tasks=("text2image", "image2image", "inpaint", "edit"),
    defaults={
        "text2image": {"num_inference_steps": 50, "true_cfg_scale": 4.0},
        "image2image": {"num_inference_steps": 50, "true_cfg_scale": 4.0, "strength": 0.6},
        "inpaint": {"num_inference_steps": 50, "true_cfg_scale": 4.0, "strength": 0.6},
        "edit": {"num_inference_steps": 50, "true_cfg_scale": 4.0},
    },
)
