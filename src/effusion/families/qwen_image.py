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
from ..blocks.text import Prompt, as_list, check_prompts
from ..blocks.timesteps import check_strength
from ..core import log
from ..core.random import Generators
from ..core.types import Cond, LatentFormat, ModelInput
from . import flux
from .base import Family, predict, require_component, setting

logger = log.get_logger(__name__)
MAX_TOKENS = 1024
EDIT_AREA = 1024 * 1024  # pixels of the reference picture, and of the result unless a size is given

# What the text encoder is asked, and how many of its first tokens are the question's own.
DESCRIBE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
EDIT = (
    "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, texture, objects, "
    "background), then explain how the user's text instruction should alter or modify the image. Generate a new image "
    "that meets the user's requirements while maintaining consistency with the original input where appropriate."
    "<|im_end|>\n<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{}<|im_end|>\n<|im_start|>assistant\n"
)
DROP = {DESCRIBE: 34, EDIT: 64}


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
    if max_sequence_length is not None and max_sequence_length > MAX_TOKENS:
        raise ValueError(f"`max_sequence_length` can't be over {MAX_TOKENS}, got {max_sequence_length}")
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
        logger.warning("`guidance_scale` %s has no effect: this checkpoint is not distilled; see `true_cfg_scale`", scale)


def encode(
    components: Mapping[str, Any],
    device: torch.device,
    prompt: Prompt = None,
    negative_prompt: Prompt = None,
    prompt_embeds: Tensor | None = None,
    prompt_embeds_mask: Tensor | None = None,
    negative_prompt_embeds: Tensor | None = None,
    negative_prompt_embeds_mask: Tensor | None = None,
    num_images_per_prompt: int = 1,
    max_sequence_length: int = 512,
    guide: bool = False,
    prompt_image: Any = None,
) -> dict[str, Any]:
    """Last hidden states of the vision-language model for the prompt (and the reference picture), per branch."""

    def branch(texts: Prompt, tokens: Tensor | None, mask: Tensor | None, count: int) -> Cond:
        if tokens is None:
            tokens, mask = _read(components, device, as_list(texts, count), prompt_image)
            tokens, mask = tokens[:, :max_sequence_length], mask[:, :max_sequence_length]
        if mask is not None and bool(mask.all()):
            mask = None
        return Cond(tokens=tokens, mask=mask)

    positive = branch(prompt, prompt_embeds, prompt_embeds_mask, len(as_list(prompt)))
    conds = {"positive": positive}
    if guide:
        assert positive.tokens is not None
        count = positive.tokens.shape[0]
        conds["negative"] = branch(negative_prompt, negative_prompt_embeds, negative_prompt_embeds_mask, count)
    return {"conds": {k: c.map(lambda x: x.to(device)).repeat(num_images_per_prompt or 1) for k, c in conds.items()}}


def _read(components: Mapping[str, Any], device: torch.device, texts: list[str], image: Any) -> tuple[Tensor, Tensor]:
    """(B, L, D) and (B, L): the states of each text's own tokens, padded to the longest."""
    encoder = require_component(components, "text_encoder", "`prompt_embeds` and `prompt_embeds_mask`")
    template = DESCRIBE if image is None else EDIT
    drop = DROP[template]
    asked = [template.format(text) for text in texts]
    if image is None:
        length = MAX_TOKENS + drop
        inputs = components["tokenizer"](asked, max_length=length, padding=True, truncation=True, return_tensors="pt")
        more = {}
    else:
        inputs = components["processor"](text=asked, images=image, padding=True, return_tensors="pt")
        more = {"pixel_values": inputs.pixel_values.to(device), "image_grid_thw": inputs.image_grid_thw.to(device)}
    mask = inputs.attention_mask.to(device)
    out = encoder(input_ids=inputs.input_ids.to(device), attention_mask=mask, output_hidden_states=True, **more)
    rows = [states[keep.bool()][drop:] for states, keep in zip(out.hidden_states[-1], mask, strict=True)]
    masks = [torch.ones(len(row), dtype=torch.long, device=device) for row in rows]
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(rows, batch_first=True).to(encoder.dtype), pad(masks, batch_first=True)


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
    if setting(components[family.denoiser], "guidance_embeds", False):
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
    ratio = columns / rows
    width = math.sqrt(area * ratio)
    return round(width / ratio / 32) * 32, round(width / 32) * 32


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
    dtype = dtype_of(conds, components[family.denoiser].dtype)
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
