"""Floor 6: the demo model, its data, training and score."""

from __future__ import annotations

from pathlib import Path


def path() -> Path:
    """The folder of the demo model that ships with the package: a pipeline of the ordinary format.

    Raises:
        FileNotFoundError: this installation came without it.
    """
    folder = Path(__file__).with_name("model")
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"{folder}: the demo model is missing from this installation; reinstall, or train it: docs/demo-model.md"
        )
    return folder
