"""The invisible watermark of Stable Diffusion XL, made by the package ``invisible-watermark``."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from ..core.optional import require

MESSAGE = 0b101100111110110010010000011110111011000110011110  # the 48 bits that the model's authors mark pictures with
SMALLEST = 256  # pixels along a row, below which the method can't write


class StableDiffusionXLWatermarker:
    """Writes :data:`MESSAGE` into the wavelet and cosine coefficients of pictures, where it can't be seen.

    Raises:
        MissingExtra: the package is not installed.
    """

    def __init__(self) -> None:
        self.watermark = [int(bit) for bit in f"{MESSAGE:b}"]
        self.encoder = require("imwatermark", "`add_watermarker`").WatermarkEncoder()
        self.encoder.set_watermark("bits", self.watermark)

    def apply_watermark(self, images: Tensor) -> Tensor:
        """Pictures in [-1, 1], marked; (B, 3, H, W) both. Small ones are returned as they are."""
        if images.shape[-1] < SMALLEST:
            return images
        pixels = (255 * (images / 2 + 0.5)).cpu().permute(0, 2, 3, 1).float().numpy()  # (B, H, W, RGB)
        marked = [self.encoder.encode(picture[..., ::-1], "dwtDct")[..., ::-1] for picture in pixels]  # it reads BGR
        back = torch.from_numpy(np.stack(marked)).permute(0, 3, 1, 2)
        return (2 * (back / 255 - 0.5)).clamp(-1, 1)


@cache
def watermarker() -> StableDiffusionXLWatermarker:
    """The one of this process."""
    return StableDiffusionXLWatermarker()
