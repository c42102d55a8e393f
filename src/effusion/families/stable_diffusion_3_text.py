"""Stable Diffusion 3's prompts: two CLIPs and T5, any of which may be missing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..blocks.text import Prompt, as_list, tokenize
from ..core.types import Cond

CLIP_TOKENS = 77


def encode(
    components: Mapping[str, Any],
    device: torch.device,
    prompt: Prompt = None,
    prompt_2: Prompt = None,
    prompt_3: Prompt = None,
    negative_prompt: Prompt = None,
    negative_prompt_2: Prompt = None,
    negative_prompt_3: Prompt = None,
    prompt_embeds: Tensor | None = None,
    pooled_prompt_embeds: Tensor | None = None,
    negative_prompt_embeds: Tensor | None = None,
    negative_pooled_prompt_embeds: Tensor | None = None,
    num_images_per_prompt: int = 1,
    guide: bool = True,
    clip_skip: int | None = None,
    max_sequence_length: int = 256,
    tokenizer_max_length: int = CLIP_TOKENS,
) -> dict[str, Any]:
    """CLIP states side by side, then T5's; and both CLIPs' pooled vectors. Any of the three encoders may be missing."""
    lengths = (tokenizer_max_length, max_sequence_length)
    if prompt_embeds is None:
        texts = [prompt, prompt_2 or prompt, prompt_3 or prompt]
        positive = _all_three(components, device, [as_list(t) for t in texts], clip_skip, *lengths)
    else:
        positive = Cond(tokens=prompt_embeds, pooled=pooled_prompt_embeds)
    conds = {"positive": positive}
    if guide:
        assert positive.tokens is not None
        if negative_prompt_embeds is None:
            first = negative_prompt or ""
            texts = [first, negative_prompt_2 or first, negative_prompt_3 or first]
            rows = [as_list(t, positive.tokens.shape[0]) for t in texts]
            negative = _all_three(components, device, rows, None, *lengths)
        else:
            negative = Cond(tokens=negative_prompt_embeds, pooled=negative_pooled_prompt_embeds)
        conds = {"negative": negative, **conds}
    return {"conds": {k: c.to(device=device).repeat(num_images_per_prompt or 1) for k, c in conds.items()}}


def _all_three(
    components: Mapping[str, Any],
    device: torch.device,
    texts: list[list[str]],
    clip_skip: int | None,
    clip_length: int,
    length: int,
) -> Cond:
    transformer, count = components["transformer"], len(texts[0])
    width, pooled_width = transformer.config.joint_attention_dim, transformer.config.pooled_projection_dim
    states: list[Tensor | None] = []
    pooled: list[Tensor | None] = []
    for suffix, prompts in (("", texts[0]), ("_2", texts[1])):
        encoder = components.get(f"text_encoder{suffix}")
        if encoder is None:
            states.append(None)
            pooled.append(None)
            continue
        tokens, vector = clip_tokens(components, device, suffix, prompts, clip_skip, clip_length)
        states.append(tokens)
        pooled.append(vector)
    vectors = _fill(pooled, pooled_width, (count,), transformer, device)
    clip = _fill(states, pooled_width, (count, clip_length), transformer, device)
    t5 = t5_tokens(components, device, texts[2], length, width)
    clip = torch.nn.functional.pad(clip, (0, width - clip.shape[-1]))
    return Cond(tokens=torch.cat([clip, t5], dim=-2), pooled=vectors)


def clip_tokens(
    components: Mapping[str, Any],
    device: torch.device,
    suffix: str,
    texts: list[str],
    clip_skip: int | None,
    length: int = CLIP_TOKENS,
) -> tuple[Tensor, Tensor]:
    """The last but one layer's states of the encoder with this ``suffix``, and its pooled vectors; (B, 77, D), (B, D)."""
    encoder = components[f"text_encoder{suffix}"]
    ids = tokenize(components[f"tokenizer{suffix}"], texts, length).input_ids.to(device)
    out = encoder(ids, output_hidden_states=True)
    return out.hidden_states[-2 if clip_skip is None else -(clip_skip + 2)].to(encoder.dtype), out[0]


def _fill(parts: list[Any], width: int, shape: tuple[int, ...], like: Any, device: torch.device) -> Tensor:
    """The parts side by side, zeros in place of a missing encoder's."""
    here = sum(p.shape[-1] for p in parts if p is not None)
    missing = sum(p is None for p in parts)
    zeros = [torch.zeros(*shape, (width - here) // missing, dtype=like.dtype, device=device)] if missing else []
    return torch.cat([zeros[0] if p is None else p for p in parts], dim=-1)


def t5_tokens(components: Mapping[str, Any], device: torch.device, texts: list[str], length: int, width: int) -> Tensor:
    """T5's states, or zeros where it is missing; (B, L, D)."""
    encoder = components.get("text_encoder_3")
    if encoder is None:
        return torch.zeros(len(texts), length, width, dtype=components["transformer"].dtype, device=device)
    ids = tokenize(components["tokenizer_3"], texts, length, what="T5", add_special_tokens=True).input_ids
    return encoder(ids.to(device))[0].to(encoder.dtype)  # type: ignore[no-any-return]
