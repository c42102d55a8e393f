"""Prints the table of what works, read off the library itself; with ``--write`` puts it into the README.

A family is listed with the tasks that have a class of their own.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from pathlib import Path

import effusion
from effusion.core import registry

README = Path(__file__).resolve().parents[1] / "README.md"
MARK = re.compile(r"(<!-- facts -->\n).*?(<!-- /facts -->)", re.DOTALL)
TASKS = {"text2image": "text to image", "image2image": "image to image", "inpaint": "inpaint"}


def faces() -> dict[str, dict[str, list[str]]]:
    """Family -> task -> the classic classes that do it."""
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in registry.names_under("effusion.pipelines"):
        face = getattr(effusion, name)
        if isinstance(face, type) and issubclass(face, effusion.DiffusionPipeline) and "family" in dir(face):
            found[face.family.name][face.task].append(name)
    return found


def table() -> str:
    """A row per family, then how many networks and schedulers there are."""
    lines = [f"| family | {' | '.join(TASKS.values())} | more |", "|---" * (len(TASKS) + 2) + "|"]
    for family, tasks in sorted(faces().items()):
        more = [name for task, names in tasks.items() if task not in TASKS for name in names]
        cells = [*(tasks.get(task, []) for task in TASKS), more]
        lines.append(f"| {family} | " + " | ".join("<br>".join(f"`{n}`" for n in sorted(c)) for c in cells) + " |")
    networks = subclasses("effusion.models", effusion.ModelMixin)
    schedulers = subclasses("effusion.schedulers", effusion.SchedulerMixin)
    lines += ["", f"Beside these, {len(networks)} networks and {len(schedulers)} schedulers under their usual names."]
    return "\n".join(lines) + "\n"


def subclasses(package: str, base: type) -> list[str]:
    """The public names in ``package`` that are classes derived from ``base``."""
    found = {name: getattr(effusion, name) for name in registry.names_under(package)}
    return [name for name, c in found.items() if isinstance(c, type) and issubclass(c, base) and c is not base]


if __name__ == "__main__":
    text = table()
    print(text)
    if "--write" in sys.argv[1:]:
        README.write_text(MARK.sub(lambda m: m[1] + text + m[2], README.read_text(encoding="utf-8")), encoding="utf-8")
