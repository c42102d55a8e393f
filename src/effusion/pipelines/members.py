"""Components that are several networks, in folders side by side: ``controlnet``, ``controlnet_1``, ``controlnet_2``, …"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..core import hub, registry
from ..weights.prepare import LoadOptions, Several


def has_members(cls: Any) -> bool:
    return getattr(cls, "_member", None) is not None


def prepare_members(cls: Any, root: Path, options: LoadOptions) -> Several[Any]:
    """Networks without weights as one of class ``cls``; files are opened and checked only."""
    parts = [cls._member._prepare(folder, options) for folder in _folders(cls, root)]
    return Several.together(cls([part.model for part in parts]), parts)


def build_members(cls: Any, root: Path) -> Any:
    """The same from configurations alone."""
    return cls([cls._member.from_config(cls._member.load_config(folder)) for folder in _folders(cls, root)])


def folders_to_fetch(files: Iterable[str], index: Mapping[str, Any], parts: Sequence[str]) -> list[str]:
    """Of the folders in ``files``, the numbered ones of those ``parts`` that are several networks."""
    names = {part: str(index[part][1]) for part in parts}
    several = [p for p, name in names.items() if name.startswith("Multi") and name in registry.public_names()]
    pattern = re.compile(rf"({'|'.join(map(re.escape, several))})_\d+")
    there = {f.rpartition("/")[0] for f in files}
    return sorted(folder for folder in there if several and pattern.fullmatch(folder))


def _folders(cls: Any, root: Path) -> list[Path]:
    folders = [Path(folder) for folder in cls._folders(root)]
    for folder in folders:
        hub.check_inside(folder, root.parent)
    return folders
