"""The steps from a prompt to embeddings, one text encoder at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...families import flux_text
from ...families import stable_diffusion_3_text as sd3_text
from ..base import DiffusionPipeline
from .clip import see


def _texts(prompt: Any) -> list[str]:
    return [prompt] if isinstance(prompt, str) else list(prompt)


class FluxText(DiffusionPipeline):
    """FLUX.1: CLIP's pooled vector and T5's tokens."""

    def _get_clip_prompt_embeds(self, prompt: Any, num_images_per_prompt: int = 1, device: Any = None) -> Tensor:
        """CLIP's pooled vectors; (B, D)."""
        where = torch.device(device or self._execution_device)
        pooled = flux_text.clip_pooled(self.components, where, _texts(prompt))
        return pooled.repeat_interleave(num_images_per_prompt, dim=0)

    def _get_t5_prompt_embeds(
        self,
        prompt: Any = None,
        num_images_per_prompt: int = 1,
        max_sequence_length: int = 512,
        device: Any = None,
        dtype: Any = None,
    ) -> Tensor:
        """T5's states; (B, L, D)."""
        where = torch.device(device or self._execution_device)
        tokens = flux_text.t5_tokens(self.components, where, _texts(prompt), max_sequence_length)
        return tokens.to(dtype or tokens.dtype).repeat_interleave(num_images_per_prompt, dim=0)


class FluxImages(DiffusionPipeline):
    """FLUX.1 with an image encoder, for IP-Adapters."""

    def encode_image(self, image: Any, device: Any, num_images_per_prompt: int) -> Tensor:
        """Embeddings of pictures; (B, D)."""
        embeds = self.image_encoder(see(self, image, device)).image_embeds
        return embeds.repeat_interleave(num_images_per_prompt, dim=0)  # type: ignore[no-any-return]


class StableDiffusion3Text(DiffusionPipeline):
    """Stable Diffusion 3: two CLIPs and T5, and an image encoder for IP-Adapters."""

    def _get_clip_prompt_embeds(
        self,
        prompt: Any,
        num_images_per_prompt: int = 1,
        device: Any = None,
        clip_skip: int | None = None,
        clip_model_index: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """States (B, 77, D) and pooled vectors (B, D) of the first CLIP or the second."""
        where, suffix = torch.device(device or self._execution_device), ("", "_2")[clip_model_index]
        tokens, pooled = sd3_text.clip_tokens(self.components, where, suffix, _texts(prompt), clip_skip)
        n = num_images_per_prompt
        return tokens.repeat_interleave(n, dim=0), pooled.repeat_interleave(n, dim=0)

    def _get_t5_prompt_embeds(
        self,
        prompt: Any = None,
        num_images_per_prompt: int = 1,
        max_sequence_length: int = 256,
        device: Any = None,
        dtype: Any = None,
    ) -> Tensor:
        """T5's states, or zeros where it is missing; (B, L, D)."""
        where, width = torch.device(device or self._execution_device), self.transformer.config.joint_attention_dim
        tokens = sd3_text.t5_tokens(self.components, where, _texts(prompt), max_sequence_length, width)
        return tokens.to(dtype or tokens.dtype).repeat_interleave(num_images_per_prompt, dim=0)

    def encode_image(self, image: Any, device: Any) -> Tensor:
        """The last but one layer's states of pictures; (B, L, D)."""
        states = self.image_encoder(see(self, image, device), output_hidden_states=True).hidden_states
        return states[-2]  # type: ignore[no-any-return]


class CaptionText(DiffusionPipeline):
    """PixArt: captions are lowercased and stripped."""

    def _text_preprocessing(self, text: Any, clean_caption: bool = False) -> list[str]:
        return [t.lower().strip() for t in _texts(text)]
