"""Stable Diffusion 3 and 3.5 (Esser et al. 2024): a multimodal rectified-flow transformer with three text encoders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..blocks.guiders import ClassifierFree, SkipLayer
from ..blocks.text import Prompt, check_pooled, check_prompts, check_tokens
from ..blocks.timesteps import retrieve_timesteps, start_at_strength
from ..core.types import ModelInput
from . import stable_diffusion as sd
from .base import TASKS, Family, predict, setting, with_channels
from .flux import shift_of
from .stable_diffusion_3_control import SD3_STARTS
from .stable_diffusion_3_text import encode

MAX_TOKENS = 512


def check(
    family: Family,
    components: Mapping[str, Any],
    prompt: Prompt = None,
    prompt_2: Prompt = None,
    prompt_3: Prompt = None,
    prompt_embeds: Tensor | None = None,
    pooled_prompt_embeds: Tensor | None = None,
    negative_prompt: Prompt = None,
    negative_prompt_2: Prompt = None,
    negative_prompt_3: Prompt = None,
    negative_prompt_embeds: Tensor | None = None,
    negative_pooled_prompt_embeds: Tensor | None = None,
    height: int | None = None,
    width: int | None = None,
    strength: float | None = None,
    guidance_scale: float = 7.0,
    num_images_per_prompt: int = 1,
    max_sequence_length: int = 256,
    output_type: str = "pil",
    ip_adapter_image: Any = None,
    ip_adapter_image_embeds: Any = None,
) -> dict[str, Any]:
    """Validate the call; work out batch, size and whether there is a negative branch."""
    for extra in (prompt_2, prompt_3):
        check_prompts(extra if extra is not None else prompt, prompt_embeds)
    for extra in (negative_prompt_2, negative_prompt_3):
        if extra is not None and negative_prompt_embeds is not None:
            raise ValueError("a negative prompt and `negative_prompt_embeds` were both given; give one of them")
    check_pooled(prompt_embeds, pooled_prompt_embeds, negative_prompt_embeds, negative_pooled_prompt_embeds)
    check_tokens(max_sequence_length, MAX_TOKENS)
    found = sd.check(
        family, components, prompt, prompt_embeds, negative_prompt, negative_prompt_embeds, height, width, strength,
        guidance_scale, num_images_per_prompt, output_type, ip_adapter_image, ip_adapter_image_embeds,
    )  # fmt: skip
    side = family.latent_format(components).downscale * setting(components[family.denoiser], "patch_size", 2)
    if found["height"] % side or found["width"] % side:
        raise ValueError(f"`height` and `width` have to be divisible by {side}, got {height} x {width}")
    return found


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
    mu: float | None = None,
) -> dict[str, Any]:
    """Flow times; shifted with the size of the picture when the scheduler says so."""
    options: dict[str, Any] = {}
    if scheduler.config.get("use_dynamic_shifting", False):
        side = family.latent_format(components).downscale * setting(components[family.denoiser], "patch_size", 2)
        options["mu"] = shift_of((height // side) * (width // side), scheduler.config) if mu is None else mu
    elif mu is not None:
        options["mu"] = mu
    steps, count = retrieve_timesteps(scheduler, num_inference_steps, device, sigmas=sigmas, **options)
    if strength is not None:
        steps, count = start_at_strength(scheduler, count, strength)
    if len(steps) < 1:
        raise ValueError(f"no denoising step is left of {num_inference_steps} at strength {strength}; raise either")
    return {"timesteps": steps, "num_inference_steps": count}


def condition(
    guidance_scale: float = 7.0,
    skip_guidance_layers: list[int] | None = None,
    skip_layer_guidance_scale: float = 2.8,
    skip_layer_guidance_stop: float = 0.2,
    skip_layer_guidance_start: float = 0.01,
) -> dict[str, Any]:
    """The guider: classifier-free, with skip-layer guidance if layers are named."""
    if skip_guidance_layers is None:
        return {"guider": ClassifierFree(guidance_scale)}
    start, stop = skip_layer_guidance_start, skip_layer_guidance_stop
    layers = tuple(skip_guidance_layers)
    return {"guider": SkipLayer(guidance_scale, 0.0, layers, skip_layer_guidance_scale, start, stop)}


def call(transformer: Any, inputs: ModelInput) -> Tensor:
    """Predict the flow from latents, text tokens and pooled text."""
    x = with_channels(inputs)
    return predict(
        transformer,
        hidden_states=x,
        timestep=inputs.t.expand(x.shape[0]),
        encoder_hidden_states=inputs.cond.tokens,
        pooled_projections=inputs.cond.pooled,
        joint_attention_kwargs=inputs.attention,
        skip_layers=list(inputs.skip_layers) if inputs.skip_layers else None,
        **inputs.residuals,
    )


STABLE_DIFFUSION_3 = Family(
    name="Stable Diffusion 3",
    denoiser="transformer",
    check=check,
    encode=encode,
    call=call,
    condition=condition,
    schedule=set_timesteps,
    resizes_image=True,
    starts=SD3_STARTS,
    tasks=(*TASKS, *SD3_STARTS),
    defaults={
        "text2image": {"num_inference_steps": 28, "guidance_scale": 7.0},
        "image2image": {"num_inference_steps": 50, "guidance_scale": 7.0, "strength": 0.6},
        "controlnet": {"num_inference_steps": 28, "guidance_scale": 7.0},
        "controlnet_inpaint": {"num_inference_steps": 28, "guidance_scale": 7.0},
        "inpaint": {"num_inference_steps": 50, "guidance_scale": 7.0, "strength": 0.6},
    },
)
