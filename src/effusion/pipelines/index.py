"""``model_index.json``: which components a pipeline in a folder has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..core.config import read_json
from ..core.errors import CheckpointError, MissingFile

INDEX = "model_index.json"


def read_index(folder: Path) -> dict[str, Any]:
    """``model_index.json`` of ``folder``, checked: component names are plain, entries are [library, class]."""
    path = folder / INDEX
    if not path.is_file():
        hint = (
            "a single network is loaded with `AutoModel.from_pretrained`" if (folder / "config.json").is_file() else ""
        )
        raise MissingFile(f"{folder} has no {INDEX}, so it is no pipeline" + (f"; {hint}" if hint else ""))
    index = read_json(path)
    for name, value in index.items():
        if not name.startswith("_") and isinstance(value, list) and len(value) == 2:
            if not name.isidentifier():
                raise CheckpointError(f"{path}: {name!r} can't be the name of a component")
            if value != [None, None] and not all(isinstance(part, str) for part in value):
                raise CheckpointError(f"{path}: component {name!r} must be [library, class], not {value!r}")
    return index


def present(index: dict[str, Any]) -> list[str]:
    """The names of the components that ``index`` lists with a class."""
    return [
        name
        for name, value in index.items()
        if not name.startswith("_") and isinstance(value, list) and len(value) == 2 and value[1] is not None
    ]
