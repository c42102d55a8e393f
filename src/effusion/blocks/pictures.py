"""Single pictures: read them, lay them out as a grid, make them from arrays."""

from __future__ import annotations

import io
import os
import urllib.request
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from .images import Array, Picture, VaeImageProcessor


def pt_to_pil(images: torch.Tensor) -> list[Picture]:
    """``(B, C, H, W)`` in [-1, 1] to PIL."""
    return VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(VaeImageProcessor.denormalize(images)))


def numpy_to_pil(images: Array) -> list[Picture]:
    """``(B, H, W, C)`` or ``(H, W, C)`` in [0, 1] to PIL."""
    return VaeImageProcessor.numpy_to_pil(images)


def load_image(
    image: str | os.PathLike[str] | Picture, convert_method: Callable[[Picture], Picture] | None = None
) -> Picture:
    """A picture from a path, a URL or PIL, turned upright (EXIF) and converted to RGB.

    Args:
        convert_method: used instead of the conversion to RGB.

    Raises:
        ValueError: no such file, no picture in it, or something else than a path, URL or picture.
    """
    if not isinstance(image, Image.Image):
        if not isinstance(image, (str, os.PathLike)):
            raise ValueError(f"expected a path, a URL or a PIL image, got {type(image).__name__}")
        image = _open(str(image))
    upright = ImageOps.exif_transpose(image)
    return convert_method(upright) if convert_method is not None else upright.convert("RGB")


def _open(source: str) -> Picture:
    remote = source.startswith(("http://", "https://"))
    if not remote and not Path(source).is_file():
        raise ValueError(f"{source!r} is neither a file here nor a URL that starts with http:// or https://")
    try:
        return Image.open(io.BytesIO(read_url(source)) if remote else source)
    except UnidentifiedImageError as error:
        raise ValueError(f"{source} is not a picture of a format that Pillow reads") from error


def read_url(url: str) -> bytes:
    """What ``url`` answers; ``ValueError`` if it does not."""
    request = urllib.request.Request(url, headers={"User-Agent": "effusion"})  # some hosts refuse Python's own
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            data: bytes = answer.read()
            return data
    except OSError as error:  # no such host, refused, a status that is no success, too slow
        raise ValueError(f"{url} could not be read: {error}") from error


def make_image_grid(images: list[Picture], rows: int, cols: int, resize: int | None = None) -> Picture:
    """One RGB picture of ``rows`` x ``cols``, filled row by row; each scaled to ``resize`` squared if given."""
    if len(images) != rows * cols:
        raise ValueError(f"{len(images)} images can't fill {rows} rows of {cols}; give {rows * cols}")
    if resize is not None:
        images = [image.resize((resize, resize)) for image in images]
    width, height = images[0].size
    grid = Image.new("RGB", size=(cols * width, rows * height))
    for i, image in enumerate(images):
        grid.paste(image, box=(i % cols * width, i // cols * height))
    return grid
