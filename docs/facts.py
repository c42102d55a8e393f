"""Prints the table of what works, read off the library itself, and the figures that the benchmarks' page leads with; with
``--write`` puts them into the README.

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
BENCHMARKS = Path(__file__).with_name("benchmarks.md")
HEADLINES = {  # section of the page -> beginnings of its rows
    "import_time": ("`import` the library",),
    "cold_start": ("start to picture",),
    "loading": ("float32 file as float32: wall |", "float16 file as float32: peak, every weight read once"),
    "schedulers": ("**all but 2**",),
    "gguf_linear": ("Q4_K, 3072 to 12288, bfloat16", "Q8_0, 3072 to 12288, bfloat16"),
    "transformer_forward": ("FLUX.1",),
}
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


def measured() -> str:
    """The rows of :data:`HEADLINES`: what, ours, the peer's, ratio."""
    page = BENCHMARKS.read_text(encoding="utf-8")
    lines = ["| | Effusion | peer | ratio |", "|---|---|---|---|"]
    for section, starts in HEADLINES.items():
        body = page.partition(f"<!-- {section} -->")[2].partition(f"<!-- /{section} -->")[0]
        title = body.partition("## ")[2].partition("\n")[0]
        for row in (r for r in body.splitlines() if r.startswith(tuple(f"| {s}" for s in starts))):
            what, ours, peers, ratio = (cell.strip() for cell in row.strip("| ").split(" | ")[:4])
            lines.append(f"| {title}: {what} | {ours} | {peers} | {ratio} |")
    return "\n".join(lines) + "\n"


def put(text: str, mark: str, page: str) -> str:
    """``page`` with ``text`` between its marks."""
    between = re.compile(rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)", re.DOTALL)
    return between.sub(lambda m: m[1] + text + m[2], page)


def subclasses(package: str, base: type) -> list[str]:
    """The public names in ``package`` that are classes derived from ``base``."""
    found = {name: getattr(effusion, name) for name in registry.names_under(package)}
    return [name for name, c in found.items() if isinstance(c, type) and issubclass(c, base) and c is not base]


if __name__ == "__main__":
    facts, figures = table(), measured()
    print(facts, figures, sep="\n")
    if "--write" in sys.argv[1:]:
        page = put(figures, "measured", put(facts, "facts", README.read_text(encoding="utf-8")))
        README.write_text(page, encoding="utf-8")
