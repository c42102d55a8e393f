"""Control networks for FLUX.1: a few blocks of the denoiser that see a control image and add to its blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.config import register_to_config
from ..core.outputs import BaseOutput
from ..nn import checkpointing
from ..nn.attention import AttentionMixin
from ..nn.control import ControlNetConditioningEmbedding, copy_weights, scaled, summed, zero_module
from ..nn.rotary import AxialRotary
from .base import ModelMixin
from .transformer_flux import (
    FluxSingleTransformerBlock,
    FluxTransformer2DModel,
    FluxTransformerBlock,
    embed_conditions,
    time_text_embedding,
    unbatched,
)


@dataclass
class FluxControlNetOutput(BaseOutput):
    """What is added behind the two-stream and the one-stream blocks: ``(B, L, D)`` each."""

    controlnet_block_samples: Sequence[Tensor] | None
    controlnet_single_block_samples: Sequence[Tensor] | None


class FluxControlNetModel(ModelMixin, AttentionMixin):
    """A control network for FLUX.1.

    Args:
        num_mode: how many kinds of control a union network knows; each is a token in front of the text.
        conditioning_embedding_channels: the control image comes as pixels and is embedded, not as packed latents.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["FluxTransformerBlock", "FluxSingleTransformerBlock"]
    _repeated_blocks = ["FluxTransformerBlock", "FluxSingleTransformerBlock"]

    @register_to_config
    def __init__(
        self,
        patch_size: int = 1,
        in_channels: int = 64,
        num_layers: int = 19,
        num_single_layers: int = 38,
        attention_head_dim: int = 128,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 4096,
        pooled_projection_dim: int = 768,
        guidance_embeds: bool = False,
        axes_dims_rope: list[int] = [16, 56, 56],  # noqa: B006
        num_mode: int | None = None,
        conditioning_embedding_channels: int | None = None,
    ) -> None:
        super().__init__()
        self.out_channels = in_channels
        self.inner_dim = dim = num_attention_heads * attention_head_dim
        self.pos_embed = AxialRotary(10000, axes_dims_rope)
        self.time_text_embed = time_text_embedding(guidance_embeds, dim, pooled_projection_dim)
        self.context_embedder = nn.Linear(joint_attention_dim, dim)
        self.x_embedder = nn.Linear(in_channels, dim)
        heads = (dim, num_attention_heads, attention_head_dim)
        self.transformer_blocks = nn.ModuleList([FluxTransformerBlock(*heads) for _ in range(num_layers)])
        self.single_transformer_blocks = nn.ModuleList(
            [FluxSingleTransformerBlock(*heads) for _ in range(num_single_layers)]
        )
        self.controlnet_blocks = nn.ModuleList([zero_module(nn.Linear(dim, dim)) for _ in range(num_layers)])
        self.controlnet_single_blocks = nn.ModuleList(
            [zero_module(nn.Linear(dim, dim)) for _ in range(num_single_layers)]
        )
        self.union = num_mode is not None
        if num_mode is not None:
            self.controlnet_mode_embedder = zero_module(nn.Embedding(num_mode, dim))
        self.input_hint_block = None
        if conditioning_embedding_channels is not None:
            self.input_hint_block = ControlNetConditioningEmbedding(conditioning_embedding_channels, 3, (16,) * 4)
        self.controlnet_x_embedder = zero_module(nn.Linear(in_channels, dim))
        self.gradient_checkpointing = False

    @classmethod
    def from_transformer(
        cls,
        transformer: FluxTransformer2DModel,
        num_layers: int = 4,
        num_single_layers: int = 10,
        attention_head_dim: int = 128,
        num_attention_heads: int = 24,
        load_weights_from_transformer: bool = True,
    ) -> FluxControlNetModel:
        """A control network made of the first blocks of ``transformer``, that adds nothing yet."""
        config = {k: v for k, v in transformer.config.items() if k in cls._init_names()}
        config.update(num_layers=num_layers, num_single_layers=num_single_layers)
        config.update(attention_head_dim=attention_head_dim, num_attention_heads=num_attention_heads)
        controlnet = cls(**config)
        if load_weights_from_transformer:
            for name in ("time_text_embed", "context_embedder", "x_embedder"):
                copy_weights(getattr(controlnet, name), getattr(transformer, name))
            copy_weights(controlnet.transformer_blocks, transformer.transformer_blocks)
            copy_weights(controlnet.single_transformer_blocks, transformer.single_transformer_blocks)
        return controlnet

    def forward(
        self,
        hidden_states: Tensor,
        controlnet_cond: Tensor,
        controlnet_mode: Tensor | None = None,
        conditioning_scale: float = 1.0,
        encoder_hidden_states: Tensor = None,  # type: ignore[assignment]
        pooled_projections: Tensor = None,  # type: ignore[assignment]
        timestep: Tensor = None,  # type: ignore[assignment]
        img_ids: Tensor = None,  # type: ignore[assignment]
        txt_ids: Tensor = None,  # type: ignore[assignment]
        guidance: Tensor | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> FluxControlNetOutput | tuple[Any, Any]:
        """What to add to the denoiser's blocks; arguments as there, and:

        Args:
            controlnet_cond: ``(B, L, in_channels)``, packed latents of the control image; or ``(B, 3, H, W)``.
            controlnet_mode: ``(B, 1)``, the kind of control, for union networks.
            conditioning_scale: the strength.

        Raises:
            ValueError: a union network without ``controlnet_mode``.
        """
        x = self.x_embedder(hidden_states) + self.controlnet_x_embedder(self._control_tokens(controlnet_cond))
        temb = embed_conditions(self.time_text_embed, x.dtype, timestep, guidance, pooled_projections)
        y = self.context_embedder(encoder_hidden_states)
        text = unbatched(txt_ids, "txt_ids")
        if self.union:
            if controlnet_mode is None:
                raise ValueError("this control network knows several kinds of control: pass `controlnet_mode`, (B, 1)")
            y = torch.cat([self.controlnet_mode_embedder(controlnet_mode), y], dim=1)
            text = torch.cat([text[:1], text])
        rotary = self.pos_embed(text, unbatched(img_ids, "img_ids"))

        samples, single_samples = [], []
        for block in self.transformer_blocks:
            y, x = checkpointing.run(self, block, x, y, temb, rotary, joint_attention_kwargs)
            samples.append(x)
        length = y.shape[1]
        x = torch.cat((y, x), dim=1)
        for block in self.single_transformer_blocks:
            x = checkpointing.run(self, block, x, temb, rotary, joint_attention_kwargs)
            single_samples.append(x[:, length:])

        double = scaled(self.controlnet_blocks, samples, conditioning_scale)
        single = scaled(self.controlnet_single_blocks, single_samples, conditioning_scale)
        if not return_dict:
            return double, single
        return FluxControlNetOutput(controlnet_block_samples=double, controlnet_single_block_samples=single)

    def _control_tokens(self, image: Tensor) -> Tensor:
        if self.input_hint_block is None:
            return image
        patches = nn.functional.pixel_unshuffle(self.input_hint_block(image), self.config.patch_size)
        return patches.flatten(2).transpose(1, 2)


class FluxMultiControlNetModel(ModelMixin):
    """Several control networks, or one union network with several images; what they add is summed."""

    def __init__(self, controlnets: Sequence[FluxControlNetModel]) -> None:
        super().__init__()
        self.nets = nn.ModuleList(controlnets)

    def forward(
        self,
        hidden_states: Tensor,
        controlnet_cond: list[Tensor],
        controlnet_mode: list[Tensor | None],
        conditioning_scale: list[float],
        encoder_hidden_states: Tensor = None,  # type: ignore[assignment]
        pooled_projections: Tensor = None,  # type: ignore[assignment]
        timestep: Tensor = None,  # type: ignore[assignment]
        img_ids: Tensor = None,  # type: ignore[assignment]
        txt_ids: Tensor = None,  # type: ignore[assignment]
        guidance: Tensor | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> FluxControlNetOutput | tuple[Any, Any]:
        """As :meth:`FluxControlNetModel.forward`, with a list of images, kinds ``(B,)`` and strengths.

        Raises:
            ValueError: the lists differ in length from each other, or from the networks (unless there is one).
        """
        nets = list(self.nets) * len(controlnet_cond) if len(self.nets) == 1 else list(self.nets)
        if not len(nets) == len(controlnet_cond) == len(controlnet_mode) == len(conditioning_scale):
            raise ValueError(
                f"{len(self.nets)} control networks with {len(controlnet_cond)} images, {len(controlnet_mode)} modes "
                f"and {len(conditioning_scale)} scales; give one of each for every network"
            )
        common = (encoder_hidden_states, pooled_projections, timestep, img_ids, txt_ids, guidance)
        parts = [
            net(
                hidden_states,
                image,
                None if mode is None else mode[:, None],
                scale,
                *common,
                joint_attention_kwargs,
                return_dict=False,
            )
            for net, image, mode, scale in zip(nets, controlnet_cond, controlnet_mode, conditioning_scale, strict=True)
        ]
        double, single = summed(part[0] for part in parts), summed(part[1] for part in parts)
        if not return_dict:
            return double, single
        return FluxControlNetOutput(controlnet_block_samples=double, controlnet_single_block_samples=single)
