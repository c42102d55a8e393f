"""AutoencoderTiny: the distilled autoencoder TAESD (Bohan, 2023), for previews and small machines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.config import register_to_config
from ..core.outputs import BaseOutput
from ..core.random import Generators
from ..nn import checkpointing
from ..nn.feed_forward import activation
from ..nn.tiling import SlicingMixin, overlaid
from ..nn.vae import DecoderOutput
from .base import ModelMixin


@dataclass
class AutoencoderTinyOutput(BaseOutput):
    """Result of encoding: latents ``(B, c, h, w)``."""

    latents: Tensor


class TinyBlock(nn.Module):
    """Three convolutions around a skip connection, ``(B, C, H, W)``."""

    def __init__(self, channels: int, act_fn: str) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i in range(3):
            layers += [nn.Conv2d(channels, channels, 3, padding=1)] + ([activation(act_fn)] if i < 2 else [])
        self.conv = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x) + x)


class TinyEncoder(nn.Module):
    """Pictures in -1 to 1 to latents; every stage but the first halves height and width."""

    def __init__(
        self, in_channels: int, out_channels: int, num_blocks: Sequence[int], widths: Sequence[int], act_fn: str
    ) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        layers: list[nn.Module] = []
        for i, (count, width) in enumerate(zip(num_blocks, widths, strict=True)):
            first = nn.Conv2d(in_channels, width, 3, padding=1)
            layers.append(nn.Conv2d(width, width, 3, padding=1, stride=2, bias=False) if i else first)
            layers += [TinyBlock(width, act_fn) for _ in range(count)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], out_channels, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return checkpointing.run(self, self.layers, x.add(1).div(2))  # type: ignore[no-any-return]


class TinyDecoder(nn.Module):
    """Latents, softly held within -3 to 3, to pictures in -1 to 1; every stage but the last upsamples."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_blocks: Sequence[int],
        widths: Sequence[int],
        upsampling: int,
        act_fn: str,
        upsample_fn: str,
    ) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        layers: list[nn.Module] = [nn.Conv2d(in_channels, widths[0], 3, padding=1), activation(act_fn)]
        for i, (count, width) in enumerate(zip(num_blocks, widths, strict=True)):
            layers += [TinyBlock(width, act_fn) for _ in range(count)]
            if i < len(widths) - 1:
                layers.append(nn.Upsample(scale_factor=upsampling, mode=upsample_fn))
                layers.append(nn.Conv2d(width, width, 3, padding=1, bias=False))
            else:
                layers.append(nn.Conv2d(width, out_channels, 3, padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        x = checkpointing.run(self, self.layers, torch.tanh(x / 3) * 3)
        return x.mul(2).sub(1)


class AutoencoderTiny(SlicingMixin, ModelMixin):
    """A small deterministic autoencoder, close to a larger one's latents (TAESD, Bohan, 2023).

    Attributes:
        latent_magnitude, latent_shift: how :meth:`scale_latents` fits latents into 0 to 1.
        tile_sample_min_size, tile_latent_min_size, tile_overlap_factor: of a tile, as in ``AutoencoderKL``.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        encoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64),
        decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64),
        act_fn: str = "relu",
        upsample_fn: str = "nearest",
        latent_channels: int = 4,
        upsampling_scaling_factor: int = 2,
        num_encoder_blocks: tuple[int, ...] = (1, 3, 3, 3),
        num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1),
        latent_magnitude: int = 3,
        latent_shift: float = 0.5,
        force_upcast: bool = False,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
    ) -> None:
        super().__init__()
        for side, widths, counts in (
            ("encoder", encoder_block_out_channels, num_encoder_blocks),
            ("decoder", decoder_block_out_channels, num_decoder_blocks),
        ):
            if len(widths) != len(counts):
                raise ValueError(
                    f"{side}_block_out_channels and num_{side}_blocks must be equally long, "
                    f"not {len(widths)} and {len(counts)}"
                )
        self.encoder = TinyEncoder(in_channels, latent_channels, num_encoder_blocks, encoder_block_out_channels, act_fn)
        self.decoder = TinyDecoder(
            latent_channels,
            out_channels,
            num_decoder_blocks,
            decoder_block_out_channels,
            upsampling_scaling_factor,
            act_fn,
            upsample_fn,
        )
        self.latent_magnitude, self.latent_shift, self.scaling_factor = latent_magnitude, latent_shift, scaling_factor
        self.spatial_scale_factor = upsampling_scaling_factor ** (len(decoder_block_out_channels) - 1)
        self.tile_overlap_factor = 0.125
        self.tile_sample_min_size = 512
        self.tile_latent_min_size = self.tile_sample_min_size // self.spatial_scale_factor
        self.register_to_config(block_out_channels=decoder_block_out_channels, force_upcast=False)

    def scale_latents(self, x: Tensor) -> Tensor:
        """Latents to 0 to 1."""
        return x.div(2 * self.latent_magnitude).add(self.latent_shift).clamp(0, 1)

    def unscale_latents(self, x: Tensor) -> Tensor:
        """0 to 1 to latents."""
        return x.sub(self.latent_shift).mul(2 * self.latent_magnitude)

    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderTinyOutput | tuple[Tensor]:
        """Latents ``(B, c, H / f, W / f)`` of pictures ``(B, C, H, W)`` in -1 to 1."""
        latents = self._by_item(self._encode, x)
        return AutoencoderTinyOutput(latents=latents) if return_dict else (latents,)

    def decode(
        self, x: Tensor, generator: Generators = None, return_dict: bool = True
    ) -> DecoderOutput | tuple[Tensor]:
        """Pictures ``(B, C, H, W)`` of latents ``(B, c, h, w)``; ``generator`` has no effect."""
        sample = self._by_item(self._decode, x)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(self, sample: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Encode, store as bytes, decode: ``(B, C, H, W)``, both."""
        latents = self.encode(sample, return_dict=False)[0]
        stored = self.scale_latents(latents).mul(255).round().byte()
        return self.decode(self.unscale_latents(stored / 255.0), return_dict=return_dict)

    def _encode(self, x: Tensor) -> Tensor:
        if not self.use_tiling:
            return self.encoder(x)  # type: ignore[no-any-return]
        overlap = int(self.tile_sample_min_size * self.tile_overlap_factor)
        return overlaid(x, self.encoder, self.tile_sample_min_size, overlap, 1 / self.spatial_scale_factor)

    def _decode(self, x: Tensor) -> Tensor:
        if not self.use_tiling:
            return self.decoder(x)  # type: ignore[no-any-return]
        overlap = int(self.tile_latent_min_size * self.tile_overlap_factor)
        return overlaid(x, self.decoder, self.tile_latent_min_size, overlap, self.spatial_scale_factor)
