"""The blocks of UNets (Ronneberger et al., 2015; Ho et al., 2020; Rombach et al., 2022).

A block is a row of residual blocks, each followed by attention if its kind has any, then a change of
resolution. The kinds are subclasses that only say which attention and which sampler they have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from . import checkpointing
from .attention import Attention
from .freeu import FreeU
from .resnet import Downsample2D, ResnetBlock2D, Upsample2D
from .transformer_2d import DualTransformer2DModel, Transformer2DModel


@dataclass(frozen=True)
class Settings:
    """What the blocks of one network have in common, and what one of them has of its own.

    Attributes:
        skip_time_act, output_scale_factor: of the kinds that change resolution by residual blocks only.
        attn_groups: group norm before self-attention, if given.
        heads: of transformers; ``head_dim`` is the width of a head of all other attention.
        depth: transformer blocks per residual block, a number or one for each.
    """

    temb_channels: int | None = None
    dropout: float = 0.0
    eps: float = 1e-6
    time_scale_shift: str = "default"
    act_fn: str = "swish"
    groups: int = 32
    attn_groups: int | None = 32
    skip_time_act: bool = False
    output_scale_factor: float = 1.0
    heads: int = 1
    head_dim: int | None = 1
    depth: int | Sequence[int] = 1
    cross_attention_dim: int | None = 1280
    cross_attention_norm: str | None = None
    dual_cross_attention: bool = False
    use_linear_projection: bool = False
    only_cross_attention: bool = False
    upcast_attention: bool = False
    downsample_padding: int = 1
    sampler: str = "conv"  # or "resnet", where the kind of block leaves the choice

    def resnet(self, in_channels: int, out_channels: int, **kwargs: Any) -> ResnetBlock2D:
        return ResnetBlock2D(
            in_channels=in_channels,
            out_channels=out_channels,
            temb_channels=self.temb_channels,
            eps=self.eps,
            groups=self.groups,
            dropout=self.dropout,
            time_embedding_norm=self.time_scale_shift,
            non_linearity=self.act_fn,
            output_scale_factor=self.output_scale_factor,
            skip_time_act=self.skip_time_act,
            **kwargs,
        )

    def attention(self, kind: str | None, channels: int, index: int) -> nn.Module | None:
        """Attention of a kind: ``"transformer"``, ``"self"``, ``"added_kv"`` or ``None``."""
        if kind == "transformer":
            return self._transformer(channels, self.depth if isinstance(self.depth, int) else self.depth[index])
        if kind is None:
            return None
        width = self.head_dim if self.head_dim is not None else channels
        common: dict[str, Any] = dict(heads=channels // width, dim_head=width, bias=True, upcast_softmax=True)
        if kind == "self":
            return Attention(
                channels,
                rescale_output_factor=self.output_scale_factor,
                eps=self.eps,
                norm_num_groups=self.attn_groups,
                residual_connection=True,
                **common,
            )
        return Attention(
            channels,
            cross_attention_dim=channels,
            added_kv_proj_dim=self.cross_attention_dim,
            norm_num_groups=self.groups,
            only_cross_attention=self.only_cross_attention,
            cross_attention_norm=self.cross_attention_norm,
            **common,
        )

    def _transformer(self, channels: int, depth: int) -> nn.Module:
        head_dim = channels // self.heads
        common: dict[str, Any] = dict(cross_attention_dim=self.cross_attention_dim, norm_num_groups=self.groups)
        if self.dual_cross_attention:
            return DualTransformer2DModel(self.heads, head_dim, channels, num_layers=1, **common)
        return Transformer2DModel(
            self.heads,
            head_dim,
            channels,
            num_layers=depth,
            use_linear_projection=self.use_linear_projection,
            only_cross_attention=self.only_cross_attention,
            upcast_attention=self.upcast_attention,
            **common,
        )


# what a block whose resolution is changed by a convolution leaves at the default
_PLAIN: dict[str, Any] = {"skip_time_act": False, "output_scale_factor": 1.0}


class UNetBlock(nn.Module):
    """What down, mid and up blocks share: residual blocks with attention between."""

    attention_kind: ClassVar[str | None] = None
    sampler_kind: ClassVar[str] = "conv"

    def __init__(self) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        self.has_cross_attention = self.attention_kind in ("transformer", "added_kv")

    def _build(self, settings: Settings, widths: Sequence[tuple[int, int]]) -> None:
        """One residual block for each ``(in, out)``; attention after each, if the kind has any."""
        if self.attention_kind is not None:
            made = [settings.attention(self.attention_kind, out, i) for i, (_, out) in enumerate(widths)]
            self.attentions = nn.ModuleList(m for m in made if m is not None)
        self.resnets = nn.ModuleList(settings.resnet(i, o) for i, o in widths)

    def _resnet(self, index: int, x: Tensor, temb: Tensor | None) -> Tensor:
        return checkpointing.run(self, self.resnets[index], x, temb)  # type: ignore[no-any-return]

    def _attend(
        self,
        index: int,
        x: Tensor,
        tokens: Any,
        kwargs: dict[str, Any] | None,
        mask: Tensor | None,
        tokens_mask: Tensor | None,
    ) -> Tensor:
        """``x`` after the attention that follows residual block ``index``.

        ``tokens (B, S, D)`` are the context (with image tokens: a tuple); ``mask (B, 1, L)`` and
        ``tokens_mask (B, 1, S)`` are added to the scores of self- and cross-attention.
        """
        if self.attention_kind == "transformer":
            x = self.attentions[index](x, tokens, kwargs, mask, tokens_mask)
        elif self.attention_kind == "self":
            x = self.attentions[index](x)
        elif self.attention_kind == "added_kv":
            x = self.attentions[index](x, tokens, mask if mask is not None else tokens_mask, **(kwargs or {}))
        return x


class DownBlock(UNetBlock):
    """The encoder's side: keeps what it makes on the way for the skip connections."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_layers: int,
        settings: Settings,
        add_downsample: bool = True,
    ) -> None:
        super().__init__()
        kind = settings.sampler if self.attention_kind == "self" else self.sampler_kind
        settings = settings if self.sampler_kind == "resnet" else replace(settings, **_PLAIN)
        widths = [(in_channels if i == 0 else out_channels, out_channels) for i in range(num_layers)]
        self._build(settings, widths)
        self.downsamplers: nn.ModuleList | None = None
        if add_downsample and kind == "resnet":
            made = settings.resnet(out_channels, out_channels, down=True)
            self.downsamplers = nn.ModuleList([made])
        elif add_downsample:
            made_conv = Downsample2D(out_channels, True, padding=settings.downsample_padding)
            self.downsamplers = nn.ModuleList([made_conv])

    def forward(
        self,
        hidden_states: Tensor,
        temb: Tensor | None = None,
        encoder_hidden_states: Any = None,
        attention_mask: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        encoder_attention_mask: Tensor | None = None,
        additional_residuals: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """``(B, C, H, W) -> (B, C', H', W')`` and the states for the skip connections, in order.

        ``additional_residuals`` are added after the last attention, before downsampling.
        """
        x, kept = hidden_states, []
        context = (encoder_hidden_states, cross_attention_kwargs, attention_mask, encoder_attention_mask)
        for i in range(len(self.resnets)):
            x = self._attend(i, self._resnet(i, x, temb), *context)
            if i == len(self.resnets) - 1 and additional_residuals is not None:
                x = x + additional_residuals
            kept.append(x)
        for sampler in self.downsamplers or ():
            x = sampler(x, temb) if isinstance(sampler, ResnetBlock2D) else sampler(x)
            kept.append(x)
        return x, tuple(kept)


class DownBlock2D(DownBlock):
    """Residual blocks, convolution of stride 2."""


class AttnDownBlock2D(DownBlock):
    """Residual blocks each with self-attention; the sampler is the settings' choice."""

    attention_kind = "self"


class CrossAttnDownBlock2D(DownBlock):
    """Residual blocks each with a transformer."""

    attention_kind = "transformer"


class ResnetDownsampleBlock2D(DownBlock):
    """Residual blocks, the last of which halves height and width."""

    sampler_kind = "resnet"


class SimpleCrossAttnDownBlock2D(DownBlock):
    """Residual blocks each with one attention over pixels and context; a residual block downsamples."""

    attention_kind = "added_kv"
    sampler_kind = "resnet"


class MidBlock(UNetBlock):
    """A residual block, then ``num_layers`` times attention and a residual block."""

    def __init__(self, channels: int, settings: Settings, num_layers: int = 1, add_attention: bool = True) -> None:
        super().__init__()
        if self.attention_kind is not None and add_attention:
            made = [settings.attention(self.attention_kind, channels, i) for i in range(num_layers)]
            self.attentions = nn.ModuleList(m for m in made if m is not None)
        settings = settings if self.attention_kind == "added_kv" else replace(settings, skip_time_act=False)
        self.resnets = nn.ModuleList(settings.resnet(channels, channels) for _ in range(num_layers + 1))
        self.add_attention = add_attention

    def forward(
        self,
        hidden_states: Tensor,
        temb: Tensor | None = None,
        encoder_hidden_states: Any = None,
        attention_mask: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        encoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        """``(B, C, H, W)``, both."""
        context = (encoder_hidden_states, cross_attention_kwargs, attention_mask, encoder_attention_mask)
        x = self._resnet(0, hidden_states, temb)
        for i in range(1, len(self.resnets)):
            x = self._attend(i - 1, x, *context) if self.add_attention else x
            x = self._resnet(i, x, temb)
        return x


class UNetMidBlock2D(MidBlock):
    """With self-attention."""

    attention_kind = "self"


class UNetMidBlock2DCrossAttn(MidBlock):
    """With a transformer."""

    attention_kind = "transformer"


class UNetMidBlock2DSimpleCrossAttn(MidBlock):
    """With one attention over pixels and context."""

    attention_kind = "added_kv"


class UpBlock(UNetBlock):
    """The decoder's side: takes the states of the encoder's side, the last first.

    Attributes:
        freeu: changes features and skips, if set (see :mod:`.freeu`).
    """

    takes_freeu: ClassVar[bool] = False

    def __init__(
        self,
        in_channels: int,
        prev_output_channel: int,
        out_channels: int,
        num_layers: int,
        settings: Settings,
        add_upsample: bool = True,
        resolution_idx: int | None = None,
    ) -> None:
        super().__init__()
        kind = settings.sampler if self.attention_kind == "self" else self.sampler_kind
        settings = settings if self.sampler_kind == "resnet" else replace(settings, **_PLAIN)
        widths = []
        for i in range(num_layers):
            skip = in_channels if i == num_layers - 1 else out_channels
            widths.append(((prev_output_channel if i == 0 else out_channels) + skip, out_channels))
        self._build(settings, widths)
        self.upsamplers: nn.ModuleList | None = None
        if add_upsample and kind == "resnet":
            made = settings.resnet(out_channels, out_channels, up=True)
            self.upsamplers = nn.ModuleList([made])
        elif add_upsample:
            self.upsamplers = nn.ModuleList([Upsample2D(out_channels, True)])
        self.resolution_idx = resolution_idx
        self.freeu: FreeU | None = None

    def forward(
        self,
        hidden_states: Tensor,
        res_hidden_states_tuple: Sequence[Tensor],
        temb: Tensor | None = None,
        encoder_hidden_states: Any = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        upsample_size: tuple[int, int] | None = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        """``(B, C, H, W)`` and as many skip states as residual blocks ``-> (B, C', H', W')``."""
        x, skips = hidden_states, list(res_hidden_states_tuple)
        context = (encoder_hidden_states, cross_attention_kwargs, attention_mask, encoder_attention_mask)
        for i in range(len(self.resnets)):
            skip = skips.pop()
            if self.freeu is not None and self.takes_freeu:
                x, skip = self.freeu(x, skip, self.resolution_idx)
            x = self._resnet(i, torch.cat([x, skip], dim=1), temb)
            x = self._attend(i, x, *context)
        for sampler in self.upsamplers or ():
            x = sampler(x, temb) if isinstance(sampler, ResnetBlock2D) else sampler(x, upsample_size)
        return x


class UpBlock2D(UpBlock):
    """Residual blocks, upsampling with a convolution."""

    takes_freeu = True


class AttnUpBlock2D(UpBlock):
    """Residual blocks each with self-attention; the sampler is the settings' choice."""

    attention_kind = "self"


class CrossAttnUpBlock2D(UpBlock):
    """Residual blocks each with a transformer."""

    attention_kind = "transformer"
    takes_freeu = True


class ResnetUpsampleBlock2D(UpBlock):
    """Residual blocks, the last of which doubles height and width."""

    sampler_kind = "resnet"


class SimpleCrossAttnUpBlock2D(UpBlock):
    """Residual blocks each with one attention over pixels and context; a residual block upsamples."""

    attention_kind = "added_kv"
    sampler_kind = "resnet"


DOWN: dict[str, type[DownBlock]] = {
    c.__name__: c
    for c in (
        DownBlock2D,
        AttnDownBlock2D,
        CrossAttnDownBlock2D,
        ResnetDownsampleBlock2D,
        SimpleCrossAttnDownBlock2D,
    )
}
MID: dict[str, type[MidBlock]] = {
    c.__name__: c for c in (UNetMidBlock2D, UNetMidBlock2DCrossAttn, UNetMidBlock2DSimpleCrossAttn)
}
UP: dict[str, type[UpBlock]] = {
    c.__name__: c
    for c in (UpBlock2D, AttnUpBlock2D, CrossAttnUpBlock2D, ResnetUpsampleBlock2D, SimpleCrossAttnUpBlock2D)
}


def find_block(table: dict[str, type[Any]], name: str, option: str) -> type[Any]:
    """The class of a block; ``ValueError`` names the option and what is allowed.

    Old checkpoints write ``UNetRes`` before the name.
    """
    short = name.removeprefix("UNetRes")
    if short not in table:
        raise ValueError(f"{option} {name!r} is not supported; there are {', '.join(table)}")
    return table[short]


def build_down(
    types: Sequence[str], widths: Sequence[int], layers: Sequence[int], settings: Sequence[Settings]
) -> nn.ModuleList:
    """The encoder's side: one block for each entry, all but the last halve height and width."""
    return nn.ModuleList(
        find_block(DOWN, kind, "down_block_types")(
            widths[max(i - 1, 0)], widths[i], layers[i], settings[i], add_downsample=i < len(types) - 1
        )
        for i, kind in enumerate(types)
    )


def build_up(
    types: Sequence[str], widths: Sequence[int], layers: Sequence[int], settings: Sequence[Settings]
) -> nn.ModuleList:
    """The decoder's side; ``widths`` and ``layers`` are the encoder's, in its order, ``settings`` in this one's."""
    n, back = len(types), list(reversed(widths))
    return nn.ModuleList(
        find_block(UP, kind, "up_block_types")(
            back[min(i + 1, n - 1)],
            back[max(i - 1, 0)],
            back[i],
            layers[n - 1 - i] + 1,
            settings[i],
            add_upsample=i < n - 1,
            resolution_idx=i,
        )
        for i, kind in enumerate(types)
    )
