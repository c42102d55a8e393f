"""How long the imports take, in fresh processes."""

from __future__ import annotations

from . import harness

BEYOND_TORCH = """
import importlib, time
import torch
start = time.perf_counter()
importlib.import_module(name)
report(beyond=time.perf_counter() - start)
"""
NAMES = """
import importlib
library = importlib.import_module(name)
library.StableDiffusionPipeline, library.UNet2DConditionModel, library.DDIMScheduler
"""
TORCH = "import torch"


def measure(repeat: int) -> str:
    """Seconds beyond torch inside the process; wall time of whole processes otherwise."""
    libraries = (harness.OURS, harness.PEER)
    beyond = harness.alternate(
        repeat, **{n: lambda n=n: harness.child(BEYOND_TORCH, name=n)["beyond"] for n in libraries}
    )
    whole = harness.alternate(
        repeat,
        torch=lambda: harness.child(TORCH)["wall"],
        **{n: lambda n=n: harness.child(NAMES, name=n)["wall"] for n in libraries},
    )
    rows = []
    for label, found, digits in (
        ("`import` the library, beyond torch", beyond, 3),
        ("a process that imports a pipeline, a network and a scheduler", whole, 2),
    ):
        ours, peers = found[harness.OURS], found[harness.PEER]
        columns = [harness.median(ours, digits), harness.median(peers, digits), harness.ratio(ours, peers)]
        rows.append([label, *columns])
    text = harness.table(["", "Effusion", "peer", "ratio"], rows)
    return f"{text}\n\nA process that imports torch alone takes {harness.median(whole['torch'])}."


if __name__ == "__main__":
    harness.main("import_time", "Imports", measure, repeat=7)
