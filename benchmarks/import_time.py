"""How long the imports take, in fresh processes."""

from __future__ import annotations

from . import harness

STATEMENTS = {
    "torch": "import torch",
    "effusion": "import torch, effusion",
    "diffusers": "import torch, diffusers",
    "ours": "from effusion import StableDiffusionPipeline, UNet2DConditionModel, DDIMScheduler",
    "peers": "from diffusers import StableDiffusionPipeline, UNet2DConditionModel, DDIMScheduler",
}


def measure(repeat: int) -> str:
    """Wall time of each statement, process start and end included."""
    runs = {name: lambda code=code: harness.child(code)["wall"] for name, code in STATEMENTS.items()}
    found = harness.alternate(repeat, **runs)
    more = {n: [a - b for a, b in zip(found[n], found["torch"], strict=True)] for n in ("effusion", "diffusers")}
    rows = [
        ["`import torch` alone", "", harness.median(found["torch"]), ""],
        [
            "`import` the library, beyond torch",
            harness.median(more["effusion"], 3),
            harness.median(more["diffusers"], 3),
            "",
        ],
        [
            "import a pipeline, a network, a scheduler",
            harness.median(found["ours"]),
            harness.median(found["peers"]),
            harness.ratio(found["ours"], found["peers"]),
        ],
    ]
    return harness.table(["", "Effusion", "peer", "ratio"], rows)


if __name__ == "__main__":
    harness.main("import_time", "Imports", measure, repeat=7)
