"""Prompts to conditioning: what text encoders of the CLIP kind need, whatever the family."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..core import log

logger = log.get_logger(__name__)
Prompt = str | Sequence[str] | None


def as_list(prompt: Prompt, batch: int = 1) -> list[str]:
    """A prompt, or several, as a list of ``batch`` strings."""
    if prompt is None:
        return [""] * batch
    return [prompt] * batch if isinstance(prompt, str) else list(prompt)


def tokenize(
    tokenizer: Any, texts: list[str], max_length: int | None = None, what: str = "CLIP", **options: Any
) -> Any:
    """Token ids and mask padded to ``max_length``; warns with the part of a prompt that was cut off."""
    length = max_length or tokenizer.model_max_length
    options = {"padding": "max_length", "truncation": True, "return_tensors": "pt", **options}
    tokens = tokenizer(texts, max_length=length, **options)
    longest = tokenizer(texts, padding="longest", return_tensors="pt").input_ids
    if longest.shape[-1] > tokens.input_ids.shape[-1]:
        lost = [t for t in tokenizer.batch_decode(longest[:, length - 1 : -1]) if t.strip()]
        logger.warning("%s reads at most %d tokens; this part of your input was truncated: %s", what, length, lost)
    return tokens


def clip_tokens(
    text_encoder: Any, tokenizer: Any, texts: list[str], device: torch.device, clip_skip: int | None, length: int | None
) -> Tensor:
    """Last hidden states of a CLIP text model (or ``clip_skip`` layers earlier), normalised; ``(B, L, D)``."""
    tokens = tokenize(tokenizer, texts, length)
    use_mask = getattr(text_encoder.config, "use_attention_mask", False)
    mask = tokens.attention_mask.to(device) if use_mask else None
    ids = tokens.input_ids.to(device)
    if clip_skip is None:
        return text_encoder(ids, attention_mask=mask)[0]  # type: ignore[no-any-return]
    hidden = text_encoder(ids, attention_mask=mask, output_hidden_states=True).hidden_states[-(clip_skip + 1)]
    norm = getattr(text_encoder, "text_model", text_encoder).final_layer_norm
    return norm(hidden)  # type: ignore[no-any-return]


def check_prompts(
    prompt: Any,
    prompt_embeds: Tensor | None,
    negative_prompt: Any = None,
    negative_prompt_embeds: Tensor | None = None,
) -> int:
    """Exactly one form of prompt, negatives that match it; returns the number of prompts.

    Raises:
        ValueError: none or both forms given, or shapes and lengths that don't match.
        TypeError: a prompt that is no text.
    """
    for name, text, embeds in (
        ("prompt", prompt, prompt_embeds),
        ("negative_prompt", negative_prompt, negative_prompt_embeds),
    ):
        if text is not None and embeds is not None:
            raise ValueError(f"both `{name}` and `{name}_embeds` were given; give one of them")
        if text is not None and not isinstance(text, (str, list, tuple)):
            raise TypeError(f"`{name}` has to be a string or a list of strings, not {type(text).__name__}")
    if prompt is None and prompt_embeds is None:
        raise ValueError("neither `prompt` nor `prompt_embeds` was given; give one of them")
    shapes = [tuple(embeds.shape) for embeds in (prompt_embeds, negative_prompt_embeds) if embeds is not None]
    if len(set(shapes)) > 1:
        raise ValueError(f"`prompt_embeds` and `negative_prompt_embeds` must have the same shape, got {shapes}")
    count = prompt_embeds.shape[0] if prompt_embeds is not None else len(as_list(prompt))
    if isinstance(negative_prompt, (list, tuple)) and len(negative_prompt) != count:
        raise ValueError(f"{len(negative_prompt)} negative prompts for {count} prompts: give one, or one for each")
    return count


def check_pooled(
    prompt_embeds: Tensor | None, pooled: Tensor | None, negative_embeds: Tensor | None, negative_pooled: Tensor | None
) -> None:
    """Embeddings come with their pooled vector, for families that use both.

    Raises:
        ValueError: one is there without the other.
    """
    for name, embeds, vector in (("", prompt_embeds, pooled), ("negative_", negative_embeds, negative_pooled)):
        if embeds is not None and vector is None:
            raise ValueError(
                f"`{name}prompt_embeds` was given without `{name}pooled_prompt_embeds`; "
                "give both, as `encode_prompt` returns them"
            )


def check_second_prompt(
    prompt_2: Prompt, prompt_embeds: Tensor | None, negative_prompt_2: Prompt, negative_embeds: Tensor | None
) -> None:
    """Text for a second encoder excludes embeddings, which stand for both.

    Raises:
        ValueError: both are given.
    """
    for name, text, embeds in (("", prompt_2, prompt_embeds), ("negative_", negative_prompt_2, negative_embeds)):
        if text is not None and embeds is not None:
            raise ValueError(f"both `{name}prompt_2` and `{name}prompt_embeds` were given; give one of them")


def check_tokens(max_sequence_length: int | None, most: int) -> None:
    if max_sequence_length is not None and not 0 < max_sequence_length <= most:
        raise ValueError(
            f"`max_sequence_length` has to be in 1..{most}, got {max_sequence_length}: it can't be over {most}"
        )
