"""Qwen-Image's prompts: what a vision-language model says of a text, and of a picture to edit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..blocks.text import Prompt, as_list
from ..core.types import Cond
from .base import require_component

MAX_TOKENS = 1024

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
    prompt_template_encode: str | None = None,
    prompt_template_encode_start_idx: int | None = None,
    tokenizer_max_length: int = MAX_TOKENS,
) -> dict[str, Any]:
    """Last hidden states of the vision-language model for the prompt (and the reference picture), per branch.

    Args:
        prompt_template_encode: what to ask, with ``{}`` for the prompt; the family's own question if not given.
        prompt_template_encode_start_idx: how many of its first tokens are the question's own.
    """
    template = prompt_template_encode or (DESCRIBE if prompt_image is None else EDIT)
    drop = prompt_template_encode_start_idx
    drop = DROP[DESCRIBE if prompt_image is None else EDIT] if drop is None else drop
    question = (template, drop, tokenizer_max_length)

    def branch(texts: Prompt, tokens: Tensor | None, mask: Tensor | None, count: int) -> Cond:
        if tokens is None:
            tokens, mask = read(components, device, as_list(texts, count), prompt_image, *question)
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


def read(
    components: Mapping[str, Any],
    device: torch.device,
    texts: list[str],
    image: Any,
    template: str,
    drop: int,
    max_length: int,
) -> tuple[Tensor, Tensor]:
    """(B, L, D) and (B, L): the states of each text's own tokens, padded to the longest."""
    encoder = require_component(components, "text_encoder", "`prompt_embeds` and `prompt_embeds_mask`")
    asked = [template.format(text) for text in texts]
    if image is None:
        length = max_length + drop
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
