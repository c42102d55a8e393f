"""What the pipelines are given: small pictures, masks, embeddings; the same in every test."""

from __future__ import annotations

import numpy as np
import PIL.Image
import torch


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tensor(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed))


def picture(size: int = 32, seed: int = 0) -> PIL.Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (size // 4, size // 4, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels).resize((size, size))


def mask(size: int = 32) -> PIL.Image.Image:
    pixels = np.zeros((size, size), dtype=np.uint8)
    pixels[size // 4 : size // 2, size // 4 : 3 * size // 4] = 255
    return PIL.Image.fromarray(pixels)
