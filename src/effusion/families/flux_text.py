"""FLUX.1's prompts: T5 tokens beside CLIP's pooled vector."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..blocks.text import Prompt, as_list, tokenize
from ..core.types import Cond
from .base import require_component


def encode(
    components: Mapping[str, Any],
    device: torch.device,
    prompt: Prompt = None,
    prompt_2: Prompt = None,
    negative_prompt: Prompt = None,
    negative_prompt_2: Prompt = None,
    prompt_embeds: Tensor | None = None,
    pooled_prompt_embeds: Tensor | None = None,
    negative_prompt_embeds: Tensor | None = None,
    negative_pooled_prompt_embeds: Tensor | None = None,
    num_images_per_prompt: int = 1,
    max_sequence_length: int = 512,
    guide: bool = False,
    tokenizer_max_length: int | None = None,
) -> dict[str, Any]:
    """T5 tokens of ``prompt_2`` (or ``prompt``) and CLIP's pooled vector of ``prompt``, per branch."""

    def branch(texts: Prompt, texts_2: Prompt, tokens: Tensor | None, pooled: Tensor | None, count: int) -> Cond:
        if tokens is None:
            first = as_list(texts, count)
            pooled = clip_pooled(components, device, first, tokenizer_max_length)
            tokens = t5_tokens(components, device, as_list(texts_2, count) if texts_2 else first, max_sequence_length)
        return Cond(tokens=tokens, pooled=pooled)

    positive = branch(prompt, prompt_2, prompt_embeds, pooled_prompt_embeds, len(as_list(prompt)))
    conds = {"positive": positive}
    if guide:
        assert positive.tokens is not None
        conds["negative"] = branch(
            negative_prompt, negative_prompt_2, negative_prompt_embeds, negative_pooled_prompt_embeds,
            positive.tokens.shape[0],
        )  # fmt: skip
    return {"conds": {k: c.to(device=device).repeat(num_images_per_prompt or 1) for k, c in conds.items()}}


def clip_pooled(
    components: Mapping[str, Any], device: torch.device, texts: list[str], length: int | None = None
) -> Tensor:
    """CLIP's pooled vectors; (B, D)."""
    encoder = require_component(components, "text_encoder", "`pooled_prompt_embeds`")
    ids = tokenize(components["tokenizer"], texts, length).input_ids.to(device)
    return encoder(ids, output_hidden_states=False).pooler_output.to(encoder.dtype)  # (B, D)  # type: ignore[no-any-return]


def t5_tokens(components: Mapping[str, Any], device: torch.device, texts: list[str], length: int) -> Tensor:
    """T5's states; (B, L, D)."""
    encoder = require_component(components, "text_encoder_2", "`prompt_embeds`")
    ids = tokenize(components["tokenizer_2"], texts, length, what="T5").input_ids.to(device)
    return encoder(ids, output_hidden_states=False)[0].to(encoder.dtype)  # (B, L, D)  # type: ignore[no-any-return]
