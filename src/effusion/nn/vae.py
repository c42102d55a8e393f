"""The parts of variational autoencoders for pictures (Kingma & Welling, 2013; Rombach et al., 2022)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.outputs import BaseOutput
from ..core.random import Generators, randn_tensor
from . import checkpointing, fresh
from .attention import Attention
from .resnet import Downsample2D, ResnetBlock2D, Upsample2D

EPS = 1e-6


class DiagonalGaussianDistribution:
    """Independent normal distributions.

    Args:
        parameters: ``(B, 2 C, …)``: means and logarithms of the variances.
        deterministic: the variance is zero.
    """

    def __init__(self, parameters: Tensor, deterministic: bool = False) -> None:
        self.parameters = parameters
        self.mean, logvar = parameters.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.deterministic = deterministic
        self.std = torch.zeros_like(self.mean) if deterministic else torch.exp(0.5 * self.logvar)
        self.var = torch.zeros_like(self.mean) if deterministic else torch.exp(self.logvar)

    def sample(self, generator: Generators = None) -> Tensor:
        """A draw, ``(B, C, …)``; the same on every device for a CPU generator."""
        p = self.parameters
        return self.mean + self.std * randn_tensor(self.mean.shape, generator, device=p.device, dtype=p.dtype)

    def mode(self) -> Tensor:
        """The most probable value, ``(B, C, …)``."""
        return self.mean

    def kl(self, other: DiagonalGaussianDistribution | None = None) -> Tensor:
        """Kullback-Leibler divergence from ``other`` (the standard normal distribution if ``None``): ``(B,)``."""
        if self.deterministic:
            return torch.zeros(1)
        dims = list(range(1, self.mean.ndim))
        if other is None:
            return 0.5 * torch.sum(self.mean**2 + self.var - 1.0 - self.logvar, dim=dims)
        gap = (self.mean - other.mean) ** 2 / other.var
        return 0.5 * torch.sum(gap + self.var / other.var - 1.0 - self.logvar + other.logvar, dim=dims)

    def nll(self, sample: Tensor, dims: Sequence[int] = (1, 2, 3)) -> Tensor:
        """Negative log-likelihood of ``sample``, summed over ``dims``."""
        if self.deterministic:
            return torch.zeros(1)
        return 0.5 * torch.sum(
            math.log(2.0 * math.pi) + self.logvar + (sample - self.mean) ** 2 / self.var, dim=list(dims)
        )


@dataclass
class AutoencoderKLOutput(BaseOutput):
    """Result of encoding: the distribution of the latents."""

    latent_dist: DiagonalGaussianDistribution


@dataclass
class DecoderOutput(BaseOutput):
    """Result of decoding: pictures ``(B, C, H, W)``, about -1 to 1."""

    sample: Tensor
    commit_loss: Tensor | None = None


class VaeBlock(nn.Module):
    """Residual blocks (each followed by attention if there is some), then a change of resolution.

    It plays ``DownEncoderBlock2D``, ``AttnDownEncoderBlock2D``, ``UpDecoderBlock2D`` and ``AttnUpDecoderBlock2D``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_layers: int,
        groups: int,
        act_fn: str,
        attention: bool = False,
        down: bool = False,
        up: bool = False,
    ) -> None:
        super().__init__()
        resnets = [
            _resnet(in_channels if i == 0 else out_channels, out_channels, groups, act_fn) for i in range(num_layers)
        ]
        self.attentions = nn.ModuleList([_attention(out_channels, groups) for _ in resnets]) if attention else None
        self.resnets = nn.ModuleList(resnets)
        self.downsamplers = nn.ModuleList([Downsample2D(out_channels, True, padding=0)]) if down else None
        self.upsamplers = nn.ModuleList([Upsample2D(out_channels, True)]) if up else None

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W) -> (B, C', H', W')``."""
        for i, resnet in enumerate(self.resnets):
            x = resnet(x)
            if self.attentions is not None:
                x = self.attentions[i](x)
        for sampler in self.downsamplers or self.upsamplers or ():
            x = sampler(x)
        return x


class VaeMidBlock(nn.Module):
    """Residual block, attention over all pixels, residual block."""

    def __init__(self, channels: int, groups: int, act_fn: str, attention: bool = True) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([_attention(channels, groups)] if attention else [])
        self.resnets = nn.ModuleList([_resnet(channels, channels, groups, act_fn) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)``, both."""
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)  # type: ignore[no-any-return]


def _resnet(in_channels: int, out_channels: int, groups: int, act_fn: str) -> ResnetBlock2D:
    return ResnetBlock2D(
        in_channels=in_channels,
        out_channels=out_channels,
        temb_channels=None,
        groups=groups,
        eps=EPS,
        non_linearity=act_fn,
    )


def _attention(channels: int, groups: int) -> Attention:
    return Attention(
        channels,
        heads=1,
        dim_head=channels,
        bias=True,
        upcast_softmax=True,
        norm_num_groups=groups,
        eps=EPS,
        residual_connection=True,
    )


def _has_attention(block_type: str, allowed: str) -> bool:
    if block_type not in (allowed, f"Attn{allowed}"):
        raise ValueError(f"block type {block_type!r}: allowed are {allowed!r} and 'Attn{allowed}'")
    return block_type.startswith("Attn")


class Encoder(nn.Module):
    """Pictures to the parameters of the distribution of their latents.

    Args:
        block_out_channels: width of each block; all but the last halve height and width.
        double_z: give means and log-variances, ``2 * out_channels`` channels.
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: Sequence[str] = ("DownEncoderBlock2D",),
        block_out_channels: Sequence[int] = (64,),
        layers_per_block: int = 2,
        norm_num_groups: int = 32,
        act_fn: str = "silu",
        double_z: bool = True,
        mid_block_add_attention: bool = True,
    ) -> None:
        super().__init__()
        widths = [block_out_channels[0], *block_out_channels]
        last = len(block_out_channels) - 1
        self.gradient_checkpointing = False
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            VaeBlock(
                widths[i],
                widths[i + 1],
                layers_per_block,
                norm_num_groups,
                act_fn,
                attention=_has_attention(kind, "DownEncoderBlock2D"),
                down=i < last,
            )
            for i, kind in enumerate(down_block_types)
        )
        self.mid_block = VaeMidBlock(widths[-1], norm_num_groups, act_fn, mid_block_add_attention)
        self.conv_norm_out = nn.GroupNorm(norm_num_groups, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], out_channels * (2 if double_z else 1), 3, padding=1)

    def forward(self, sample: Tensor) -> Tensor:
        """``(B, C, H, W) -> (B, 2 * C', H', W')``."""
        x = self.conv_in(sample)
        for block in self.down_blocks:
            x = checkpointing.run(self, block, x)
        x = checkpointing.run(self, self.mid_block, x)
        return self.conv_out(fresh.silu(self.conv_norm_out(x)))  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """Latents to pictures.

    Args:
        block_out_channels: width of each block, the last first; all but the last block double height and width.
        layers_per_block: one residual block more than this in each.
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        up_block_types: Sequence[str] = ("UpDecoderBlock2D",),
        block_out_channels: Sequence[int] = (64,),
        layers_per_block: int = 2,
        norm_num_groups: int = 32,
        act_fn: str = "silu",
        mid_block_add_attention: bool = True,
    ) -> None:
        super().__init__()
        widths = [block_out_channels[-1], *reversed(block_out_channels)]
        last = len(block_out_channels) - 1
        self.gradient_checkpointing = False
        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.up_blocks = nn.ModuleList(
            VaeBlock(
                widths[i],
                widths[i + 1],
                layers_per_block + 1,
                norm_num_groups,
                act_fn,
                attention=_has_attention(kind, "UpDecoderBlock2D"),
                up=i < last,
            )
            for i, kind in enumerate(up_block_types)
        )
        self.mid_block = VaeMidBlock(widths[0], norm_num_groups, act_fn, mid_block_add_attention)
        self.conv_norm_out = nn.GroupNorm(norm_num_groups, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, sample: Tensor) -> Tensor:
        """``(B, C, H, W) -> (B, C', H', W')``."""
        x = checkpointing.run(self, self.mid_block, self.conv_in(sample))
        for block in self.up_blocks:
            x = checkpointing.run(self, block, x)
        return self.conv_out(fresh.silu(self.conv_norm_out(x)))  # type: ignore[no-any-return]
