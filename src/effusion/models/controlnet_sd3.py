"""Control networks for Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..core.config import register_to_config
from ..core.outputs import BaseOutput
from ..nn import checkpointing
from ..nn.control import copy_weights, scaled, summed, zero_module
from ..nn.embeddings import CombinedTimestepTextProjEmbeddings
from ..nn.patch import PatchEmbed
from .base import ModelMixin
from .transformer_sd3 import JointTransformerBlock, SD3Base, SD3SingleTransformerBlock, SD3Transformer2DModel


@dataclass
class SD3ControlNetOutput(BaseOutput):
    """What is added behind the denoiser's blocks: ``(B, L, D)`` each."""

    controlnet_block_samples: Sequence[Tensor] | None


class SD3ControlNetModel(SD3Base):
    """A control network for Stable Diffusion 3.

    Args:
        joint_attention_dim: width of the text; ``None`` for a network that does not look at it (3.5 large).
        extra_conditioning_channels: channels of the control input beyond the latents' (a mask).
        use_pos_embed: embed the latents here; otherwise they come as the denoiser's tokens.
        force_zeros_for_pooled_projection: a fact for who calls it: give zeros as pooled text.
    """

    _no_split_modules = ["JointTransformerBlock", "SD3SingleTransformerBlock"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 128,
        patch_size: int = 2,
        in_channels: int = 16,
        num_layers: int = 18,
        attention_head_dim: int = 64,
        num_attention_heads: int = 18,
        joint_attention_dim: int = 4096,
        caption_projection_dim: int = 1152,
        pooled_projection_dim: int = 2048,
        out_channels: int = 16,
        pos_embed_max_size: int = 96,
        extra_conditioning_channels: int = 0,
        dual_attention_layers: tuple[int, ...] = (),
        qk_norm: str | None = None,
        pos_embed_type: str | None = "sincos",
        use_pos_embed: bool = True,
        force_zeros_for_pooled_projection: bool = True,
    ) -> None:
        super().__init__()
        self.out_channels = out_channels if out_channels is not None else in_channels
        self.inner_dim = dim = num_attention_heads * attention_head_dim
        self.pos_embed = None
        if use_pos_embed:
            self.pos_embed = PatchEmbed(
                sample_size,
                sample_size,
                patch_size,
                in_channels,
                dim,
                pos_embed_max_size=pos_embed_max_size,
                pos_embed_type=pos_embed_type,
            )
        self.time_text_embed = CombinedTimestepTextProjEmbeddings(dim, pooled_projection_dim)
        heads = (dim, num_attention_heads, attention_head_dim)
        self.context_embedder = None
        if joint_attention_dim is not None:
            self.context_embedder = nn.Linear(joint_attention_dim, caption_projection_dim)
            self.transformer_blocks = nn.ModuleList(
                JointTransformerBlock(*heads, qk_norm=qk_norm, use_dual_attention=i in dual_attention_layers)
                for i in range(num_layers)
            )
        else:
            self.transformer_blocks = nn.ModuleList(SD3SingleTransformerBlock(*heads) for _ in range(num_layers))
        self.controlnet_blocks = nn.ModuleList(zero_module(nn.Linear(dim, dim)) for _ in range(num_layers))
        channels = in_channels + extra_conditioning_channels
        self.pos_embed_input = zero_module(
            PatchEmbed(sample_size, sample_size, patch_size, channels, dim, pos_embed_type=None)
        )
        self.gradient_checkpointing = False

    @classmethod
    def from_transformer(
        cls,
        transformer: SD3Transformer2DModel,
        num_layers: int | None = 12,
        num_extra_conditioning_channels: int = 1,
        load_weights_from_transformer: bool = True,
    ) -> SD3ControlNetModel:
        """A control network made of the first blocks of ``transformer``, that adds nothing yet.

        Raises:
            ValueError: ``transformer`` has no more than ``num_layers`` blocks (its last one is of another kind).
        """
        config = {k: v for k, v in transformer.config.items() if k in cls._init_names()}
        config["num_layers"] = num_layers or config["num_layers"]
        if load_weights_from_transformer and config["num_layers"] >= len(transformer.transformer_blocks):
            raise ValueError(
                f"num_layers={config['num_layers']} blocks can't be taken from a transformer with "
                f"{len(transformer.transformer_blocks)}: the last one is of another kind"
            )
        controlnet = cls(**{**config, "extra_conditioning_channels": num_extra_conditioning_channels})
        if load_weights_from_transformer:
            for name in ("pos_embed", "time_text_embed", "context_embedder", "transformer_blocks"):
                copy_weights(getattr(controlnet, name), getattr(transformer, name))
        return controlnet

    def forward(
        self,
        hidden_states: Tensor,
        controlnet_cond: Tensor,
        conditioning_scale: float = 1.0,
        encoder_hidden_states: Tensor | None = None,
        pooled_projections: Tensor = None,  # type: ignore[assignment]
        timestep: Tensor = None,  # type: ignore[assignment]
        joint_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> SD3ControlNetOutput | tuple[list[Tensor] | None]:
        """What to add to the denoiser's blocks; arguments as there, and:

        Args:
            hidden_states: latents ``(B, C, H, W)``, or tokens ``(B, L, D)`` without ``use_pos_embed``.
            controlnet_cond: ``(B, C + extra, H, W)``, the encoded control image.
            conditioning_scale: the strength.

        Raises:
            ValueError: latents where tokens are wanted or the other way round; text likewise.
        """
        self._check(hidden_states, encoder_hidden_states)
        x = hidden_states if self.pos_embed is None else self.pos_embed(hidden_states)
        temb = self.time_text_embed(timestep, pooled_projections)
        y = None if self.context_embedder is None else self.context_embedder(encoder_hidden_states)
        x = x + self.pos_embed_input(controlnet_cond)

        samples = []
        for block in self.transformer_blocks:
            if y is None:
                x = checkpointing.run(self, block, x, temb)
            else:
                y, x = checkpointing.run(self, block, x, y, temb, joint_attention_kwargs)
            samples.append(x)
        result = scaled(self.controlnet_blocks, samples, conditioning_scale)
        return SD3ControlNetOutput(controlnet_block_samples=result) if return_dict else (result,)

    def _check(self, x: Tensor, y: Tensor | None) -> None:
        kind, ndim = ("latents (B, C, H, W)", 4) if self.pos_embed is not None else ("tokens (B, L, D)", 3)
        if x.ndim != ndim:
            raise ValueError(f"this control network takes {kind}; `hidden_states` has the shape {tuple(x.shape)}")
        if (y is None) != (self.context_embedder is None):
            wanted = "needs" if y is None else "does not look at text: leave out"
            raise ValueError(f"this control network {wanted} `encoder_hidden_states`")


class SD3MultiControlNetModel(ModelMixin):
    """Several control networks; what they add is summed."""

    def __init__(self, controlnets: Sequence[SD3ControlNetModel]) -> None:
        super().__init__()
        self.nets = nn.ModuleList(controlnets)

    def forward(
        self,
        hidden_states: Tensor,
        controlnet_cond: list[Tensor],
        conditioning_scale: list[float],
        pooled_projections: Tensor,
        encoder_hidden_states: Tensor | None = None,
        timestep: Tensor = None,  # type: ignore[assignment]
        joint_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> SD3ControlNetOutput | tuple[list[Tensor] | None]:
        """As :meth:`SD3ControlNetModel.forward`, with one image and one strength for each network.

        Raises:
            ValueError: there are not as many of them as networks.
        """
        if not len(self.nets) == len(controlnet_cond) == len(conditioning_scale):
            raise ValueError(
                f"{len(self.nets)} control networks with {len(controlnet_cond)} images and "
                f"{len(conditioning_scale)} scales; give one of each for every network"
            )
        common = (encoder_hidden_states, pooled_projections, timestep, joint_attention_kwargs)
        result = summed(
            net(hidden_states, image, scale, *common, return_dict=False)[0]
            for net, image, scale in zip(self.nets, controlnet_cond, conditioning_scale, strict=True)
        )
        return SD3ControlNetOutput(controlnet_block_samples=result) if return_dict else (result,)
