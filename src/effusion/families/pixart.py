"""PixArt-alpha and PixArt-sigma (Chen et al. 2023, 2024): a diffusion transformer that attends to T5 tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..blocks.text import Prompt, as_list, tokenize
from ..core import log
from ..core.types import Cond, ModelInput
from . import stable_diffusion as sd
from .base import Family, predict, require_component, setting, with_channels

logger = log.get_logger(__name__)

# (height, width) of the aspect ratios that the 1024-pixel models were trained at; others are scaled from them
_BINS = (
    (512, 2048), (512, 1856), (576, 1792), (576, 1728), (576, 1664), (640, 1600), (640, 1536), (704, 1472),
    (704, 1408), (704, 1344), (768, 1344), (768, 1280), (832, 1216), (832, 1152), (896, 1152), (896, 1088),
    (960, 1088), (960, 1024), (1024, 1024), (1024, 960), (1088, 960), (1088, 896), (1152, 896), (1152, 832),
    (1216, 832), (1280, 768), (1344, 768), (1408, 704), (1472, 704), (1536, 640), (1600, 640), (1728, 576),
    (2048, 512),
)  # fmt: skip
_MORE_2K = ((1024, 3968), (1024, 3840), (3328, 1152), (3584, 1152), (3712, 1024), (3840, 1024), (3968, 1024))


def bins_of(side: int) -> list[tuple[int, int]]:
    """(height, width) of the aspect ratios that a ``side``-pixel model was trained at."""
    bins = [(h * side // 1024, w * side // 1024) for h, w in _BINS]
    return bins + list(_MORE_2K if side == 2048 else ())


def nearest_bin(height: int, width: int, side: int) -> tuple[int, int]:
    """The training size of a ``side``-pixel model whose aspect ratio (to two digits) is nearest."""
    return min(bins_of(side), key=lambda size: abs(round(size[0] / size[1], 2) - height / width))


def _table(side: int) -> dict[str, list[float]]:
    """Aspect ratio -> (height, width), in the form in which scripts import it."""
    return {str(round(h / w, 2)): [float(h), float(w)] for h, w in bins_of(side)}


ASPECT_RATIO_256_BIN, ASPECT_RATIO_512_BIN = _table(256), _table(512)
ASPECT_RATIO_1024_BIN, ASPECT_RATIO_2048_BIN = _table(1024), _table(2048)


def check(
    family: Family,
    components: Mapping[str, Any],
    prompt: Prompt = None,
    prompt_embeds: Tensor | None = None,
    prompt_attention_mask: Tensor | None = None,
    negative_prompt: Prompt = "",
    negative_prompt_embeds: Tensor | None = None,
    negative_prompt_attention_mask: Tensor | None = None,
    height: int | None = None,
    width: int | None = None,
    strength: float | None = None,
    guidance_scale: float = 4.5,
    num_images_per_prompt: int = 1,
    use_resolution_binning: bool = True,
    output_type: str = "pil",
) -> dict[str, Any]:
    """Validate the call; work out batch, the size to make and, with binning, the size to run at."""
    for name, embeds, mask in (
        ("prompt", prompt_embeds, prompt_attention_mask),
        ("negative_prompt", negative_prompt_embeds, negative_prompt_attention_mask),
    ):
        if embeds is not None and mask is None:
            raise ValueError(f"`{name}_embeds` was given without `{name}_attention_mask`; give both")
    negative = negative_prompt if negative_prompt_embeds is None else negative_prompt or None
    found = sd.check(
        family, components, prompt, prompt_embeds, negative, negative_prompt_embeds, height, width, strength,
        guidance_scale, num_images_per_prompt, output_type,
    )  # fmt: skip
    native = setting(components[family.denoiser], "sample_size", 64) * 8
    if use_resolution_binning and native in (256, 512, 1024, 2048):
        final = (found["height"], found["width"])
        found["height"], found["width"] = nearest_bin(*final, native)
        found["final_size"] = final if output_type != "latent" else None
    return found


def encode(
    components: Mapping[str, Any],
    device: torch.device,
    prompt: Prompt = None,
    negative_prompt: Prompt = "",
    prompt_embeds: Tensor | None = None,
    prompt_attention_mask: Tensor | None = None,
    negative_prompt_embeds: Tensor | None = None,
    negative_prompt_attention_mask: Tensor | None = None,
    num_images_per_prompt: int = 1,
    guide: bool = True,
    clean_caption: bool = True,
    max_sequence_length: int = 120,
) -> dict[str, Any]:
    """T5 tokens and their mask, per branch."""
    if clean_caption and prompt is not None:
        logger.info("captions are lowercased and stripped; links and markup in them are not removed")
    if prompt_embeds is None:
        prompt_embeds, prompt_attention_mask = _t5(components, device, as_list(prompt), max_sequence_length)
    conds = {"positive": Cond(tokens=prompt_embeds, mask=prompt_attention_mask)}
    if guide:
        if negative_prompt_embeds is None:
            count, length = prompt_embeds.shape[:2]
            negative_prompt_embeds, negative_prompt_attention_mask = _t5(
                components, device, as_list(negative_prompt, count), length
            )
        conds = {"negative": Cond(tokens=negative_prompt_embeds, mask=negative_prompt_attention_mask), **conds}
    encoder = components.get("text_encoder")
    dtype = (encoder if encoder is not None else components["transformer"]).dtype
    n = num_images_per_prompt or 1
    made = {}
    for name, cond in conds.items():
        assert cond.tokens is not None and cond.mask is not None
        made[name] = Cond(tokens=cond.tokens.to(device, dtype), mask=cond.mask.to(device)).repeat(n)
    return {"conds": made}


def _t5(components: Mapping[str, Any], device: torch.device, texts: list[str], length: int) -> tuple[Tensor, Tensor]:
    encoder = require_component(components, "text_encoder", "`prompt_embeds` and `prompt_attention_mask`")
    texts = [text.lower().strip() for text in texts]
    tokens = tokenize(components["tokenizer"], texts, length, what="T5", add_special_tokens=True)
    mask = tokens.attention_mask.to(device)
    return encoder(tokens.input_ids.to(device), attention_mask=mask)[0], mask


def condition(
    family: Family,
    components: Mapping[str, Any],
    device: torch.device,
    batch: int,
    height: int,
    width: int,
    conds: dict[str, Cond],
) -> dict[str, Any]:
    """Micro-conditions of the 1024-pixel PixArt-alpha: size and aspect ratio."""
    transformer = components[family.denoiser]
    wants = setting(transformer, "use_additional_conditions")
    if not (setting(transformer, "sample_size") == 128 if wants is None else wants):
        return {}
    made = {}
    for name, cond in conds.items():
        assert cond.tokens is not None
        dtype = cond.tokens.dtype
        extras = {
            "resolution": torch.tensor([height, width], device=device, dtype=dtype).repeat(batch, 1),
            "aspect_ratio": torch.tensor([height / width], device=device, dtype=dtype).repeat(batch, 1),
        }
        made[name] = Cond(cond.tokens, None, cond.mask, extras)
    return {"conds": made}


def call(transformer: Any, inputs: ModelInput) -> Tensor:
    """Predict the noise; a learned variance, if the network has one, is left out."""
    x, cond = with_channels(inputs), inputs.cond
    extras = {"resolution": cond.extras.get("resolution"), "aspect_ratio": cond.extras.get("aspect_ratio")}
    prediction = predict(
        transformer,
        x,
        encoder_hidden_states=cond.tokens,
        encoder_attention_mask=cond.mask,
        timestep=inputs.t.expand(x.shape[0]),
        added_cond_kwargs=extras,
    )
    return prediction[:, : inputs.x.shape[1]]


PIXART = Family(
    name="PixArt",
    denoiser="transformer",
    check=check,
    encode=encode,
    call=call,
    condition=condition,
    resizes_image=True,
    defaults={
        "text2image": {"num_inference_steps": 20, "guidance_scale": 4.5},
        "image2image": {"num_inference_steps": 20, "guidance_scale": 4.5, "strength": 0.6},
        "inpaint": {"num_inference_steps": 20, "guidance_scale": 4.5, "strength": 1.0},
    },
)
