"""FLUX.1 (Black Forest Labs, 2024): a rectified-flow transformer over packed latents and T5 tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..blocks.decode import check_output_type
from ..blocks.guiders import ClassifierFree
from ..blocks.text import Prompt, check_pooled, check_prompts, check_tokens
from ..blocks.timesteps import calculate_shift, check_strength, retrieve_timesteps, start_at_strength
from ..core import log
from ..core.types import Cond, ModelInput
from .base import Family, predict, setting
from .flux_tasks import FLUX_STARTS, token_ids
from .flux_text import encode

logger = log.get_logger(__name__)
DEFAULT_SIDE = 1024  # pixels
MAX_TOKENS = 512


def check(
    family: Family,
    components: Mapping[str, Any],
    prompt: Prompt = None,
    prompt_2: Prompt = None,
    prompt_embeds: Tensor | None = None,
    pooled_prompt_embeds: Tensor | None = None,
    negative_prompt: Prompt = None,
    negative_prompt_embeds: Tensor | None = None,
    negative_pooled_prompt_embeds: Tensor | None = None,
    true_cfg_scale: float = 1.0,
    guidance_scale: float = 3.5,
    height: int | None = None,
    width: int | None = None,
    strength: float | None = None,
    num_images_per_prompt: int = 1,
    max_sequence_length: int = MAX_TOKENS,
    output_type: str = "pil",
    ip_adapter_image: Any = None,
    ip_adapter_image_embeds: Any = None,
) -> dict[str, Any]:
    """Validate the call; work out batch, size and whether there is a negative branch."""
    prompts = check_prompts(prompt, prompt_embeds, negative_prompt, negative_prompt_embeds)
    if prompt_2 is not None and prompt_embeds is not None:
        raise ValueError("both `prompt_2` and `prompt_embeds` were given; give one of them")
    check_pooled(prompt_embeds, pooled_prompt_embeds, negative_prompt_embeds, negative_pooled_prompt_embeds)
    check_tokens(max_sequence_length, MAX_TOKENS)
    check_output_type(output_type)
    if strength is not None:
        check_strength(strength)
    if ip_adapter_image is not None or ip_adapter_image_embeds is not None:
        raise ValueError("`ip_adapter_image` was given, but no IP-Adapter is loaded in this pipeline")
    height, width = image_size(family, components, height, width)
    negative = negative_prompt is not None or negative_prompt_embeds is not None
    if true_cfg_scale > 1 and not negative:
        logger.warning("`true_cfg_scale` %s needs a `negative_prompt`; without one it has no effect", true_cfg_scale)
    return {
        "batch": prompts * (num_images_per_prompt or 1),
        "height": height,
        "width": width,
        "guide": true_cfg_scale > 1 and negative,
    }


def image_size(family: Family, components: Mapping[str, Any], height: int | None, width: int | None) -> tuple[int, int]:
    """Size in pixels, rounded down to what packs into tokens (with the ecosystem's warning)."""
    f = family.latent_format(components)
    multiple = f.downscale * family.packing
    native = DEFAULT_SIDE // 8 * f.downscale
    wanted = (height or native, width or native)
    size = (wanted[0] // multiple * multiple, wanted[1] // multiple * multiple)
    if min(size) <= 0:
        raise ValueError(f"`height` and `width` have to be at least {multiple}, got {wanted[0]} x {wanted[1]}")
    if size != wanted:
        logger.warning(
            "`height` and `width` have to be divisible by %d but are %d and %d: made %d and %d",
            multiple, *wanted, *size,
        )  # fmt: skip
    return size


def shift_of(tokens: int, config: Mapping[str, Any]) -> float:
    """The time shift mu for a picture of ``tokens`` tokens: linear in their number."""
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    return calculate_shift(tokens, low, high, config.get("base_shift", 0.5), config.get("max_shift", 1.15))


def set_timesteps(
    family: Family,
    components: Mapping[str, Any],
    scheduler: Any,
    device: torch.device,
    height: int,
    width: int,
    num_inference_steps: int = 28,
    sigmas: Any = None,
    strength: float | None = None,
) -> dict[str, Any]:
    """Evenly spaced flow times, shifted towards noise the larger the picture is."""
    side = family.latent_format(components).downscale * family.packing
    if sigmas is None and not scheduler.config.get("use_flow_sigmas", False):
        sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
    mu = shift_of((height // side) * (width // side), scheduler.config)
    steps, count = retrieve_timesteps(scheduler, num_inference_steps, device, sigmas=sigmas, mu=mu)
    if strength is not None:
        steps, count = start_at_strength(scheduler, count, strength)
    if len(steps) < 1:
        raise ValueError(f"no denoising step is left of {num_inference_steps} at strength {strength}; raise either")
    return {"timesteps": steps, "num_inference_steps": count}


def condition(
    family: Family,
    components: Mapping[str, Any],
    device: torch.device,
    batch: int,
    height: int,
    width: int,
    latents: Tensor,
    conds: dict[str, Cond],
    guidance_scale: float = 3.5,
    true_cfg_scale: float = 1.0,
    reference_ids: Tensor | None = None,
) -> dict[str, Any]:
    """Positions of text and picture tokens, and guidance as an input of the distilled network."""
    side = family.latent_format(components).downscale * family.packing
    text = conds["positive"].tokens
    assert text is not None
    picture = token_ids(height // side, width // side, device, latents.dtype)
    if reference_ids is not None:
        picture = torch.cat([picture, reference_ids], dim=0)
    positions = {"img_ids": picture, "txt_ids": torch.zeros(text.shape[1], 3, device=device, dtype=text.dtype)}
    made: dict[str, Any] = {"positions": positions, "guider": ClassifierFree(true_cfg_scale)}
    if setting(components[family.denoiser], "guidance_embeds", False):
        made["guidance"] = torch.full([batch], guidance_scale, device=device, dtype=torch.float32)
    return made


def call(transformer: Any, inputs: ModelInput) -> Tensor:
    """Predict the flow of the picture's tokens; reference tokens are read but not predicted."""
    x, length = inputs.x, inputs.x.shape[1]
    if inputs.channels is not None:
        x = torch.cat([x, inputs.channels], dim=2)
    if inputs.tokens is not None:
        x = torch.cat([x, inputs.tokens], dim=1)
    flow = predict(
        transformer,
        hidden_states=x,
        timestep=inputs.t.expand(x.shape[0]).to(x.dtype) / 1000,
        guidance=inputs.guidance,
        pooled_projections=inputs.cond.pooled,
        encoder_hidden_states=inputs.cond.tokens,
        joint_attention_kwargs=inputs.attention,
        **inputs.positions,
        **inputs.residuals,
    )
    return flow if inputs.tokens is None else flow[:, :length]


FLUX = Family(
    name="FLUX.1",
    denoiser="transformer",
    check=check,
    encode=encode,
    call=call,
    condition=condition,
    schedule=set_timesteps,
    packing=2,
    one_by_one=True,
    resizes_image=True,
    masks_by_channels=False,
    starts=FLUX_STARTS,
    tasks=("text2image", "image2image", "inpaint", *FLUX_STARTS),
    defaults={
        "text2image": {"num_inference_steps": 28, "guidance_scale": 3.5},
        "image2image": {"num_inference_steps": 28, "guidance_scale": 7.0, "strength": 0.6},
        "inpaint": {"num_inference_steps": 28, "guidance_scale": 7.0, "strength": 0.6},
        "fill": {"num_inference_steps": 50, "guidance_scale": 30.0, "strength": 1.0},
        "kontext": {"num_inference_steps": 28, "guidance_scale": 3.5},
        "control": {"num_inference_steps": 28, "guidance_scale": 3.5},
        "control_image2image": {"num_inference_steps": 28, "guidance_scale": 7.0, "strength": 0.6},
        "controlnet": {"num_inference_steps": 28, "guidance_scale": 7.0},
        "controlnet_image2image": {"num_inference_steps": 28, "guidance_scale": 7.0, "strength": 0.6},
        "controlnet_inpaint": {"num_inference_steps": 28, "guidance_scale": 7.0, "strength": 0.6},
        "control_inpaint": {"num_inference_steps": 28, "guidance_scale": 7.0, "strength": 0.6},
    },
)
