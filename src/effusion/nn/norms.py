"""Normalisations: RMSNorm, which has no mean, and group norm steered by a feature map."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """Root mean square normalisation (Zhang & Sennrich, 2019) over the last dimension, in float32 at least."""

    def __init__(self, dim: int, eps: float, elementwise_affine: bool = True) -> None:
        super().__init__(dim, eps=eps, elementwise_affine=elementwise_affine)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)  # type: ignore[arg-type]


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension; ``(…, D) -> (…, D)``."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or torch.compiler.is_compiling():
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    # On the CPU that is four passes over memory; this is one that only reads, and two that write one buffer.
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    scale = torch.rsqrt(norm.square() / x.shape[-1] + eps)
    return x * scale if weight is None else (x * weight).mul_(scale)


class SpatialNorm(nn.Module):
    """Group norm whose scale and shift come from a feature map, pixel by pixel (Zheng et al., 2022).

    ``forward(f, zq)`` with ``(B, f_channels, H, W)`` and ``(B, zq_channels, h, w)`` gives the shape of ``f``.
    """

    def __init__(self, f_channels: int, zq_channels: int) -> None:
        super().__init__()
        self.norm_layer = nn.GroupNorm(num_channels=f_channels, num_groups=32, eps=1e-6)
        self.conv_y = nn.Conv2d(zq_channels, f_channels, kernel_size=1)
        self.conv_b = nn.Conv2d(zq_channels, f_channels, kernel_size=1)

    def forward(self, f: Tensor, zq: Tensor) -> Tensor:
        zq = F.interpolate(zq, size=f.shape[-2:], mode="nearest")
        return self.norm_layer(f) * self.conv_y(zq) + self.conv_b(zq)  # type: ignore[no-any-return]
