"""Stable Diffusion XL, base and refiner (Podell et al. 2023): two text encoders and size conditioning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..blocks.text import Prompt, as_list, check_pooled, check_second_prompt, tokenize
from ..blocks.timesteps import check_range
from ..core.types import Cond, ModelInput
from . import stable_diffusion as sd
from . import stable_diffusion_control as control
from .base import TASKS, Family, predict, with_channels
from .stable_diffusion_xl_sizes import condition


def check(
    family: Family,
    components: Mapping[str, Any],
    prompt: Prompt = None,
    prompt_2: Prompt = None,
    prompt_embeds: Tensor | None = None,
    pooled_prompt_embeds: Tensor | None = None,
    negative_prompt: Prompt = None,
    negative_prompt_2: Prompt = None,
    negative_prompt_embeds: Tensor | None = None,
    negative_pooled_prompt_embeds: Tensor | None = None,
    height: int | None = None,
    width: int | None = None,
    strength: float | None = None,
    guidance_scale: float = 5.0,
    num_images_per_prompt: int = 1,
    denoising_start: float | None = None,
    denoising_end: float | None = None,
    output_type: str = "pil",
    ip_adapter_image: Any = None,
    ip_adapter_image_embeds: Any = None,
) -> dict[str, Any]:
    """Validate the call; work out batch, size and whether there is a negative branch."""
    check_second_prompt(prompt_2, prompt_embeds, negative_prompt_2, negative_prompt_embeds)
    check_pooled(prompt_embeds, pooled_prompt_embeds, negative_prompt_embeds, negative_pooled_prompt_embeds)
    check_range(denoising_start, denoising_end)
    return sd.check(
        family, components, prompt, prompt_embeds, negative_prompt, negative_prompt_embeds, height, width, strength,
        guidance_scale, num_images_per_prompt, output_type, ip_adapter_image, ip_adapter_image_embeds,
    )  # fmt: skip


def encode(
    components: Mapping[str, Any],
    device: torch.device,
    config: Mapping[str, Any],
    prompt: Prompt = None,
    prompt_2: Prompt = None,
    negative_prompt: Prompt = None,
    negative_prompt_2: Prompt = None,
    prompt_embeds: Tensor | None = None,
    negative_prompt_embeds: Tensor | None = None,
    pooled_prompt_embeds: Tensor | None = None,
    negative_pooled_prompt_embeds: Tensor | None = None,
    num_images_per_prompt: int = 1,
    guide: bool = True,
    clip_skip: int | None = None,
) -> dict[str, Any]:
    """Penultimate hidden states of both text encoders side by side, and the second one's pooled vector."""
    if prompt_embeds is None:
        texts = as_list(prompt)
        positive = _both(components, device, texts, as_list(prompt_2) if prompt_2 else texts, clip_skip)
    else:
        positive = Cond(tokens=prompt_embeds, pooled=pooled_prompt_embeds)
    assert positive.tokens is not None and positive.pooled is not None
    conds = {"positive": positive}
    if guide:
        zeros = negative_prompt is None and config.get("force_zeros_for_empty_prompt", True)
        if negative_prompt_embeds is not None:
            negative = Cond(tokens=negative_prompt_embeds, pooled=negative_pooled_prompt_embeds)
        elif zeros:
            negative = positive.map(torch.zeros_like)
        else:
            count = positive.tokens.shape[0]
            first = as_list(negative_prompt or "", count)
            second = as_list(negative_prompt_2 or negative_prompt or "", count)
            negative = _both(components, device, first, second, None, positive.tokens.shape[1])
        conds = {"negative": negative, **conds}
    last = components.get("text_encoder_2")
    dtype = (last if last is not None else components["unet"]).dtype
    n = num_images_per_prompt or 1
    return {"conds": {k: c.to(device=device, dtype=dtype).repeat(n) for k, c in conds.items()}}


def _both(
    components: Mapping[str, Any],
    device: torch.device,
    texts: list[str],
    texts_2: list[str],
    clip_skip: int | None,
    length: int | None = None,
) -> Cond:
    """Both encoders' states; (B, L, D1 + D2) and (B, D2). The refiner has the second encoder only."""
    names = [n for n in ("text_encoder", "text_encoder_2") if components.get(n) is not None]
    pairs = {"text_encoder": ("tokenizer", texts), "text_encoder_2": ("tokenizer_2", texts_2)}
    states, pooled = [], None
    for name in names:
        tokenizer, prompts = pairs[name]
        prompts = texts if len(names) == 1 else prompts
        ids = tokenize(components[tokenizer], prompts, length).input_ids.to(device)
        out = components[name](ids, output_hidden_states=True)
        pooled = out[0] if out[0].ndim == 2 else pooled
        states.append(out.hidden_states[-2 if clip_skip is None else -(clip_skip + 2)])
    return Cond(tokens=torch.cat(states, dim=-1), pooled=pooled)


def call(unet: Any, inputs: ModelInput) -> Tensor:
    """Predict with a UNet that takes pooled text and sizes beside the text tokens."""
    return predict(
        unet,
        with_channels(inputs),
        inputs.t,
        encoder_hidden_states=inputs.cond.tokens,
        timestep_cond=inputs.guidance,
        cross_attention_kwargs=inputs.attention,
        added_cond_kwargs={"text_embeds": inputs.cond.pooled, "time_ids": inputs.cond.extras["time_ids"]},
        **inputs.residuals,
    )


STABLE_DIFFUSION_XL = Family(
    name="Stable Diffusion XL",
    denoiser="unet",
    check=check,
    encode=encode,
    call=call,
    condition=condition,
    upcast_vae=True,
    starts=control.CONTROL_STARTS,
    tasks=(*TASKS, *control.CONTROL_STARTS),
    edit=control.edit,
    defaults={
        "text2image": {"guidance_scale": 5.0},
        "image2image": {"guidance_scale": 5.0, "strength": 0.3},
        "inpaint": {"guidance_scale": 7.5, "strength": 0.9999},
        "controlnet": {"guidance_scale": 5.0},
        "controlnet_image2image": {"guidance_scale": 5.0, "strength": 0.8, "controlnet_conditioning_scale": 0.8},
        "controlnet_inpaint": {"guidance_scale": 5.0, "strength": 0.9999},
    },
)
