"""Predicted and measured peak of memory on the CPU: families x ways to place weights x sizes, a fresh process per row.

The process warms up with one picture (libraries page themselves in), then makes one under a plan for each column that
does exactly what the column says. Measured is what the process holds above the level before the call: memory of its own and pages
of mapped files, to the page, by the kernel's own high-water mark.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from . import small
from .harness import ROOT, child, main, table

SIZES = (256, 384)
POLICIES = ("resident", "components", "blocks", "blocks ahead", "layers", "half kept")

CODE = """
import sys
sys.path.insert(0, root)
import torch
from benchmarks.forecast import forced
import effusion
pipe = effusion.DiffusionPipeline.from_pretrained(folder)
pipe.set_progress_bar_config(disable=True)
def run(policy):
    plan = forced(pipe, policy, size)
    pipe.apply(plan)
    pipe(prompt="a cat", height=size, width=size, num_inference_steps=2, generator=torch.Generator().manual_seed(0))
    return plan.peak, pipe.memory_report().peak
run("layers")
report(cells={policy: run(policy) for policy in policies})
"""


def forced(pipe: Any, policy: str, size: int, steps: int = 2) -> Any:
    """The plan of ``pipe`` that places weights as ``policy`` says, whatever the budget."""
    import torch

    from effusion.placement import planner
    from effusion.placement.pipeline_choices import Choices

    call = {"height": size, "width": size, "num_frames": None, "batch_size": 1, "num_inference_steps": steps}
    choices = Choices(pipe, pipe.modules, call, torch.device("cpu"))
    parts = choices.expected({}).parts()
    speed = choices.speed(parts, 0, 0)
    stays = (policy == "resident",) * len(parts)
    resident = sum(p.cost for p in parts) if policy == "resident" else 0
    chosen = tuple(option(part, policy, speed) for part in parts)
    made = planner.build(parts, planner.Choice(stays, chosen, resident), None, None, "cpu")
    return made.replace(switches={"exact_pages": True}, call={**call, **choices.size}, budget=made.peak)


def option(part: Any, policy: str, speed: Any) -> Any:
    from effusion.placement import planner

    if policy == "resident":
        return planner.staying(part, speed)
    if policy == "components":
        return planner.whole(part, speed)
    level, pieces = ("leaf", part.leaves) if policy == "layers" else ("block", part.blocks)
    ways = list(planner.partly(part, level, pieces, int(policy in ("blocks ahead", "half kept")), speed))
    return ways[len(ways) // 2 if policy == "half kept" else 0] if ways else planner.whole(part, speed)


def row(folder: Path, size: int) -> dict[str, tuple[int, int]]:
    """Predicted and measured peak for each policy."""
    cells: dict[str, tuple[int, int]] = child(CODE, folder=str(folder), policies=POLICIES, size=size, root=str(ROOT))[
        "cells"
    ]
    return cells


def measure(repeat: int) -> str:
    rows, ratios = [], []
    with tempfile.TemporaryDirectory() as name:
        for family in small.MAKERS:
            folder = small.save(family, Path(name))
            for size in SIZES:
                line = [family, f"{size}x{size}"]
                for predicted, measured in row(folder, size).values():
                    ratios.append(predicted / measured)
                    line.append(f"{measured / 1e6:.0f} MB, {ratios[-1]:.3f}x")
                rows.append(line)
    text = table(["family", "size", *POLICIES], rows)
    return (
        f"{text}\n\nMeasured peak, and predicted / measured: {min(ratios):.3f} to {max(ratios):.3f} over "
        f"{len(ratios)} cells."
    )


if __name__ == "__main__":
    main("forecast", "Forecast of the peak on the CPU", measure, repeat=1)
