"""Frames to files."""

from __future__ import annotations

import sys
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from effusion.blocks.video import export_to_gif, export_to_video
from effusion.core.errors import MissingExtra

FRAMES = [Image.new("RGB", (16, 8), color) for color in ("red", "lime", "blue")]


def test_a_gif_has_the_frames(tmp_path) -> None:
    path = export_to_gif(FRAMES, str(tmp_path / "x.gif"), fps=5)
    with Image.open(path) as gif:
        assert (gif.n_frames, gif.size, gif.info["duration"], gif.info["loop"]) == (3, (16, 8), 200, 0)
        gif.seek(2)
        assert gif.convert("RGB").getpixel((0, 0)) == (0, 0, 255)


def test_without_a_path_a_temporary_one_is_made() -> None:
    assert export_to_gif(FRAMES).endswith(".gif")


@pytest.fixture
def written(monkeypatch):
    """Stands in for imageio; the frames that were written and the options."""
    found = {"frames": []}

    class Writer:
        def __enter__(self):
            return self

        def __exit__(self, *args):
            return None

        def append_data(self, pixels):
            found["frames"].append(pixels)

    def get_writer(path, **options):
        found.update(path=path, options=options)
        return Writer()

    module = ModuleType("imageio")
    module.get_writer = get_writer
    monkeypatch.setitem(sys.modules, "imageio", module)
    return found


@pytest.mark.parametrize("kind", ["pil", "list", "array"])
def test_a_video_gets_bytes(written, kind, tmp_path) -> None:
    arrays = [np.asarray(frame).astype(np.float32) / 255 for frame in FRAMES]
    frames = {"pil": FRAMES, "list": arrays, "array": np.stack(arrays)}[kind]
    assert export_to_video(frames, str(tmp_path / "x.mp4"), fps=8) == str(tmp_path / "x.mp4")
    assert written["options"]["fps"] == 8
    assert all(np.array_equal(a, np.asarray(b)) for a, b in zip(written["frames"], FRAMES, strict=True))
    assert {a.dtype for a in written["frames"]} == {np.dtype("uint8")}


def test_the_extra_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "imageio", None)
    with pytest.raises(MissingExtra, match=r"effusion\[video\]"):
        export_to_video(FRAMES)


@pytest.mark.parametrize("export", [export_to_gif, export_to_video])
def test_no_frames_are_refused(export) -> None:
    with pytest.raises(ValueError, match="no frames"):
        export([])
