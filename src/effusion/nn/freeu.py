"""FreeU: Free Lunch in Diffusion U-Net (Si et al., 2023)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fft


@dataclass(frozen=True)
class FreeU:
    """Strengthens the features of the first two up blocks and weakens the low frequencies of their skips."""

    s1: float
    s2: float
    b1: float
    b2: float

    def __call__(self, x: Tensor, skip: Tensor, resolution_idx: int | None) -> tuple[Tensor, Tensor]:
        """Features and skip of the up block ``resolution_idx``, ``(B, C, H, W)`` both."""
        if resolution_idx not in (0, 1):
            return x, skip
        b, s = (self.b1, self.s1) if resolution_idx == 0 else (self.b2, self.s2)
        half = x.shape[1] // 2
        x = torch.cat([x[:, :half] * b, x[:, half:]], dim=1)
        return x, scale_low_frequencies(skip, s)


def scale_low_frequencies(x: Tensor, scale: float, radius: int = 1) -> Tensor:
    """``x (B, C, H, W)`` with the frequencies below ``radius`` multiplied by ``scale``."""
    # half precision transforms exist for powers of two only
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    spectrum = fft.fftshift(fft.fftn(wide, dim=(-2, -1)), dim=(-2, -1))
    row, column = x.shape[-2] // 2, x.shape[-1] // 2
    mask = torch.ones_like(wide)
    mask[..., row - radius : row + radius, column - radius : column + radius] = scale
    spectrum = fft.ifftshift(spectrum * mask, dim=(-2, -1))
    return fft.ifftn(spectrum, dim=(-2, -1)).real.to(x.dtype)
