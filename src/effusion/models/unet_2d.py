"""UNet2DModel: the denoiser of pictures without text (Ho et al., 2020; Song et al., 2021)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..core.config import register_to_config
from ..core.outputs import BaseOutput
from ..nn import fresh
from ..nn.attention import AttentionMixin
from ..nn.conditioning import GaussianFourierProjection
from ..nn.embeddings import TimestepEmbedding, Timesteps
from ..nn.unet_blocks import MID, Settings, build_down, build_up, find_block
from .base import ModelMixin


@dataclass
class UNet2DOutput(BaseOutput):
    """The prediction, ``(B, C, H, W)``."""

    sample: Tensor


class UNet2DModel(AttentionMixin, ModelMixin):
    """A UNet (Ronneberger et al., 2015) with self-attention, conditioned on time and, if wanted, on classes.

    With ``time_embedding_type="fourier"`` the timesteps are noise levels (Song et al., 2021): the network
    sees their logarithm, and its result is divided by them.
    """

    _supports_gradient_checkpointing = True
    _skip_layerwise_casting_patterns = ["norm"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] | None = None,
        in_channels: int = 3,
        out_channels: int = 3,
        center_input_sample: bool = False,
        time_embedding_type: str = "positional",
        time_embedding_dim: int | None = None,
        freq_shift: int = 0,
        flip_sin_to_cos: bool = True,
        down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        mid_block_type: str | None = "UNetMidBlock2D",
        up_block_types: tuple[str, ...] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        block_out_channels: tuple[int, ...] = (224, 448, 672, 896),
        layers_per_block: int = 2,
        mid_block_scale_factor: float = 1,
        downsample_padding: int = 1,
        downsample_type: str = "conv",
        upsample_type: str = "conv",
        dropout: float = 0.0,
        act_fn: str = "silu",
        attention_head_dim: int | None = 8,
        norm_num_groups: int = 32,
        attn_norm_num_groups: int | None = None,
        norm_eps: float = 1e-5,
        resnet_time_scale_shift: str = "default",
        add_attention: bool = True,
        class_embed_type: str | None = None,
        num_class_embeds: int | None = None,
        num_train_timesteps: int | None = None,
    ) -> None:
        super().__init__()
        n = len(block_out_channels)
        if not len(down_block_types) == len(up_block_types) == n:
            raise ValueError(
                "down_block_types, up_block_types and block_out_channels must be equally long, not "
                f"{len(down_block_types)}, {len(up_block_types)} and {n}"
            )
        for name, kind in (("downsample_type", downsample_type), ("upsample_type", upsample_type)):
            if kind not in ("conv", "resnet"):
                raise ValueError(f"{name} {kind!r} is not supported; there are 'conv' and 'resnet'")
        self.sample_size, self.center_input_sample = sample_size, center_input_sample
        self.time_embedding_type, self.class_embed_type = time_embedding_type, class_embed_type
        self.conv_in = nn.Conv2d(in_channels, block_out_channels[0], 3, padding=1)
        time_dim = time_embedding_dim or block_out_channels[0] * 4
        self._build_time(block_out_channels[0], time_dim, flip_sin_to_cos, freq_shift, num_train_timesteps)
        self._build_class(num_class_embeds, time_dim)

        common = Settings(
            temb_channels=time_dim,
            dropout=dropout,
            eps=norm_eps,
            time_scale_shift=resnet_time_scale_shift,
            act_fn=act_fn,
            groups=norm_num_groups,
            attn_groups=norm_num_groups,
            head_dim=attention_head_dim,
            downsample_padding=downsample_padding,
            sampler=downsample_type,
        )
        layers = [layers_per_block] * n
        self.down_blocks = build_down(down_block_types, block_out_channels, layers, [common] * n)
        self.mid_block: nn.Module | None = None
        if mid_block_type is not None:
            find_block({"UNetMidBlock2D": MID["UNetMidBlock2D"]}, mid_block_type, "mid_block_type")
            usual = norm_num_groups if resnet_time_scale_shift == "default" else None
            own = replace(common, output_scale_factor=mid_block_scale_factor, attn_groups=attn_norm_num_groups or usual)
            self.mid_block = MID["UNetMidBlock2D"](block_out_channels[-1], own, add_attention=add_attention)
        self.up_blocks = build_up(
            up_block_types, block_out_channels, layers, [replace(common, sampler=upsample_type)] * n
        )
        groups = norm_num_groups if norm_num_groups is not None else min(block_out_channels[0] // 4, 32)
        self.conv_norm_out = nn.GroupNorm(groups, block_out_channels[0], eps=norm_eps)
        self.conv_act = nn.SiLU()
        self.conv_out = nn.Conv2d(block_out_channels[0], out_channels, 3, padding=1)

    def _build_time(self, width: int, time_dim: int, flip: bool, shift: int, steps: int | None) -> None:
        kind = self.time_embedding_type
        if kind == "fourier":
            self.time_proj: nn.Module = GaussianFourierProjection(width, scale=16)
        elif kind == "positional":
            self.time_proj = Timesteps(width, flip, shift)
        elif kind == "learned" and steps is not None:
            self.time_proj = nn.Embedding(steps, width)
        elif kind == "learned":
            raise ValueError("time_embedding_type 'learned' needs num_train_timesteps")
        else:
            allowed = "'positional', 'fourier' and 'learned'"
            raise ValueError(f"time_embedding_type {kind!r} is not supported; there are {allowed}")
        self.time_embedding = TimestepEmbedding(2 * width if kind == "fourier" else width, time_dim)

    def _build_class(self, classes: int | None, time_dim: int) -> None:
        kind = self.class_embed_type
        self.class_embedding: nn.Module | None = None
        if kind is None and classes is not None:
            self.class_embedding = nn.Embedding(classes, time_dim)
        elif kind == "timestep":
            self.class_embedding = TimestepEmbedding(self.time_embedding.linear_1.in_features, time_dim)
        elif kind == "identity":
            self.class_embedding = nn.Identity()
        elif kind is not None:
            raise ValueError(f"class_embed_type {kind!r} is not supported; there are None, 'timestep' and 'identity'")

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[Tensor]:
        """Predict from noisy ``sample (B, C, H, W)`` at ``timestep`` (one, or ``(B,)``).

        Raises:
            ValueError: ``class_labels (B,)`` missing for a network with classes, or given to one without.
        """
        if self.class_embedding is None and class_labels is not None:
            raise ValueError("this network knows no classes: class_labels must be None")
        if self.class_embedding is not None and class_labels is None:
            raise ValueError("this network is conditioned on classes: give class_labels")
        x = 2 * sample - 1.0 if self.center_input_sample else sample
        if not isinstance(timestep, Tensor):
            dtype = torch.float32 if isinstance(timestep, float) else torch.int64
            timestep = torch.tensor(timestep, dtype=dtype, device=x.device)
        times = timestep.to(x.device).expand(x.shape[0])  # (B,)
        emb = self.time_embedding(self.time_proj(times).to(x.dtype))
        if self.class_embedding is not None:
            labels = self.time_proj(class_labels).to(x.dtype) if self.class_embed_type == "timestep" else class_labels
            emb = emb + self.class_embedding(labels).to(x.dtype)

        x = self.conv_in(x)
        skips = [x]
        block: Any
        for block in self.down_blocks:
            x, kept = block(x, emb)
            skips.extend(kept)
        if self.mid_block is not None:
            x = self.mid_block(x, emb)
        for block in self.up_blocks:
            x = block(x, [skips.pop() for _ in block.resnets][::-1], emb)
        x = self.conv_out(fresh.silu(self.conv_norm_out(x)))
        if self.time_embedding_type == "fourier":
            x = x / times.view(-1, 1, 1, 1)
        return UNet2DOutput(sample=x) if return_dict else (x,)
