"""The steps of Qwen-Image: tokens without positions, latents with a frame axis."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core.random import Generators
from ...families import qwen_image_text
from .tokens import PackedLatents
from .unet import ByStrength


class QwenTokens(PackedLatents):
    """What all of them have."""

    _sample_mode = "argmax"

    @staticmethod
    def _unpack_latents(latents: Tensor, height: int, width: int, vae_scale_factor: int) -> Tensor:
        """(B, L, 4 C) -> (B, C, 1, h, w) of a picture of ``height`` x ``width`` pixels."""
        return PackedLatents._unpack_latents(latents, height, width, vae_scale_factor).unsqueeze(2)

    def _encode_vae_image(self, image: Tensor, generator: Generators) -> Tensor:
        """Normalised latents of pixels (B, 3, 1, H, W) in [-1, 1]; (B, C, 1, h, w)."""
        return super()._encode_vae_image(image.squeeze(2), generator).unsqueeze(2)

    def _reference(
        self, image: Tensor | None, batch: int, dtype: Any, device: Any, generator: Generators
    ) -> Tensor | None:
        z = super()._reference(image, batch, dtype, device, generator)
        return z if z is None or z.ndim == 4 else z[:, :, 0]

    def _extract_masked_hidden(self, hidden_states: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        """The states (L_i, D) of each row that the mask keeps."""
        return tuple(states[keep.bool()] for states, keep in zip(hidden_states, mask, strict=True))


class ReadsText(QwenTokens):
    """Those whose text encoder sees the prompt only."""

    def _get_qwen_prompt_embeds(self, prompt: Any = None, device: Any = None, dtype: Any = None) -> tuple[Any, Any]:
        """States (B, L, D) of the prompt's tokens and their mask (B, L)."""
        return read(self, prompt, None, device, dtype)


class ReadsPicture(QwenTokens):
    """Those whose text encoder sees the picture, too."""

    def _get_qwen_prompt_embeds(
        self, prompt: Any = None, image: Any = None, device: Any = None, dtype: Any = None
    ) -> tuple[Any, Any]:
        """States (B, L, D) of the prompt's tokens and their mask (B, L)."""
        return read(self, prompt, image, device, dtype)


def read(pipe: Any, prompt: Any, image: Any, device: Any, dtype: Any) -> tuple[Any, Any]:
    texts = [prompt] if isinstance(prompt, str) else list(prompt)
    where = torch.device(device or pipe._execution_device)
    question = (pipe.prompt_template_encode, pipe.prompt_template_encode_start_idx, pipe.tokenizer_max_length)
    tokens, mask = qwen_image_text.read(pipe.components, where, texts, image, *question)
    return tokens.to(dtype or tokens.dtype), mask


class QwenFromNoise(ReadsText):
    """Pipelines that start from noise."""

    def prepare_latents(
        self,
        batch_size: int,
        num_channels_latents: int,
        height: int,
        width: int,
        dtype: Any,
        device: Any,
        generator: Generators,
        latents: Tensor | None = None,
    ) -> Tensor:
        """Tokens of noise, or ``latents``."""
        if latents is not None:
            return latents.to(device=device, dtype=dtype)
        return self._noise(batch_size, num_channels_latents, height, width, dtype, device, generator)


class QwenFromImage(ByStrength, ReadsText):
    """Pipelines that start from a picture."""

    _sample_mode = "sample"

    def prepare_latents(
        self,
        image: Tensor,
        timestep: Any,
        batch_size: int,
        num_channels_latents: int,
        height: int,
        width: int,
        dtype: Any,
        device: Any,
        generator: Generators,
        latents: Tensor | None = None,
    ) -> Any:
        """Tokens of ``image`` (pixels in [-1, 1]) at the noise level of ``timestep``, or ``latents``."""
        if latents is not None:
            return latents.to(device=device, dtype=dtype)
        return self._noised(_without_frames(image), timestep, batch_size, dtype, device, generator)[0]


class QwenInsideMask(ByStrength, ReadsText):
    """Pipelines that paint inside a mask."""

    _sample_mode = "sample"

    def prepare_latents(
        self,
        image: Tensor,
        timestep: Any,
        batch_size: int,
        num_channels_latents: int,
        height: int,
        width: int,
        dtype: Any,
        device: Any,
        generator: Generators,
        latents: Tensor | None = None,
    ) -> Any:
        """Tokens of ``image`` at the noise level of ``timestep``, of the noise, clean; or ``latents``."""
        if latents is not None:
            return latents.to(device=device, dtype=dtype)
        return self._noised(_without_frames(image), timestep, batch_size, dtype, device, generator)


class QwenReference(ReadsPicture):
    """Editing: a reference picture has tokens of its own."""

    def prepare_latents(
        self,
        image: Tensor | None,
        batch_size: int,
        num_channels_latents: int,
        height: int,
        width: int,
        dtype: Any,
        device: Any,
        generator: Generators,
        latents: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens of noise (or ``latents``), and of the picture."""
        z = self._reference(image, batch_size, dtype, device, generator)
        if latents is None:
            latents = self._noise(batch_size, num_channels_latents, height, width, dtype, device, generator)
        seen = None if z is None else self._pack_latents(z, *z.shape)
        return latents.to(device=device, dtype=dtype), seen


def _without_frames(image: Tensor) -> Tensor:
    return image.squeeze(2) if image.ndim == 5 else image
