"""The convolutional parts of UNets and VAEs: residual block, upsampling, downsampling."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from . import fresh
from .feed_forward import activation


class Upsample2D(nn.Module):
    """Nearest-neighbour upsampling by 2 (or to ``output_size``), then a 3x3 convolution if ``use_conv``."""

    def __init__(self, channels: int, use_conv: bool = False, out_channels: int | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out_channels or channels, 3, padding=1) if use_conv else None

    def forward(self, hidden_states: Tensor, output_size: tuple[int, int] | None = None) -> Tensor:
        """``(B, C, H, W) -> (B, C', 2 H, 2 W)`` or ``(B, C', *output_size)``."""
        if output_size is None:
            hidden_states = F.interpolate(hidden_states, scale_factor=2.0, mode="nearest")
        else:
            hidden_states = F.interpolate(hidden_states, size=output_size, mode="nearest")
        return hidden_states if self.conv is None else self.conv(hidden_states)


class Downsample2D(nn.Module):
    """Halve height and width: a 3x3 convolution of stride 2 if ``use_conv``, else 2x2 means.

    ``padding=0`` means the VAE's way: one row and one column at the bottom and the right only.
    """

    def __init__(
        self, channels: int, use_conv: bool = False, out_channels: int | None = None, padding: int = 1
    ) -> None:
        super().__init__()
        self.padding = padding
        self.conv = nn.Conv2d(channels, out_channels or channels, 3, stride=2, padding=padding) if use_conv else None

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``(B, C, H, W) -> (B, C', H // 2, W // 2)``."""
        if self.conv is None:
            return F.avg_pool2d(hidden_states, 2)
        if self.padding == 0:
            hidden_states = F.pad(hidden_states, (0, 1, 0, 1))
        return self.conv(hidden_states)  # type: ignore[no-any-return]


class ResnetBlock2D(nn.Module):
    """Residual block with a time embedding (He et al., 2016; Dhariwal & Nichol, 2021, section 3).

    Args:
        temb_channels: width of the time embedding; ``None`` for none.
        time_embedding_norm: ``"default"`` adds the projected embedding between the convolutions,
            ``"scale_shift"`` scales and shifts the second norm by it.
        skip_time_act: the embedding has had its activation already.
        up, down: double or halve height and width inside the block.
        output_scale_factor: the sum is divided by it.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int | None = None,
        dropout: float = 0.0,
        temb_channels: int | None = 512,
        groups: int = 32,
        groups_out: int | None = None,
        eps: float = 1e-6,
        non_linearity: str = "swish",
        time_embedding_norm: str = "default",
        skip_time_act: bool = False,
        output_scale_factor: float = 1.0,
        use_in_shortcut: bool | None = None,
        up: bool = False,
        down: bool = False,
        conv_shortcut_bias: bool = True,
        conv_2d_out_channels: int | None = None,
    ) -> None:
        super().__init__()
        out_channels = out_channels or in_channels
        last_channels = conv_2d_out_channels or out_channels
        if time_embedding_norm not in ("default", "scale_shift"):
            raise ValueError(f"time_embedding_norm {time_embedding_norm!r}: allowed are 'default' and 'scale_shift'")
        self.scale_shift = time_embedding_norm == "scale_shift"
        self.skip_time_act = skip_time_act
        self.output_scale_factor = output_scale_factor
        self.nonlinearity = activation(non_linearity)

        self.norm1 = nn.GroupNorm(groups, in_channels, eps=eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        width = out_channels * 2 if self.scale_shift else out_channels
        self.time_emb_proj = nn.Linear(temb_channels, width) if temb_channels is not None else None
        self.norm2 = nn.GroupNorm(groups_out or groups, out_channels, eps=eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, last_channels, 3, padding=1)
        self.resample: Upsample2D | Downsample2D | None = None
        if up or down:
            self.resample = Upsample2D(in_channels) if up else Downsample2D(in_channels)
        shortcut = in_channels != last_channels if use_in_shortcut is None else use_in_shortcut
        self.conv_shortcut = nn.Conv2d(in_channels, last_channels, 1, bias=conv_shortcut_bias) if shortcut else None

    def forward(self, input_tensor: Tensor, temb: Tensor | None = None) -> Tensor:
        """``(B, C, H, W), (B, temb_channels) -> (B, C', H, W)``."""
        x = input_tensor
        act_fresh = fresh.version_of(self.nonlinearity)
        h = act_fresh(self.norm1(x))
        if self.resample is not None:
            x, h = self.resample(x), self.resample(h)
        h = self.conv1(h)
        scale = shift = None
        if self.time_emb_proj is not None and temb is not None:
            shift = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))[:, :, None, None]
            if self.scale_shift:
                scale, shift = shift.chunk(2, dim=1)
            else:
                h = fresh.add(h, shift)
        h = self.norm2(h)
        if scale is not None:
            h = h * (1 + scale) + shift
        h = self.conv2(self.dropout(act_fresh(h)))
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x)
        h = fresh.add(h, x)
        return h if self.output_scale_factor == 1.0 else h / self.output_scale_factor
