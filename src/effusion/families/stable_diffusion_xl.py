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
from .base import TASKS, Family, predict, setting, with_channels

Size = tuple[int, int]
FROM_NOISE = ("text2image", "controlnet")


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
