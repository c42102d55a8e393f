"""Between feature maps and tokens: 1x1 convolutions that change the memory layout while they compute.

A feature map ``(B, C, H, W)`` lies in memory channel by channel, tokens ``(B, H * W, C)`` pixel by pixel.
A matrix product reads either and writes either, so the projections at the ends of a transformer need not
copy. Both modules are ordinary convolutions from outside: same weights, same shapes, same values.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def tokens(x: Tensor) -> Tensor:
    """``(B, C, H, W) -> (B, H * W, C)``: a view."""
    return x.flatten(2).transpose(1, 2)


def feature_map(x: Tensor, size: tuple[int, ...]) -> Tensor:
    """``(B, H * W, C) -> (B, C, H, W)``: a view."""
    return x.transpose(1, 2).unflatten(2, size)


class ConvToTokens(nn.Conv2d):
    """A 1x1 convolution whose result lies pixel by pixel in memory: :func:`tokens` of it are contiguous."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, input: Tensor) -> Tensor:
        """``(B, C, H, W) -> (B, C', H, W)``."""
        assert self.bias is not None
        weight = self.weight.flatten(1).t().expand(input.shape[0], -1, -1)  # (B, C, C')
        return feature_map(torch.baddbmm(self.bias, tokens(input), weight), input.shape[2:])


class ConvToFeatureMap(nn.Conv2d):
    """A 1x1 convolution whose result lies channel by channel in memory, whatever its input does."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, input: Tensor) -> Tensor:
        """``(B, C, H, W) -> (B, C', H, W)``."""
        assert self.bias is not None
        weight = self.weight.flatten(1).expand(input.shape[0], -1, -1)  # (B, C', C)
        return torch.baddbmm(self.bias[:, None], weight, input.flatten(2)).unflatten(2, input.shape[2:])
