"""The memory that loading takes, measured in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from effusion.core.config import register_to_config
from effusion.models.base import ModelMixin

LAYERS, WIDTH = 16, 1024  # 16 tensors of 4 MiB in float32
TENSOR = WIDTH * WIDTH * 4
SLACK = 12 << 20  # allocator, page tables, Python

SCRIPT = """
import json, sys, threading, time
import torch
sys.path.insert(0, {tests!r})
from tests.loading.test_memory import Wide

def resident():
    with open("/proc/self/status") as status:
        fields = dict(line.split(":", 1) for line in status)
    return [int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile")]

def measure(name, options, touch):
    before, peak, going = resident(), [0, 0], True

    def watch():
        while going:
            peak[:] = map(max, peak, resident())
            time.sleep(0.0005)

    thread = threading.Thread(target=watch)
    thread.start()
    model = Wide.from_pretrained(f"{folder}/{{name}}", **options)
    if touch:
        sum(float(p.sum()) for p in model.parameters())
    peak[:] = map(max, peak, resident())
    going = False
    thread.join()
    return [high - low for high, low in zip(peak, before)]

measure("warm", {{}}, True)
print(json.dumps([measure(*case) for case in {cases}]))
"""
# (folder, options, whether the weights are read afterwards)
CASES = {
    "as stored": "('full', {'torch_dtype': torch.float32}, False)",
    "used": "('full', {}, True)",
    "half to float": "('half', {'torch_dtype': torch.float32}, False)",
    "float to half": "('full', {'torch_dtype': torch.float16}, False)",
    "read": "('full', {'disable_mmap': True}, False)",
}


class Wide(ModelMixin):
    """Enough bytes to be measured."""

    @register_to_config
    def __init__(self, layers: int = LAYERS, width: int = WIDTH) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(width, width, bias=False) for _ in range(layers))


@pytest.fixture(scope="module")
def growth(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, int]]:
    """Peak growth of (private memory, mapped file pages) in bytes, for each case."""
    folder = tmp_path_factory.mktemp("wide")
    model = Wide()
    model.save_pretrained(folder / "full")
    model.half().save_pretrained(folder / "half")
    Wide(1, 8).save_pretrained(folder / "warm")
    root, cases = str(Path(__file__).parents[2]), f"[{', '.join(CASES.values())}]"
    script = SCRIPT.format(tests=root, folder=folder, cases=cases)
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}  # freed tensors go back to the system at once
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    return {case: (a, b) for case, (a, b) in zip(CASES, json.loads(done.stdout), strict=True)}


Growth = dict[str, tuple[int, int]]


def test_loading_as_stored_costs_nothing_until_it_is_read(growth: Growth) -> None:
    private, mapped = growth["as stored"]
    assert private < SLACK
    assert mapped < LAYERS * TENSOR / 4


def test_using_what_was_loaded_makes_no_private_copy(growth: Growth) -> None:
    private, mapped = growth["used"]
    assert private < SLACK
    assert mapped > LAYERS * TENSOR * 0.9


@pytest.mark.parametrize(("case", "size"), [("half to float", TENSOR), ("float to half", TENSOR // 2)])
def test_converting_takes_the_weights_and_one_tensor(growth: Growth, case: str, size: int) -> None:
    private, mapped = growth[case]
    weights = LAYERS * size
    assert weights * 0.9 < private < weights + TENSOR + SLACK
    assert mapped < 2 * TENSOR + SLACK


def test_reading_instead_of_mapping_takes_the_weights_once(growth: Growth) -> None:
    private, mapped = growth["read"]
    assert private < LAYERS * TENSOR + SLACK
    assert mapped < SLACK
