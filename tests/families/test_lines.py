"""A family is a record that is read on two screens, a network not much more."""

from __future__ import annotations

from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "effusion"


@pytest.mark.parametrize(("room", "most"), [("families", 200), ("models", 500)])
def test_files_are_short(room: str, most: int) -> None:
    lengths = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in (SOURCE / room).glob("*.py")}
    assert {name: n for name, n in lengths.items() if n > most} == {}


def test_no_pipeline_file_per_task() -> None:
    """A file of faces holds all tasks of a family, or those with control networks."""
    names = [path.stem for path in (SOURCE / "pipelines").glob("*.py")]
    assert not [name for name in names if any(task in name for task in ("img2img", "image2image", "inpaint"))]
