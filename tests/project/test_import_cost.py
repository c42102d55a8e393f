"""``import effusion`` costs torch and next to nothing more, and loads nothing optional."""

from __future__ import annotations

import json
import subprocess
import sys

FORBIDDEN = ("transformers", "peft", "accelerate", "diffusers", "torch._dynamo", "huggingface_hub", "PIL", "scipy")
LIMIT = 0.2  # seconds more than `import torch`

PROBE = """
import json, sys, time
import torch
after_torch = set(sys.modules)
start = time.perf_counter()
{statement}
seconds = time.perf_counter() - start
print(json.dumps([seconds, sorted(set(sys.modules) - after_torch), sorted(sys.modules)]))
"""


def probe(statement: str) -> tuple[float, list[str], list[str]]:
    """Seconds that ``statement`` takes after ``import torch``, the modules that it loads, all modules then loaded."""
    run = subprocess.run(
        [sys.executable, "-c", PROBE.format(statement=statement)], capture_output=True, text=True, check=True
    )
    seconds, new, everything = json.loads(run.stdout.splitlines()[-1])
    return seconds, new, everything


def loaded(modules: list[str]) -> list[str]:
    return [name for name in FORBIDDEN if any(m == name or m.startswith(name + ".") for m in modules)]


def test_import_loads_nothing_optional() -> None:
    bare = subprocess.run(
        [sys.executable, "-c", "import effusion, sys, json; print(json.dumps(sorted(sys.modules)))"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert loaded(json.loads(bare.stdout)) == []


def test_import_costs_little_more_than_torch() -> None:
    seconds = min(probe("import effusion")[0] for _ in range(3))
    assert seconds < LIMIT


def test_only_the_ground_floor_is_imported() -> None:
    rooms = {name.split(".")[1] for name in probe("import effusion")[1] if name.startswith("effusion.")}
    assert rooms == {"core"}


def test_a_network_costs_no_optional_package() -> None:
    _, _, everything = probe("from effusion import UNet2DConditionModel")
    assert [m for m in loaded(everything) if m in ("transformers", "peft", "accelerate", "diffusers")] == []
