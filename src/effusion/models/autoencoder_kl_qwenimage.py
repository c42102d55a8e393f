"""AutoencoderKLQwenImage: Qwen-Image's autoencoder (Wu et al., 2025), causal in time; an image is a video of one frame.

Frame 0 stands alone, every later latent frame for four frames of the video. No result depends on later frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.config import register_to_config
from ..core.random import Generators
from ..nn import fresh
from ..nn.dispatch import attend
from ..nn.tiling import SlicingMixin, blend, tiled
from ..nn.vae import AutoencoderKLOutput, DecoderOutput, DiagonalGaussianDistribution
from .base import ModelMixin


class QwenImageCausalConv3d(nn.Conv3d):
    """Convolution ``(B, C, T, H, W)`` that sees no later frame: all its padding in time is in front."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int, int],
        stride: int | tuple[int, int, int] = 1,
        padding: int | tuple[int, int, int] = 0,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride=stride, padding=padding)
        self.before = 2 * int(self.padding[0])
        self.around = (int(self.padding[1]), int(self.padding[2]))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] == 1 and self.before == self.kernel_size[0] - 1:
            # The frames before a single one are zeros: only the last slice of the kernel meets anything.
            frame = F.conv2d(x[:, :, 0], self.weight[:, :, -1], self.bias, self.stride[1:], self.around)
            return frame.unsqueeze(2)
        if self.before:
            x = F.pad(x, (0, 0, 0, 0, self.before, 0))
        return F.conv3d(x, self.weight, self.bias, self.stride, (0, *self.around))


class QwenImageRMSNorm(nn.Module):
    """RMS norm over the channels, ``(B, C, …)``."""

    def __init__(self, dim: int, axes: int = 3) -> None:
        super().__init__()
        self.scale = dim**0.5
        self.gamma = nn.Parameter(nn.init.ones_(torch.empty(dim, *([1] * axes))))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1) * (self.gamma * self.scale)  # type: ignore[no-any-return]


class QwenImageResample(nn.Module):
    """Height and width doubled or halved, and with ``temporal`` the time too; ``(B, C, T, H, W)``."""

    def __init__(self, dim: int, up: bool, temporal: bool) -> None:
        super().__init__()
        self.up = up
        if up:
            change: nn.Module = nn.Upsample(scale_factor=(2.0, 2.0), mode="nearest-exact")
            self.resample = nn.Sequential(change, nn.Conv2d(dim, dim // 2, 3, padding=1))
        else:
            self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=2))
        self.time_conv = None
        if temporal and up:
            self.time_conv = QwenImageCausalConv3d(dim, 2 * dim, (3, 1, 1), padding=(1, 0, 0))
        elif temporal:
            self.time_conv = QwenImageCausalConv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        if self.up:
            x = self._more_frames(x)
        frames = x.shape[2]
        x = self.resample(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (-1, frames)).transpose(1, 2)
        return x if self.up else self._fewer_frames(x)

    def _more_frames(self, x: Tensor) -> Tensor:
        """Frame 0 stays one frame, each later one becomes two."""
        if self.time_conv is None or x.shape[2] == 1:
            return x
        pairs = self.time_conv(x[:, :, 1:]).unflatten(1, (2, -1))  # (B, 2, C, T - 1, H, W)
        return torch.cat((x[:, :, :1], pairs.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)), dim=2)

    def _fewer_frames(self, x: Tensor) -> Tensor:
        """Frame 0 stays, each later pair becomes one."""
        if self.time_conv is None or x.shape[2] == 1:
            return x
        return torch.cat((x[:, :, :1], self.time_conv(x)), dim=2)


class QwenImageResidualBlock(nn.Module):
    """Twice norm, SiLU and convolution, added to the input; ``(B, C, T, H, W)``."""

    def __init__(self, in_dim: int, out_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = QwenImageRMSNorm(in_dim)
        self.conv1 = QwenImageCausalConv3d(in_dim, out_dim, 3, padding=1)
        self.norm2 = QwenImageRMSNorm(out_dim)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = QwenImageCausalConv3d(out_dim, out_dim, 3, padding=1)
        self.conv_shortcut = QwenImageCausalConv3d(in_dim, out_dim, 1) if in_dim != out_dim else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(fresh.silu(self.norm1(x)))
        h = self.conv2(self.dropout(fresh.silu(self.norm2(h))))
        return fresh.add(h, self.conv_shortcut(x))


class QwenImageAttentionBlock(nn.Module):
    """Attention with one head over the pixels of each frame, added to the input; ``(B, C, T, H, W)``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = QwenImageRMSNorm(dim, axes=2)
        self.to_qkv = nn.Conv2d(dim, dim * 3, 1)
        self.proj = nn.Conv2d(dim, dim, 1)
        self.attention_backend: str | None = None

    def forward(self, x: Tensor) -> Tensor:
        frames, height = x.shape[2], x.shape[3]
        qkv = self.to_qkv(self.norm(x.transpose(1, 2).flatten(0, 1)))  # (B * T, 3 C, H, W)
        q, k, v = qkv.flatten(2).transpose(1, 2).unsqueeze(2).chunk(3, dim=-1)  # (B * T, H * W, 1, C)
        out = attend(q, k, v, backend=self.attention_backend)[:, :, 0].transpose(1, 2)
        out = self.proj(out.unflatten(2, (height, -1)))
        return x + out.unflatten(0, (-1, frames)).transpose(1, 2)  # type: ignore[no-any-return]


class QwenImageMidBlock(nn.Module):
    """Residual block, attention, residual block."""

    def __init__(self, dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([QwenImageAttentionBlock(dim)])
        self.resnets = nn.ModuleList([QwenImageResidualBlock(dim, dim, dropout) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))  # type: ignore[no-any-return]


class QwenImageEncoder3d(nn.Module):
    """Videos to the parameters of the distribution of their latents: ``(B, C, T, H, W) -> (B, 2 z, T', H', W')``."""

    def __init__(
        self,
        dim: int,
        z_dim: int,
        dim_mult: Sequence[int],
        num_res_blocks: int,
        attn_scales: Sequence[float],
        temperal_downsample: Sequence[bool],
        dropout: float,
        input_channels: int,
    ) -> None:
        super().__init__()
        widths = [dim * m for m in (1, *dim_mult)]
        self.conv_in = QwenImageCausalConv3d(input_channels, widths[0], 3, padding=1)
        blocks: list[nn.Module] = []
        for i, (before, width) in enumerate(pairwise(widths)):
            for j in range(num_res_blocks):
                blocks.append(QwenImageResidualBlock(width if j else before, width, dropout))
                if 0.5**i in attn_scales:
                    blocks.append(QwenImageAttentionBlock(width))
            if i < len(dim_mult) - 1:
                blocks.append(QwenImageResample(width, up=False, temporal=temperal_downsample[i]))
        self.down_blocks = nn.ModuleList(blocks)
        self.mid_block = QwenImageMidBlock(widths[-1], dropout)
        self.norm_out = QwenImageRMSNorm(widths[-1])
        self.conv_out = QwenImageCausalConv3d(widths[-1], z_dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(fresh.silu(self.norm_out(self.mid_block(x))))  # type: ignore[no-any-return]


class QwenImageUpBlock(nn.Module):
    """Residual blocks, then a larger picture."""

    def __init__(
        self, in_dim: int, out_dim: int, num_res_blocks: int, dropout: float, temporal: bool, last: bool
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            QwenImageResidualBlock(out_dim if i else in_dim, out_dim, dropout) for i in range(num_res_blocks + 1)
        )
        self.upsamplers = None if last else nn.ModuleList([QwenImageResample(out_dim, up=True, temporal=temporal)])

    def forward(self, x: Tensor) -> Tensor:
        for block in (*self.resnets, *(self.upsamplers or ())):
            x = block(x)
        return x


class QwenImageDecoder3d(nn.Module):
    """Latents to videos: ``(B, z, T', H', W') -> (B, C, T, H, W)``."""

    def __init__(
        self,
        dim: int,
        z_dim: int,
        dim_mult: Sequence[int],
        num_res_blocks: int,
        temperal_upsample: Sequence[bool],
        dropout: float,
        input_channels: int,
    ) -> None:
        super().__init__()
        widths = [dim * m for m in (dim_mult[-1], *reversed(dim_mult))]
        last = len(dim_mult) - 1
        self.conv_in = QwenImageCausalConv3d(z_dim, widths[0], 3, padding=1)
        self.mid_block = QwenImageMidBlock(widths[0], dropout)
        self.up_blocks = nn.ModuleList(
            QwenImageUpBlock(
                widths[i] // 2 if i else widths[i],  # the upsampler before has halved them
                widths[i + 1],
                num_res_blocks,
                dropout,
                temporal=i < last and temperal_upsample[i],
                last=i == last,
            )
            for i in range(len(dim_mult))
        )
        self.norm_out = QwenImageRMSNorm(widths[-1])
        self.conv_out = QwenImageCausalConv3d(widths[-1], input_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(fresh.silu(self.norm_out(x)))  # type: ignore[no-any-return]


class AutoencoderKLQwenImage(SlicingMixin, ModelMixin):
    """Images or videos ``(B, C, T, H, W)`` to latents and back.

    ``latents_mean`` and ``latents_std`` are facts for the user of the latents; nothing here applies them.

    Attributes:
        tile_sample_min_height, tile_sample_min_width: sides of a tile in pixels.
        tile_sample_stride_height, tile_sample_stride_width: distance of two tiles in pixels.
    """

    @register_to_config
    def __init__(
        self,
        base_dim: int = 96,
        z_dim: int = 16,
        dim_mult: list[int] = [1, 2, 4, 4],  # noqa: B006
        num_res_blocks: int = 2,
        attn_scales: list[float] = [],  # noqa: B006
        temperal_downsample: list[bool] = [False, True, True],  # noqa: B006
        dropout: float = 0.0,
        input_channels: int = 3,
        latents_mean: list[float] = [  # noqa: B006
            -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
            0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
        ],
        latents_std: list[float] = [  # noqa: B006
            2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
            3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
        ],
    ) -> None:  # fmt: skip
        super().__init__()
        self.z_dim = z_dim
        self.temperal_downsample = temperal_downsample
        self.temperal_upsample = temperal_downsample[::-1]
        self.encoder = QwenImageEncoder3d(
            base_dim, z_dim * 2, dim_mult, num_res_blocks, attn_scales, temperal_downsample, dropout, input_channels
        )
        self.quant_conv = QwenImageCausalConv3d(z_dim * 2, z_dim * 2, 1)
        self.post_quant_conv = QwenImageCausalConv3d(z_dim, z_dim, 1)
        self.decoder = QwenImageDecoder3d(
            base_dim, z_dim, dim_mult, num_res_blocks, self.temperal_upsample, dropout, input_channels
        )
        self.spatial_compression_ratio = 2 ** len(temperal_downsample)
        self.tile_sample_min_height = self.tile_sample_min_width = 256
        self.tile_sample_stride_height = self.tile_sample_stride_width = 192

    def enable_tiling(
        self,
        tile_sample_min_height: int | None = None,
        tile_sample_min_width: int | None = None,
        tile_sample_stride_height: float | None = None,
        tile_sample_stride_width: float | None = None,
    ) -> None:
        """Encode and decode large pictures in overlapping tiles: less memory, slightly different near borders."""
        super().enable_tiling()
        self.tile_sample_min_height = tile_sample_min_height or self.tile_sample_min_height
        self.tile_sample_min_width = tile_sample_min_width or self.tile_sample_min_width
        self.tile_sample_stride_height = int(tile_sample_stride_height or self.tile_sample_stride_height)
        self.tile_sample_stride_width = int(tile_sample_stride_width or self.tile_sample_stride_width)

    def clear_cache(self) -> None:
        """Nothing to clear: frames of a call are computed together, none is kept for the next."""

    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """The distribution of the latents of ``(B, C, T, H, W)`` in -1 to 1: ``(B, z, 1 + (T - 1) / 4, H / 8, W / 8)``.

        Of the frames after the first, only whole groups of four are used.
        """
        posterior = DiagonalGaussianDistribution(self._by_item(self._encode, x))
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Pictures in -1 to 1 of unscaled latents: ``(B, z, T, H, W) -> (B, C, 1 + 4 (T - 1), 8 H, 8 W)``."""
        sample = self._by_item(self._decode, z)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: Generators = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """Encode, draw (or take the mode), decode: ``(B, C, T, H, W)``, both."""
        posterior = self.encode(sample, return_dict=False)[0]
        z = posterior.sample(generator=generator) if sample_posterior else posterior.mode()
        return self.decode(z, return_dict=return_dict)

    # -- one video, one tile -----------------------------------------------------------------------

    def _encode(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        if self.use_tiling and (height > self.tile_sample_min_height or width > self.tile_sample_min_width):
            return self._tiled_encode(x)
        return self._encode_tile(x)

    def _decode(self, z: Tensor) -> Tensor:
        (height, width), ((min_height, min_width), _) = z.shape[-2:], self._tiles(latent=True)
        if self.use_tiling and (height > min_height or width > min_width):
            return self._tiled_decode(z)
        return self._decode_tile(z).clamp(-1.0, 1.0)

    def _encode_tile(self, x: Tensor) -> Tensor:
        whole = 1 + (x.shape[2] - 1) // 4 * 4
        return self.quant_conv(self.encoder(x[:, :, :whole]))  # type: ignore[no-any-return]

    def _decode_tile(self, z: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(z))  # type: ignore[no-any-return]

    def _tiles(self, latent: bool) -> tuple[tuple[int, int], tuple[int, int]]:
        """Sides and strides of tiles, in pixels or latents."""
        by = self.spatial_compression_ratio if latent else 1
        size = (self.tile_sample_min_height // by, self.tile_sample_min_width // by)
        return size, (self.tile_sample_stride_height // by, self.tile_sample_stride_width // by)

    def _tiled_encode(self, x: Tensor) -> Tensor:
        size, stride = self._tiles(latent=False)
        (height, width), limit = self._tiles(latent=True)
        extent = (height - limit[0], width - limit[1])
        by = self.spatial_compression_ratio
        z = tiled(x, self._encode_tile, size, stride, extent, limit, 1 / by)
        return z[..., : x.shape[-2] // by, : x.shape[-1] // by]

    def _tiled_decode(self, z: Tensor) -> Tensor:
        size, stride = self._tiles(latent=True)
        (height, width), limit = self._tiles(latent=False)
        extent = (height - limit[0], width - limit[1])
        by = self.spatial_compression_ratio
        x = tiled(z, self._decode_tile, size, stride, extent, limit, by)
        return x[..., : z.shape[-2] * by, : z.shape[-1] * by]

    def tiled_encode(self, x: Tensor) -> Tensor:
        """The parameters of the distribution, computed in tiles whether or not tiling is switched on."""
        return self._tiled_encode(x)

    def tiled_decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """:meth:`decode` in tiles, whether or not tiling is switched on."""
        sample = self._tiled_decode(z)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def blend_v(self, a: Tensor, b: Tensor, blend_extent: int) -> Tensor:
        """``b``, its first rows faded in from the last rows of ``a``."""
        return blend(a, b, blend_extent, -2)

    def blend_h(self, a: Tensor, b: Tensor, blend_extent: int) -> Tensor:
        """``b``, its first columns faded in from the last columns of ``a``."""
        return blend(a, b, blend_extent, -1)
