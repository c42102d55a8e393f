"""ControlNet (Zhang et al., 2023): a copy of a UNet's first half that sees a control image and adds to the UNet."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count, takewhile
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.config import register_to_config
from ..core.errors import CheckpointError
from ..core.outputs import BaseOutput
from ..nn.attention import AttentionMixin
from ..nn.conditioning import ConditioningMixin
from ..nn.control import ControlNetConditioningEmbedding, copy_weights, zero_module
from ..nn.masks import additive
from ..nn.unet_blocks import MID, Settings, UNetMidBlock2D, build_down, find_block
from .base import ModelMixin
from .unet_2d_condition import UNet2DConditionModel, _per_block


@dataclass
class ControlNetOutput(BaseOutput):
    """What is added to the UNet's skip connections, in their order, and to its middle: ``(B, C, H, W)`` each."""

    down_block_res_samples: tuple[Tensor, ...]
    mid_block_res_sample: Tensor


class ControlNetModel(ConditioningMixin, AttentionMixin, ModelMixin):
    """A ControlNet for the UNets of SD 1.x, 2.x and XL.

    Args:
        conditioning_channels: of the control image.
        controlnet_conditioning_channel_order: ``"rgb"``, or ``"bgr"`` for a network that learnt it so.
        conditioning_embedding_out_channels: widths of the layers that shrink the control image to latent size.
        global_pool_conditions: add means over the picture only (shuffle).
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["BasicTransformerBlock", "ResnetBlock2D"]
    _repeated_blocks = ["BasicTransformerBlock"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 4,
        conditioning_channels: int = 3,
        flip_sin_to_cos: bool = True,
        freq_shift: int = 0,
        down_block_types: tuple[str, ...] = (
            "CrossAttnDownBlock2D",
            "CrossAttnDownBlock2D",
            "CrossAttnDownBlock2D",
            "DownBlock2D",
        ),
        mid_block_type: str | None = "UNetMidBlock2DCrossAttn",
        only_cross_attention: bool | tuple[bool, ...] = False,
        block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280),
        layers_per_block: int = 2,
        downsample_padding: int = 1,
        mid_block_scale_factor: float = 1,
        act_fn: str = "silu",
        norm_num_groups: int | None = 32,
        norm_eps: float = 1e-5,
        cross_attention_dim: int = 1280,
        transformer_layers_per_block: int | tuple[int, ...] = 1,
        encoder_hid_dim: int | None = None,
        encoder_hid_dim_type: str | None = None,
        attention_head_dim: int | tuple[int, ...] = 8,
        num_attention_heads: int | tuple[int, ...] | None = None,
        use_linear_projection: bool = False,
        class_embed_type: str | None = None,
        addition_embed_type: str | None = None,
        addition_time_embed_dim: int | None = None,
        num_class_embeds: int | None = None,
        upcast_attention: bool = False,
        resnet_time_scale_shift: str = "default",
        projection_class_embeddings_input_dim: int | None = None,
        controlnet_conditioning_channel_order: str = "rgb",
        conditioning_embedding_out_channels: tuple[int, ...] | None = (16, 32, 96, 256),
        global_pool_conditions: bool = False,
        addition_embed_type_num_heads: int = 64,
    ) -> None:
        super().__init__()
        widths, n = block_out_channels, len(block_out_channels)
        if len(down_block_types) != n:
            raise ValueError(f"{len(down_block_types)} down_block_types for {n} block_out_channels; give equally many")
        if controlnet_conditioning_channel_order not in ("rgb", "bgr"):
            order = controlnet_conditioning_channel_order
            raise ValueError(f"controlnet_conditioning_channel_order {order!r}: allowed are 'rgb' and 'bgr'")
        heads = _per_block(num_attention_heads or attention_head_dim, n, "num_attention_heads")
        head_dims = _per_block(attention_head_dim, n, "attention_head_dim")
        depths = _per_block(transformer_layers_per_block, n, "transformer_layers_per_block")
        only_cross = _per_block(only_cross_attention, n, "only_cross_attention")

        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        time_dim, input_dim = self._build_time(
            "positional", widths[0], None, flip_sin_to_cos, freq_shift, act_fn, None, None
        )
        kind = self._build_context(encoder_hid_dim_type, encoder_hid_dim, cross_attention_dim)
        self.register_to_config(encoder_hid_dim_type=kind)
        width = projection_class_embeddings_input_dim
        self._build_class(class_embed_type, num_class_embeds, width, act_fn, time_dim, input_dim)
        self._build_addition(
            addition_embed_type,
            time_dim,
            encoder_hid_dim,
            cross_attention_dim,
            width,
            addition_time_embed_dim,
            addition_embed_type_num_heads,
            flip_sin_to_cos,
            freq_shift,
        )
        self.controlnet_cond_embedding = ControlNetConditioningEmbedding(
            widths[0], conditioning_channels, conditioning_embedding_out_channels or (16, 32, 96, 256)
        )
        common = Settings(
            temb_channels=time_dim,
            eps=norm_eps,
            time_scale_shift=resnet_time_scale_shift,
            act_fn=act_fn,
            groups=norm_num_groups or 32,
            attn_groups=norm_num_groups,
            cross_attention_dim=cross_attention_dim,
            use_linear_projection=use_linear_projection,
            upcast_attention=upcast_attention,
            downsample_padding=downsample_padding,
        )
        own = [
            replace(common, heads=heads[i], head_dim=head_dims[i], depth=depths[i], only_cross_attention=only_cross[i])
            for i in range(n)
        ]
        self.down_blocks = build_down(down_block_types, widths, [layers_per_block] * n, own)
        mid = replace(own[-1], output_scale_factor=mid_block_scale_factor, only_cross_attention=False)
        block = find_block(MID, str(mid_block_type), "mid_block_type")
        plain = {"num_layers": 0, "add_attention": False} if block is UNetMidBlock2D else {}
        self.mid_block = block(widths[-1], mid, **plain)
        skips = [widths[0]]
        for i, out in enumerate(widths):
            skips += [out] * (layers_per_block + (i < n - 1))
        self.controlnet_down_blocks = nn.ModuleList(zero_module(nn.Conv2d(c, c, 1)) for c in skips)
        self.controlnet_mid_block = zero_module(nn.Conv2d(widths[-1], widths[-1], 1))

    @classmethod
    def from_unet(
        cls,
        unet: UNet2DConditionModel,
        controlnet_conditioning_channel_order: str = "rgb",
        conditioning_embedding_out_channels: tuple[int, ...] | None = (16, 32, 96, 256),
        load_weights_from_unet: bool = True,
        conditioning_channels: int = 3,
    ) -> ControlNetModel:
        """A ControlNet made of the first half of ``unet``, that adds nothing yet."""
        config = {k: v for k, v in unet.config.items() if k in cls._init_names()}
        controlnet = cls(
            **config,
            conditioning_channels=conditioning_channels,
            controlnet_conditioning_channel_order=controlnet_conditioning_channel_order,
            conditioning_embedding_out_channels=conditioning_embedding_out_channels,
        )
        if load_weights_from_unet:
            for name in ("conv_in", "time_embedding", "class_embedding", "add_embedding", "down_blocks", "mid_block"):
                part = getattr(controlnet, name, None)
                if part is not None:
                    copy_weights(part, getattr(unet, name))
        return controlnet

    set_attention_slice = UNet2DConditionModel.set_attention_slice

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        encoder_hidden_states: Tensor,
        controlnet_cond: Tensor,
        conditioning_scale: float = 1.0,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        attention_mask: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        guess_mode: bool = False,
        return_dict: bool = True,
    ) -> ControlNetOutput | tuple[tuple[Tensor, ...], Tensor]:
        """What to add to the UNet for noisy ``sample (B, C, H, W)``; arguments as there, and:

        Args:
            controlnet_cond: the control image in pixels, ``(B, conditioning_channels, 8 H, 8 W)``.
            conditioning_scale: the strength.
            guess_mode: from a tenth of the strength at the first skip connection to all of it in the middle.
        """
        if self.config.controlnet_conditioning_channel_order == "bgr":
            controlnet_cond = controlnet_cond.flip(dims=[1])
        emb = self.time_embedding(self.get_time_embed(sample, timestep), timestep_cond)
        label = self.get_class_embed(sample, class_labels)
        emb = emb if label is None else emb + label
        added = self.get_aug_embed(emb, encoder_hidden_states, added_cond_kwargs)
        emb = emb if added is None else emb + added
        context: dict[str, Any] = dict(
            encoder_hidden_states=encoder_hidden_states,
            attention_mask=additive(attention_mask, sample.dtype),
            cross_attention_kwargs=cross_attention_kwargs,
        )
        x = self.conv_in(sample) + self.controlnet_cond_embedding(controlnet_cond)
        skips = [x]
        for block in self.down_blocks:
            x, kept = block(x, emb, **(context if block.has_cross_attention else {}))
            skips.extend(kept)
        x = self.mid_block(x, emb, **(context if self.mid_block.has_cross_attention else {}))

        down = [layer(skip) for layer, skip in zip(self.controlnet_down_blocks, skips, strict=True)]
        *down, mid = self._weighted([*down, self.controlnet_mid_block(x)], conditioning_scale, guess_mode)
        if not return_dict:
            return tuple(down), mid
        return ControlNetOutput(down_block_res_samples=tuple(down), mid_block_res_sample=mid)

    def _weighted(self, samples: list[Tensor], scale: float, guess_mode: bool) -> list[Tensor]:
        if self.config.global_pool_conditions:
            return [x.mean(dim=(2, 3), keepdim=True) * scale for x in samples]
        if not guess_mode:
            return [x * scale for x in samples]
        weights = torch.logspace(-1, 0, len(samples), device=samples[0].device) * scale
        return [x * w for x, w in zip(samples, weights, strict=True)]


class MultiControlNetModel(ModelMixin):
    """Several ControlNets; what they add is summed."""

    _member: ClassVar[type[ModelMixin]] = ControlNetModel  # in a pipeline's files: what is in folders side by side

    def __init__(self, controlnets: Sequence[ControlNetModel]) -> None:
        super().__init__()
        self.nets = nn.ModuleList(controlnets)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        encoder_hidden_states: Tensor,
        controlnet_cond: list[Tensor],
        conditioning_scale: list[float],
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        attention_mask: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        guess_mode: bool = False,
        return_dict: bool = True,
    ) -> ControlNetOutput | tuple[tuple[Tensor, ...], Tensor]:
        """As :meth:`ControlNetModel.forward`, with one image and one strength for each network.

        Raises:
            ValueError: there are not as many of them as networks.
        """
        if not len(self.nets) == len(controlnet_cond) == len(conditioning_scale):
            raise ValueError(
                f"{len(self.nets)} control networks with {len(controlnet_cond)} images and "
                f"{len(conditioning_scale)} scales; give one of each for every network"
            )
        common = (class_labels, timestep_cond, attention_mask, added_cond_kwargs, cross_attention_kwargs, guess_mode)
        parts = [
            net(sample, timestep, encoder_hidden_states, image, scale, *common, return_dict=False)
            for net, image, scale in zip(self.nets, controlnet_cond, conditioning_scale, strict=True)
        ]
        down, mid = parts[0]
        for more, more_mid in parts[1:]:
            down, mid = tuple(a + b for a, b in zip(down, more, strict=True)), mid + more_mid
        if not return_dict:
            return down, mid
        return ControlNetOutput(down_block_res_samples=down, mid_block_res_sample=mid)

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        save_function: Callable[..., Any] | None = None,
        safe_serialization: bool = True,
        variant: str | None = None,
    ) -> None:
        """Save the networks to ``save_directory``, ``save_directory_1``, ``save_directory_2``, …"""
        for i, net in enumerate(self.nets):
            net.save_pretrained(  # type: ignore[operator]
                _numbered(save_directory, i),
                is_main_process=is_main_process,
                save_function=save_function,
                safe_serialization=safe_serialization,
                variant=variant,
            )

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_path: str | os.PathLike[str] | None, **kwargs: Any
    ) -> MultiControlNetModel:
        """Load the networks that :meth:`save_pretrained` wrote; ``kwargs`` as for one of them.

        Raises:
            CheckpointError: there is none.
        """
        nets = [ControlNetModel.from_pretrained(f, **kwargs) for f in cls._folders(pretrained_model_path or "")]
        if not nets:
            raise CheckpointError(f"no control networks in {pretrained_model_path}: expected this folder, and …_1, …_2")
        return cls(nets)

    @staticmethod
    def _folders(root: str | os.PathLike[str]) -> list[str]:
        """The folders that there are of ``root``, ``root_1``, ``root_2``, …, up to the first gap."""
        return list(takewhile(os.path.isdir, (_numbered(root, i) for i in count())))


def _numbered(folder: str | os.PathLike[str], i: int) -> str:
    name = Path(folder).as_posix()
    return f"{name}_{i}" if i else name
