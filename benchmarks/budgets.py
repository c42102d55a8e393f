"""A pipeline within eight budgets, from the least possible to everything resident: kept, fast, and faster with more.

Beside the chosen plan every other way to place the weights within the same budget is run: components in turn, blocks or
layers, one ahead or none, hoisted or not, each with as much kept as fits. A time is the least of some runs, in a turning order.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import small
from .harness import ROOT, child, main, table

FAMILIES = ("SDXL", "FLUX.1")
SIZE, STEPS, BUDGETS = 128, 3, 8

CODE = """
import sys, time
sys.path.insert(0, root)
import torch
from benchmarks.budgets import budgets, candidates
import effusion
pipe = effusion.DiffusionPipeline.from_pretrained(folder)
pipe.set_progress_bar_config(disable=True)
call = {"height": size, "width": size, "num_inference_steps": steps, "device": "cpu"}
def run(plan):
    pipe.apply(plan)
    seconds, peak = [], 0
    for _ in range(2):  # the table of what is hoisted is made in the first
        start = time.perf_counter()
        out = pipe("a cat", height=size, width=size, num_inference_steps=steps, output_type="pt",
                   generator=torch.Generator().manual_seed(0)).images
        seconds.append(time.perf_counter() - start)
        peak = max(peak, pipe.memory_report().peak)
    return seconds[0], peak, out
pipe.fit("64GB", **call)
wanted = run(pipe.plan("64GB", **call))[2]
rows = []
for budget in budgets(pipe, call):
    chosen = pipe.plan(budget, **call)
    ways = {"chosen": chosen, **{name: made for name, made in candidates(pipe, call, budget) if made.rows != chosen.rows}}
    times, peaks, same = {name: [] for name in ways}, {}, True
    order = list(ways)
    for turn in range(repeat):
        for name in order[-turn:] + order[:-turn]:  # nobody is always first
            took, peaks[name], out = run(ways[name])
            times[name].append(took)
            same = same and torch.equal(out, wanted)
    rows.append({"budget": budget, "peak": peaks["chosen"], "predicted": chosen.peak, "same": same,
                 "seconds": chosen.seconds, "times": {name: min(took) for name, took in times.items()}})
report(rows=rows)
"""


def budgets(pipe: Any, call: dict[str, Any]) -> list[int]:
    """From the least possible to what takes everything, evenly."""
    most = pipe.plan("64GB", **call).peak
    choices = _choices(pipe, call)
    least = choices.least("exact")
    return [least + (most - least) * i // (BUDGETS - 1) for i in range(BUDGETS)]


def _choices(pipe: Any, call: dict[str, Any]) -> Any:
    import torch

    from effusion.placement.pipeline_choices import Choices

    asked = {"num_frames": None, "batch_size": 1, **{k: v for k, v in call.items() if k != "device"}}
    return Choices(pipe, pipe.modules, asked, torch.device("cpu"))


def candidates(pipe: Any, call: dict[str, Any], budget: int) -> Iterator[tuple[str, Any]]:
    """Every way within ``budget``, by name."""
    from effusion.placement import planner

    choices, asked = _choices(pipe, call), pipe.plan(budget, **call).call
    for switches, parts in choices.ways("exact"):
        speed = choices.speed(parts, budget, budget)
        for level, ahead in (("component", 0), ("block", 1), ("block", 0), ("leaf", 1), ("leaf", 0)):
            chosen = [_most(part, level, ahead, budget - part.needed, speed) for part in parts]
            if None in chosen:
                continue
            made = planner.build(parts, planner.Choice((False,) * len(parts), tuple(chosen), 0), budget, None, "cpu")
            name = f"{level}, {ahead} ahead{', hoisted' if switches.get('hoist') else ''}"
            yield name, made.replace(switches={**switches, "exact_pages": True}, call=asked)


def _most(part: Any, level: str, ahead: int, room: int, speed: Any) -> Any:
    """The option of ``part`` at ``level`` that keeps most within ``room``; all of it where that fits."""
    from effusion.placement import planner

    ways = [planner.whole(part, speed)]
    if level != "component" and ways[0].need > room:
        ways = list(planner.partly(part, level, part.leaves if level == "leaf" else part.blocks, ahead, speed))
    fitting = [way for way in ways if way.need <= room]
    return max(fitting, key=lambda way: way.weights, default=None)


def measure(repeat: int) -> str:
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for family in FAMILIES:
            folder = small.save(family, Path(name))
            found = child(CODE, folder=str(folder), root=str(ROOT), size=SIZE, steps=STEPS, repeat=repeat)["rows"]
            for at in found:
                mine = at["times"].pop("chosen")
                best = min(at["times"], key=at["times"].get, default=None)
                others = f"{at['times'][best]:.2f} s ({best})" if best else "–"
                kept = "yes" if at["peak"] <= at["budget"] else "**no**"
                sizes = [f"{at[key] / 1e6:.0f} MB" for key in ("budget", "predicted", "peak")]
                factor = f"**{mine / min([mine, *at['times'].values()]):.2f}x**"
                bits = "yes" if at["same"] else "**no**"
                rows.append([family, *sizes, kept, f"{at['seconds']:.2f} s", f"{mine:.2f} s", others, factor, bits])
    head = [
        "family",
        "budget",
        "predicted",
        "measured",
        "kept",
        "predicted",
        "measured",
        "best other",
        "to the best",
        "same bits",
    ]
    return f"{SIZE}x{SIZE}, {STEPS} steps, float32; files in the system's cache.\n\n{table(head, rows)}"


if __name__ == "__main__":
    main("budgets", "Eight budgets", measure, repeat=3)
