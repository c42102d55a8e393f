"""Pictures that move: frames to GIF and MP4 files, and back."""

from __future__ import annotations

import io
import os
import tempfile
import urllib.parse
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageSequence

from ..core.optional import require
from .images import Array, Picture
from .pictures import read_url


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


def load_video(
    video: str | os.PathLike[str],
    convert_method: Callable[[list[Picture]], list[Picture]] | None = None,
    return_fps: bool = False,
) -> list[Picture] | tuple[list[Picture], float]:
    """The frames of a GIF or video file, or of one at a URL.

    Args:
        convert_method: applied to the list of frames.
        return_fps: return ``(frames, frames per second)``.

    Raises:
        ValueError: nothing there, or no frame rate in it that could be returned.
        MissingExtra: for anything but a GIF, ``imageio`` is not installed.
    """
    source = str(video)
    remote = source.startswith(("http://", "https://"))
    if not remote and not os.path.isfile(source):
        raise ValueError(f"{source!r} is neither a file here nor a URL that starts with http:// or https://")
    data = io.BytesIO(read_url(source)) if remote else source
    ending = os.path.splitext(urllib.parse.urlparse(source).path if remote else source)[1] or ".mp4"
    frames, fps = _gif(data) if ending.lower() == ".gif" else _video(data, ending)
    if convert_method is not None:
        frames = convert_method(frames)
    if return_fps and fps is None:
        raise ValueError(f"{source} says no frame rate: leave `return_fps` out")
    return (frames, fps) if return_fps and fps is not None else frames


def _gif(data: io.BytesIO | str) -> tuple[list[Picture], float | None]:
    with Image.open(data) as gif:
        duration = gif.info.get("duration")  # milliseconds for each frame, if it says
        return [frame.copy() for frame in ImageSequence.Iterator(gif)], 1000 / duration if duration else None


def _video(data: io.BytesIO | str, ending: str) -> tuple[list[Picture], float | None]:
    imageio = require("imageio", "load_video")
    where = {} if isinstance(data, str) else {"format": ending}
    with imageio.get_reader(data, **where) as reader:
        return [Image.fromarray(frame) for frame in reader], reader.get_meta_data().get("fps")
