"""How long planning takes: pipelines of published sizes, their weights files of nothing but a header.

Each in a fresh process, libraries imported, rates of the machine known. ``effusion plan`` is the command, from its start.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

from . import harness, published

BUDGET, SIZE = "12GB", 1024
AIM = 3.0  # seconds

LOADED = """
import time, torch, effusion
from effusion.placement.rates import rates
from transformers import CLIPTextModel, T5EncoderModel
rates("cpu")
pipe = effusion.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
start = time.perf_counter()
plan = pipe.plan(budget, height=size, width=size)
first = time.perf_counter() - start
start = time.perf_counter()
pipe.plan(budget, height=size, width=size)
report(first=first, again=time.perf_counter() - start, rows=len(plan.rows))
"""
COMMAND = """
from effusion.cli.main import main
raise SystemExit(main(["plan", folder, "--memory", budget, "--size", str(size), "--dtype", "bfloat16"]))
"""


def measure(repeat: int) -> str:
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for family in published.PIPELINES:
            given = {"folder": str(published.save(family, Path(name))), "budget": BUDGET, "size": SIZE}
            loaded = [harness.child(LOADED, **given) for _ in range(repeat)]
            command = [harness.child(COMMAND, **given)["wall"] for _ in range(repeat)]
            first, again = ([run[key] for run in loaded] for key in ("first", "again"))
            rows.append(
                [
                    family,
                    str(loaded[0]["rows"]),
                    f"**{statistics.median(first):.2f} s**",
                    harness.median(again),
                    harness.median(command),
                ]
            )
    head = ["family", "units", f"`pipe.plan`, first (aim: <= {AIM:.0f} s)", "again", "`effusion plan`, with imports"]
    return f"{SIZE}x{SIZE} pixels, {BUDGET}, bfloat16, on the CPU.\n\n{harness.table(head, rows)}"


if __name__ == "__main__":
    harness.main("planning", "Time to plan", measure, repeat=3)
