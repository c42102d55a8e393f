"""The steps of transformers over packed latents: FLUX.1 and Qwen-Image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...blocks.latents import check_generators, clean_latents, encode_pixels, match_batch, pack, unpack
from ...blocks.timesteps import noised
from ...core.random import Generators, randn_tensor
from ...families.flux_tasks import token_ids
from ..base import DiffusionPipeline
from .unet import ByStrength

SIDE = 2  # latents along a side of a token


class PackedLatents(DiffusionPipeline):
    """Pipelines whose networks see squares of latents as tokens."""

    _sample_mode = "sample"  # which latents of a picture are taken

    @staticmethod
    def _pack_latents(latents: Tensor, batch_size: int, num_channels_latents: int, height: int, width: int) -> Tensor:
        """(B, C, h, w) -> (B, h w / 4, 4 C)."""
        return pack(latents.reshape(batch_size, num_channels_latents, height, width), SIDE)

    @staticmethod
    def _unpack_latents(latents: Tensor, height: int, width: int, vae_scale_factor: int) -> Tensor:
        """(B, L, 4 C) -> (B, C, h, w) of a picture of ``height`` x ``width`` pixels."""
        return unpack(latents, SIDE, *_grid(height, width, vae_scale_factor))

    def _encode_vae_image(self, image: Tensor, generator: Generators) -> Tensor:
        """Normalised latents of pixels in [-1, 1]."""
        return encode_pixels(self.family, self.vae, image, generator, self._sample_mode)

    def _noise(
        self, batch: int, channels: int, height: int, width: int, dtype: Any, device: Any, generator: Generators
    ) -> Tensor:
        """Tokens of fresh noise."""
        check_generators(generator, batch)
        shape = (batch, channels, *_grid(height, width, self.vae_scale_factor))
        return pack(randn_tensor(shape, generator=generator, device=torch.device(device), dtype=dtype), SIDE)

    def _noised(
        self, image: Tensor, timestep: Any, batch: int, dtype: Any, device: Any, generator: Generators
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens of pictures at the noise level of ``timestep``, of their noise, and clean."""
        clean = clean_latents(self.family, self.components, image.to(device=device, dtype=dtype), batch, generator)
        noise = randn_tensor(clean.shape, generator=generator, device=torch.device(device), dtype=dtype)
        noisy = noised(self.scheduler, clean, noise, timestep)
        return pack(noisy, SIDE), pack(noise, SIDE), pack(clean, SIDE)

    def _reference(
        self, image: Tensor | None, batch: int, dtype: Any, device: Any, generator: Generators
    ) -> Tensor | None:
        """The latents of a reference picture (or these themselves); (B, C, h, w)."""
        if image is None:
            return None
        image = image.to(device=device, dtype=dtype)
        if image.shape[1] != self.family.latent_format(self.components).channels:
            image = self._encode_vae_image(image, generator)
        return match_batch(image, batch, "images")

    def _masked(
        self, mask: Tensor, masked_image: Tensor, batch: int, height: int, width: int, dtype: Any, device: Any,
        generator: Generators,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Mask at latent size and the masked picture's latents; (B, 1, h, w) and (B, C, h, w)."""
        size = _grid(height, width, self.vae_scale_factor)
        small = torch.nn.functional.interpolate(mask, size=size).to(device=device, dtype=dtype)
        masked = self._reference(masked_image, batch, dtype, device, generator)
        assert masked is not None
        return match_batch(small, batch, "masks"), masked

    def prepare_mask_latents(
        self,
        mask: Tensor,
        masked_image: Tensor,
        batch_size: int,
        num_channels_latents: int,
        num_images_per_prompt: int,
        height: int,
        width: int,
        dtype: Any,
        device: Any,
        generator: Generators,
    ) -> tuple[Tensor, Tensor]:
        """Tokens of the mask, once for each channel, and of the masked picture."""
        batch = batch_size * num_images_per_prompt
        small, masked = self._masked(mask, masked_image, batch, height, width, dtype, device, generator)
        return pack(small.repeat(1, num_channels_latents, 1, 1), SIDE), pack(masked, SIDE)


def _grid(height: int, width: int, vae_scale_factor: int) -> tuple[int, int]:
    """Latents along the sides of a picture, in whole tokens."""
    pixels = vae_scale_factor * SIDE
    return SIDE * (int(height) // pixels), SIDE * (int(width) // pixels)


class FluxTokens(PackedLatents):
    """Tokens of FLUX.1, which come with their positions."""

    @staticmethod
    def _prepare_latent_image_ids(batch_size: int, height: int, width: int, device: Any, dtype: Any) -> Tensor:
        """(group, row, column) of ``height`` x ``width`` tokens; (L, 3), the same for the whole batch."""
        return token_ids(height, width, device, dtype)

    def _ids(self, height: int, width: int, dtype: Any, device: Any, group: int = 0) -> Tensor:
        rows, columns = _grid(height, width, self.vae_scale_factor)
        return token_ids(rows // SIDE, columns // SIDE, device, dtype, group)


class FluxFromNoise(FluxTokens):
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
    ) -> tuple[Tensor, Tensor]:
        """Tokens of noise, or ``latents``, and their positions."""
        ids = self._ids(height, width, dtype, device)
        if latents is not None:
            return latents.to(device=device, dtype=dtype), ids
        return self._noise(batch_size, num_channels_latents, height, width, dtype, device, generator), ids


class FluxFromImage(ByStrength, FluxTokens):
    """Pipelines that start from a picture."""

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
    ) -> tuple[Tensor, Tensor]:
        """Tokens of ``image`` (pixels in [-1, 1]) at the noise level of ``timestep``, or ``latents``; positions."""
        ids = self._ids(height, width, dtype, device)
        if latents is not None:
            return latents.to(device=device, dtype=dtype), ids
        return self._noised(image, timestep, batch_size, dtype, device, generator)[0], ids


class FluxInsideMask(ByStrength, FluxTokens):
    """Pipelines that paint inside a mask."""

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
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tokens of ``image`` at the noise level of ``timestep``, of the noise, clean; and their positions."""
        ids = self._ids(height, width, dtype, device)
        noisy, noise, clean = self._noised(image, timestep, batch_size, dtype, device, generator)
        if latents is not None:
            noisy = noise = latents.to(device)
        return noisy, noise, clean, ids


class FluxFilling(FluxFromImage):
    """Fill: the mask at full resolution is a part of each token."""

    def prepare_mask_latents(
        self,
        mask: Tensor,
        masked_image: Tensor,
        batch_size: int,
        num_channels_latents: int,
        num_images_per_prompt: int,
        height: int,
        width: int,
        dtype: Any,
        device: Any,
        generator: Generators,
    ) -> tuple[Tensor, Tensor]:
        """Tokens of the mask's pixels, and of the masked picture."""
        batch = batch_size * num_images_per_prompt
        _, masked = self._masked(mask, masked_image, batch, height, width, dtype, device, generator)
        pixels = match_batch(mask[:, :1].to(device=device, dtype=dtype), batch, "masks")
        return pack(torch.nn.functional.pixel_unshuffle(pixels, self.vae_scale_factor), SIDE), pack(masked, SIDE)


class FluxReference(FluxTokens):
    """Kontext: a reference picture has tokens of its own."""

    _sample_mode = "argmax"

    def prepare_latents(
        self,
        image: Tensor | None,
        batch_size: int,
        num_channels_latents: int,
        height: int,
        width: int,
        dtype: Any,
        device: Any,
        generator: Generators = None,
        latents: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """Tokens of noise (or ``latents``) and of the picture, and the positions of both."""
        z = self._reference(image, batch_size, dtype, device, generator)
        seen, seen_ids = None, None
        if z is not None:
            rows, columns = z.shape[-2] // SIDE, z.shape[-1] // SIDE
            seen, seen_ids = pack(z, SIDE), token_ids(rows, columns, device, dtype, group=1)
        if latents is None:
            latents = self._noise(batch_size, num_channels_latents, height, width, dtype, device, generator)
        return latents.to(device=device, dtype=dtype), seen, self._ids(height, width, dtype, device), seen_ids
