"""Plan, run, compare, for each family: the peak is as predicted, the budget is kept, the picture is the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from effusion.placement.forecast import Speed, part_of, seconds
from effusion.placement.rehearsal import Rehearsed, rehearse
from effusion.placement.sources import Mappings
from effusion.placement.workspaces import workspace

from .parts import part

ROOT = Path(__file__).parents[2]
FAMILIES = ("Stable Diffusion", "SDXL", "SD 3", "FLUX.1", "PixArt-Sigma")
CHILD = """
import gc, json, sys, tempfile
from pathlib import Path
import torch
import effusion
from benchmarks import small
from effusion.placement import planner
results = {}
with tempfile.TemporaryDirectory() as folder:
    for family in sys.argv[1:]:
        pipe = effusion.DiffusionPipeline.from_pretrained(small.save(family, Path(folder), 16))
        pipe.set_progress_bar_config(disable=True)
        def run():
            g = torch.Generator().manual_seed(0)
            return pipe("a cat", height=192, width=192, num_inference_steps=2, generator=g, output_type="pt").images
        call = {"height": 192, "width": 192, "num_inference_steps": 2, "device": "cpu"}
        pipe.fit(pipe.plan("4GB", **call).peak, **call)
        run()  # libraries are in memory then, and all shapes were met
        gc.collect()  # what made the files
        everything = pipe.plan("4GB", **call)
        budget = everything.peak
        results[family] = []
        pictures = []
        for share in (1.0, 0.8, 0.0):
            least = max(s.peak - s.weights - s.ring for s in everything.stages) + (12 << 20)
            plan = pipe.fit(int(least + share * (budget - least)), **call)
            pictures.append(run())
            report = pipe.memory_report()
            results[family].append([plan.budget, plan.peak, report.peak, any(r.travels for r in plan.rows)])
        pipe.remove_all_hooks()
        wanted = run()
        for row, picture in zip(results[family], pictures):
            row.append(torch.equal(picture, wanted))
print("RESULTS", json.dumps(results))
"""


@pytest.fixture(scope="session")
def results() -> dict[str, list[list[Any]]]:
    """A process of its own: what others leave in memory is none of its business."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", CHILD, *FAMILIES], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, list[list[Any]]] = json.loads(done.stdout.rpartition("RESULTS")[2])
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_runs_in_less(family: str, results: dict[str, list[list[Any]]]) -> None:
    for budget, predicted, _, _, same in results[family]:
        assert same, "another picture than with everything resident"
        assert predicted <= budget
    assert results[family][-1][3], "the smallest budget streams nothing"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_peaks_as_predicted(family: str, results: dict[str, list[list[Any]]]) -> None:
    for _, predicted, measured, _, _ in results[family]:
        assert measured <= 1.02 * predicted, "the forecast is too low"
        assert predicted <= 1.1 * measured, "the forecast is too high"


# -- what it is made of ------------------------------------------------------------------------------------


def _rehearsed(module: nn.Module, *inputs: torch.Tensor) -> Rehearsed:
    return rehearse({"net": module}, lambda: module(*inputs), torch.device("cpu"))["net"]


def test_activations_are_what_is_alive_at_once() -> None:
    chain = nn.Sequential(*[nn.ReLU() for _ in range(5)])
    found = _rehearsed(chain, torch.zeros(1000, 1000))
    assert found.activations == 3 * 4_000_000  # the input, which the caller holds; one layer's input and its output
    assert found.workspaces == 0 and not found.failure


def test_only_rows_that_are_read_of_a_table_count() -> None:
    table = nn.Embedding(100_000, 64)
    found = _rehearsed(table, torch.zeros(1, 7, dtype=torch.long))
    assert 7 * 256 <= found.touched["weight"] < table.weight.nbytes // 10
    used = part_of("text", table, found, 1, torch.device("cpu"))
    assert used.cost < used.nbytes // 10
    there = part_of("text", table, found, 1, torch.device("cuda:0")).cost
    assert used.nbytes <= there <= used.nbytes + (1 << 20), "what the allocator leaves with it"


def test_weights_that_are_not_used_are_not_counted() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(100, 100), nn.Linear(100, 100)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    found = part_of("net", half := Half(), _rehearsed(half, torch.zeros(1, 100)), 1, torch.device("cpu"))
    assert found.cost == found.nbytes // 2


def test_small_buffers_do_not_keep_weights_in_memory() -> None:
    """A network without weights has its tables all the same; they are computed, not loaded."""
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(20_000, 20_000))
    net.register_buffer("table", torch.zeros(8 << 20))  # 32 MiB beside 1.6 GB
    cpu = torch.device("cpu")
    assert not part_of("net", net, Rehearsed(), 1, cpu, Mappings()).bound
    assert part_of("net", nn.Linear(1000, 1000), Rehearsed(), 1, cpu, Mappings()).bound


def test_planning_leaves_the_random_numbers_and_the_network_alone() -> None:
    net = nn.Linear(8, 8)
    weight, state = net.weight, torch.random.get_rng_state()
    _rehearsed(net, torch.zeros(1, 8))
    assert net.weight is weight
    assert torch.equal(torch.random.get_rng_state(), state)


def test_calls_of_the_loop_are_told_from_others() -> None:
    class Scheduler:
        def step(self) -> None:
            pass

    text, net = nn.Linear(4, 4), nn.Linear(4, 4)
    scheduler = Scheduler()

    def run() -> None:
        text(torch.zeros(1, 4)), text(torch.zeros(1, 4))
        for _ in range(2):
            net(torch.zeros(1, 4))
            scheduler.step()

    found = rehearse({"text": text, "net": net}, run, torch.device("cpu"), scheduler)
    assert (found["text"].passes(28), found["net"].passes(28)) == (2, 28)
    assert found["net"].work(28).flops == 28 * found["net"].work(1).flops > 0
    assert "step" not in vars(scheduler)


def test_convolutions_take_blocked_copies() -> None:
    x, w = torch.zeros(1, 128, 64, 64), torch.zeros(128, 128, 3, 3)
    extra = workspace("aten.convolution.default", (x, w, None, [1, 1], [1, 1], [1, 1], False), torch.zeros_like(x))
    assert extra == x.nbytes + w.nbytes
    assert workspace("aten.add.Tensor", (x, x), x) == 0


def test_fetching_ahead_hides_behind_computing() -> None:
    p, speed = part(flops=1e12, passes=10), Speed(1e12, 1e6, 1e12)
    assert seconds(p, 0, 50_000, 0, 1, speed) == pytest.approx(1.0)
    assert seconds(p, 0, 50_000, 0, 0, speed) == pytest.approx(1.5)
    assert seconds(p, 0, 500_000, 0, 1, speed) == pytest.approx(5.0)


def test_fetching_ahead_hides_nothing_that_the_same_cores_do() -> None:
    p, busy = part(flops=1e12, passes=10), Speed(1e12, 1e6, 1e12, copying=1e6)
    assert seconds(p, 0, 50_000, 0, 1, busy) == seconds(p, 0, 50_000, 0, 0, busy) == pytest.approx(1.5)


def test_what_comes_to_stay_is_mapped_and_not_copied() -> None:
    p, speed = part(passes=1), Speed(1e12, 1e6, staying=1e7)
    base = seconds(p, 0, 0, 0, 0, speed)
    assert seconds(p, 50_000, 0, 0, 0, speed) - base == pytest.approx(5e-3)
    assert seconds(p, 0, 50_000, 0, 0, speed) - base == pytest.approx(5e-2)
