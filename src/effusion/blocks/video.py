"""Pictures that move: frames to GIF and MP4 files."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence

import numpy as np

from ..core.optional import require
from .images import Array, Picture


def export_to_gif(image: list[Picture], output_gif_path: str | os.PathLike[str] | None = None, fps: int = 10) -> str:
    """Write PIL frames as an endless GIF; returns its path, a temporary one if none is given."""
    if not image:
        raise ValueError("no frames: a GIF needs at least one picture")
    path = str(output_gif_path) if output_gif_path is not None else _temporary(".gif")
    image[0].save(path, save_all=True, append_images=image[1:], optimize=False, duration=1000 // fps, loop=0)
    return path


def export_to_video(
    video_frames: Sequence[Picture] | Sequence[Array] | Array,
    output_video_path: str | os.PathLike[str] | None = None,
    fps: int = 10,
    quality: float = 5.0,
    bitrate: int | None = None,
    macro_block_size: int | None = 16,
) -> str:
    """Write frames as a video; returns its path, a temporary ``.mp4`` if none is given.

    Args:
        video_frames: PIL frames, or arrays ``(H, W, 3)`` in [0, 1].
        quality: 0 (smallest file) to 10 (best), without effect when ``bitrate`` (bits per second) is given.
        macro_block_size: sides are rounded up to a multiple of this.

    Raises:
        MissingExtra: ``imageio`` is not installed.
    """
    if not len(video_frames):
        raise ValueError("no frames: a video needs at least one picture")
    imageio = require("imageio", "export_to_video")
    path = str(output_video_path) if output_video_path is not None else _temporary(".mp4")
    options = {"fps": fps, "quality": quality, "bitrate": bitrate, "macro_block_size": macro_block_size}
    with imageio.get_writer(path, **options) as writer:
        for frame in video_frames:
            pixels = (frame * 255).astype(np.uint8) if isinstance(frame, np.ndarray) else np.asarray(frame)
            writer.append_data(pixels)
    return path


def _temporary(suffix: str) -> str:
    handle, path = tempfile.mkstemp(suffix=suffix)
    os.close(handle)
    return path
