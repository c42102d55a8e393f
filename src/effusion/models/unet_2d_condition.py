"""UNet2DConditionModel: the denoiser of Stable Diffusion and its kin (Rombach et al., 2022; Podell et al., 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..core.config import register_to_config
from ..core.outputs import BaseOutput
from ..nn import fresh
from ..nn.attention import AttentionMixin
from ..nn.conditioning import ConditioningMixin
from ..nn.feed_forward import activation
from ..nn.freeu import FreeU
from ..nn.unet_blocks import MID, Settings, UNetMidBlock2D, build_down, build_up, find_block
from .base import ModelMixin


@dataclass
class UNet2DConditionOutput(BaseOutput):
    """The prediction, ``(B, C, H, W)``."""

    sample: Tensor


class UNet2DConditionModel(ConditioningMixin, AttentionMixin, ModelMixin):
    """A UNet (Ronneberger et al., 2015) with attention to a context, conditioned on time and more.

    Every option of the published SD 1.x, 2.x, XL, XL-refiner, inpainting and LCM checkpoints is known, and
    those of Kandinsky 2, DeepFloyd IF and Versatile Diffusion; GLIGEN's gated attention is refused.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["BasicTransformerBlock", "ResnetBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"]
    _skip_layerwise_casting_patterns = ["norm"]
    _repeated_blocks = ["BasicTransformerBlock"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] | None = None,
        in_channels: int = 4,
        out_channels: int = 4,
        center_input_sample: bool = False,
        flip_sin_to_cos: bool = True,
        freq_shift: int = 0,
        down_block_types: tuple[str, ...] = (
            "CrossAttnDownBlock2D",
            "CrossAttnDownBlock2D",
            "CrossAttnDownBlock2D",
            "DownBlock2D",
        ),
        mid_block_type: str | None = "UNetMidBlock2DCrossAttn",
        up_block_types: tuple[str, ...] = (
            "UpBlock2D",
            "CrossAttnUpBlock2D",
            "CrossAttnUpBlock2D",
            "CrossAttnUpBlock2D",
        ),
        only_cross_attention: bool | tuple[bool, ...] = False,
        block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280),
        layers_per_block: int | tuple[int, ...] = 2,
        downsample_padding: int = 1,
        mid_block_scale_factor: float = 1,
        dropout: float = 0.0,
        act_fn: str = "silu",
        norm_num_groups: int | None = 32,
        norm_eps: float = 1e-5,
        cross_attention_dim: int | tuple[int, ...] = 1280,
        transformer_layers_per_block: int | tuple[Any, ...] = 1,
        reverse_transformer_layers_per_block: tuple[Any, ...] | None = None,
        encoder_hid_dim: int | None = None,
        encoder_hid_dim_type: str | None = None,
        attention_head_dim: int | tuple[int, ...] = 8,
        num_attention_heads: int | tuple[int, ...] | None = None,
        dual_cross_attention: bool = False,
        use_linear_projection: bool = False,
        class_embed_type: str | None = None,
        addition_embed_type: str | None = None,
        addition_time_embed_dim: int | None = None,
        num_class_embeds: int | None = None,
        upcast_attention: bool = False,
        resnet_time_scale_shift: str = "default",
        resnet_skip_time_act: bool = False,
        resnet_out_scale_factor: float = 1.0,
        time_embedding_type: str = "positional",
        time_embedding_dim: int | None = None,
        time_embedding_act_fn: str | None = None,
        timestep_post_act: str | None = None,
        time_cond_proj_dim: int | None = None,
        conv_in_kernel: int = 3,
        conv_out_kernel: int = 3,
        projection_class_embeddings_input_dim: int | None = None,
        attention_type: str = "default",
        class_embeddings_concat: bool = False,
        mid_block_only_cross_attention: bool | None = None,
        cross_attention_norm: str | None = None,
        addition_embed_type_num_heads: int = 64,
    ) -> None:
        super().__init__()
        n = len(block_out_channels)
        if not len(down_block_types) == len(up_block_types) == n:
            raise ValueError(
                "down_block_types, up_block_types and block_out_channels must be equally long, not "
                f"{len(down_block_types)}, {len(up_block_types)} and {n}"
            )
        if num_attention_heads is not None:
            raise ValueError("num_attention_heads must be None: by custom attention_head_dim is the number of heads")
        if attention_type != "default":
            raise ValueError(f"attention_type {attention_type!r} is not supported; there is 'default'")
        if norm_num_groups is None:
            raise ValueError("norm_num_groups=None is not supported: the residual blocks need a number of groups")
        cross_dims = _per_block(cross_attention_dim, n, "cross_attention_dim")
        depths = _per_block(transformer_layers_per_block, n, "transformer_layers_per_block")
        if reverse_transformer_layers_per_block is None and any(isinstance(d, (list, tuple)) for d in depths):
            raise ValueError("transformer_layers_per_block by layer needs reverse_transformer_layers_per_block too")
        head_dims = _per_block(attention_head_dim, n, "attention_head_dim")
        layers = _per_block(layers_per_block, n, "layers_per_block")
        only_cross = _per_block(only_cross_attention, n, "only_cross_attention")
        if mid_block_only_cross_attention is None:
            mid_block_only_cross_attention = only_cross_attention if isinstance(only_cross_attention, bool) else False
        self.sample_size, self.center_input_sample = sample_size, center_input_sample
        self.class_embeddings_concat = class_embeddings_concat
        self.num_upsamplers = n - 1

        self.conv_in = nn.Conv2d(in_channels, block_out_channels[0], conv_in_kernel, padding=(conv_in_kernel - 1) // 2)
        time_dim, input_dim = self._build_time(
            time_embedding_type,
            block_out_channels[0],
            time_embedding_dim,
            flip_sin_to_cos,
            freq_shift,
            act_fn,
            timestep_post_act,
            time_cond_proj_dim,
        )
        hid_type = self._build_context(encoder_hid_dim_type, encoder_hid_dim, cross_dims[0])
        self.register_to_config(encoder_hid_dim_type=hid_type)
        width = projection_class_embeddings_input_dim
        self._build_class(class_embed_type, num_class_embeds, width, act_fn, time_dim, input_dim)
        self._build_addition(
            addition_embed_type,
            time_dim,
            encoder_hid_dim,
            cross_dims[0],
            width,
            addition_time_embed_dim,
            addition_embed_type_num_heads,
            flip_sin_to_cos,
            freq_shift,
        )
        self.time_embed_act = None if time_embedding_act_fn is None else activation(time_embedding_act_fn)

        common = Settings(
            temb_channels=time_dim * 2 if class_embeddings_concat else time_dim,
            dropout=dropout,
            eps=norm_eps,
            time_scale_shift=resnet_time_scale_shift,
            act_fn=act_fn,
            groups=norm_num_groups,
            attn_groups=norm_num_groups,
            skip_time_act=resnet_skip_time_act,
            output_scale_factor=resnet_out_scale_factor,
            cross_attention_norm=cross_attention_norm,
            dual_cross_attention=dual_cross_attention,
            use_linear_projection=use_linear_projection,
            upcast_attention=upcast_attention,
            downsample_padding=downsample_padding,
        )
        own = [
            replace(
                common,
                heads=head_dims[i],
                head_dim=head_dims[i],
                depth=depths[i],
                cross_attention_dim=cross_dims[i],
                only_cross_attention=only_cross[i],
            )
            for i in range(n)
        ]
        self.down_blocks = build_down(down_block_types, block_out_channels, layers, own)
        up_depths = reverse_transformer_layers_per_block or depths[::-1]
        # attention_head_dim of attention without transformers is by custom not reversed
        up_own = [replace(own[n - 1 - i], depth=up_depths[i], head_dim=head_dims[i]) for i in range(n)]
        self.up_blocks = build_up(up_block_types, block_out_channels, layers, up_own)
        mid = replace(
            own[-1], output_scale_factor=mid_block_scale_factor, only_cross_attention=mid_block_only_cross_attention
        )
        self._build_mid(mid_block_type, block_out_channels[-1], mid)
        self.conv_norm_out = nn.GroupNorm(norm_num_groups, block_out_channels[0], eps=norm_eps)
        self.conv_act = activation(act_fn)
        self.conv_out = nn.Conv2d(
            block_out_channels[0], out_channels, conv_out_kernel, padding=(conv_out_kernel - 1) // 2
        )

    def _build_mid(self, kind: str | None, width: int, settings: Settings) -> None:
        self.mid_block: nn.Module | None = None
        if kind is not None:
            block = find_block(MID, kind, "mid_block_type")
            if block is UNetMidBlock2D:
                self.mid_block = block(width, settings, num_layers=0, add_attention=False)
            else:
                # a transformer in the middle looks at the input first, whatever the others do
                only = settings.only_cross_attention and block.attention_kind == "added_kv"
                self.mid_block = block(width, replace(settings, only_cross_attention=only))

    # -- switches ----------------------------------------------------------------------------------

    def set_attention_slice(self, slice_size: str | int | list[int | None] | None = "auto") -> None:
        """Compute attention in slices of (item, head) pairs: less memory where scores are kept whole.

        Args:
            slice_size: ``"auto"`` half of the heads, ``"max"`` one at a time, a number, one number for each
                attention module, or ``None`` for all at once.

        Raises:
            ValueError: not one number for each, or more than there are heads.
        """
        modules = list(self._attentions().values())
        heads = [m.sliceable_head_dim for m in modules]
        if isinstance(slice_size, str):
            if slice_size not in ("auto", "max"):
                raise ValueError(f"slice_size {slice_size!r}: allowed are 'auto', 'max', a number, a list, None")
            sizes: list[int | None] = [max(h // 2, 1) if slice_size == "auto" else 1 for h in heads]
        else:
            sizes = list(slice_size) if isinstance(slice_size, (list, tuple)) else [slice_size] * len(heads)
        if len(sizes) != len(heads):
            raise ValueError(f"{len(sizes)} slice sizes for {len(heads)} attention modules")
        for size, most in zip(sizes, heads, strict=True):
            if size is not None and size > most:
                raise ValueError(f"slice_size {size} is more than the {most} heads of an attention module")
        for module, size in zip(modules, sizes, strict=True):
            module.set_attention_slice(size)

    def enable_freeu(self, s1: float, s2: float, b1: float, b2: float) -> None:
        """FreeU (Si et al., 2023): ``b`` strengthens features, ``s`` weakens skips, in the first two up blocks."""
        for block in self.up_blocks:
            block.freeu = FreeU(s1, s2, b1, b2)  # type: ignore[assignment]

    def disable_freeu(self) -> None:
        """Undo :meth:`enable_freeu`."""
        for block in self.up_blocks:
            block.freeu = None  # type: ignore[assignment]

    # -- computing -----------------------------------------------------------------------------------

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        encoder_hidden_states: Tensor,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        down_block_additional_residuals: tuple[Tensor, ...] | None = None,
        mid_block_additional_residual: Tensor | None = None,
        down_intrablock_additional_residuals: tuple[Tensor, ...] | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """Predict from noisy ``sample (B, C, H, W)`` at ``timestep`` (one, or ``(B,)``) with a context ``(B, S, D)``.

        Args:
            class_labels: ``(B,)`` or ``(B, D)``, for networks with classes.
            timestep_cond: ``(B, time_cond_proj_dim)``, the embedded guidance of LCMs.
            attention_mask, encoder_attention_mask: ``(B, L)`` and ``(B, S)``, 1 = look, 0 = don't.
            cross_attention_kwargs: handed to the attention processors (``scale`` is the adapters').
            added_cond_kwargs: ``text_embeds (B, D)``, ``time_ids (B, 6)``, ``image_embeds``, ``hint``.
            down_block_additional_residuals, mid_block_additional_residual: a ControlNet's, added to the skips
                and to the middle.
            down_intrablock_additional_residuals: a T2I-Adapter's, one for each down block.

        Raises:
            ValueError: a condition that this network needs is missing.
        """
        tokens, kwargs = encoder_hidden_states, cross_attention_kwargs
        if kwargs is not None and "scale" in kwargs:
            kwargs = {k: v for k, v in kwargs.items() if k != "scale"}
        if self.center_input_sample:
            sample = 2 * sample - 1.0
        emb = self.time_embedding(self.get_time_embed(sample, timestep), timestep_cond)
        label = self.get_class_embed(sample, class_labels)
        if label is not None:
            emb = torch.cat([emb, label], dim=-1) if self.class_embeddings_concat else emb + label
        added = self.get_aug_embed(emb, tokens, added_cond_kwargs)
        if isinstance(added, tuple):
            added, hint = added
            sample = torch.cat([sample, hint], dim=1)
        emb = emb if added is None else emb + added
        emb = emb if self.time_embed_act is None else self.time_embed_act(emb)
        tokens = self.process_encoder_hidden_states(tokens, added_cond_kwargs)
        context: dict[str, Any] = dict(
            encoder_hidden_states=tokens,
            cross_attention_kwargs=kwargs,
            attention_mask=_bias(attention_mask, sample),
            encoder_attention_mask=_bias(encoder_attention_mask, sample),
        )
        if mid_block_additional_residual is None and down_intrablock_additional_residuals is None:
            # T2I-Adapters may come under the ControlNets' name
            down_intrablock_additional_residuals, down_block_additional_residuals = (
                down_block_additional_residuals,
                None,
            )
        sample = self._run_blocks(
            self.conv_in(sample),
            emb,
            context,
            down_block_additional_residuals,
            mid_block_additional_residual,
            list(down_intrablock_additional_residuals or ()),
        )
        sample = self.conv_out(fresh.version_of(self.conv_act)(self.conv_norm_out(sample)))
        return UNet2DConditionOutput(sample=sample) if return_dict else (sample,)

    def _run_blocks(
        self,
        x: Tensor,
        emb: Tensor,
        context: dict[str, Any],
        control: Sequence[Tensor] | None,
        control_mid: Tensor | None,
        inner: list[Tensor],
    ) -> Tensor:
        """Down, middle, up: ``(B, C, H, W)``, both."""
        odd = any(side % 2**self.num_upsamplers for side in x.shape[-2:])
        skips = [x]
        block: Any
        for block in self.down_blocks:
            more = inner.pop(0) if inner else None
            if block.has_cross_attention:
                x, kept = block(x, emb, **context, additional_residuals=more)
            else:
                x, kept = block(x, emb)
                if more is not None:
                    x = x + more
                    kept = (*kept[:-1], x)
            skips.extend(kept)
        if control is not None and control_mid is not None:
            skips = [skip + residual for skip, residual in zip(skips, control, strict=False)]
        if self.mid_block is not None:
            x = self.mid_block(x, emb, **context) if self.mid_block.has_cross_attention else self.mid_block(x, emb)
            if inner and inner[0].shape == x.shape:
                x = x + inner.pop(0)
        if control is not None and control_mid is not None:
            x = x + control_mid
        for block in self.up_blocks:
            taken = [skips.pop() for _ in block.resnets][::-1]
            more_context = context if block.has_cross_attention else {}
            x = block(x, taken, emb, upsample_size=skips[-1].shape[2:] if odd and skips else None, **more_context)
        return x


def _per_block(value: Any, n: int, name: str) -> list[Any]:
    """One value for each of ``n`` blocks."""
    if not isinstance(value, (list, tuple)):
        return [value] * n
    if len(value) != n:
        raise ValueError(f"{name} has {len(value)} values for {n} blocks; give one, or one for each")
    return list(value)


def _bias(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """A mask ``(B, S)`` of ones and zeros as ``(B, 1, S)`` to be added to scores."""
    return None if mask is None else ((1 - mask.to(like.dtype)) * -10000.0).unsqueeze(1)
