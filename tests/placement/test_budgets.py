"""Budgets and the numbers of a call: checked before anything is rehearsed; plans: before anything is moved."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from effusion.core.errors import BudgetError, PlanConflict
from effusion.placement import budgets, carrying, machine, planner, policies
from effusion.placement.engine import engine_of
from effusion.placement.forecast import part_of
from effusion.placement.plan import parse_size
from effusion.placement.rehearsal import Rehearsed
from effusion.placement.sources import Mappings

from . import tiny_pipelines as tiny
from .parts import SPEED, part
from .test_calls import CALL, least


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipelines")
    tiny.save("sd", folder)
    return folder


@pytest.mark.parametrize(
    "wrong",
    [{"batch_size": 0}, {"batch_size": "2"}, {"num_inference_steps": 0}, {"num_inference_steps": -3}, {"height": 0},
     {"width": 1.5}, {"batch_size": True}],
    ids=str,
)  # fmt: skip
def test_numbers_that_cant_be(wrong: dict[str, Any], saved: Path) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}=.*positive whole number"):
        tiny.load("sd", saved).plan("1GB", **{**CALL, **wrong})


def test_numbers_of_numpy(saved: Path) -> None:
    assert parse_size(np.int64(6)) == parse_size(np.float32(6)) == 6
    plan = tiny.load("sd", saved).plan(np.int64(10**9), **{**CALL, "batch_size": np.int32(2)})
    assert plan.budget == 10**9 and plan.call["batch_size"] == 2


def test_more_than_a_device_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "device_memory", lambda device: 24 * 10**9)
    card = torch.device("cuda", 0)
    assert budgets.on_device("100GB", {}, card) == 24 * 10**9
    assert budgets.on_device("6GB", {}, card) == 6 * 10**9


def test_the_weights_own_room_counts_as_free(monkeypatch: pytest.MonkeyPatch, saved: Path) -> None:
    """Weights of a file are no burden on the CPU: they can be read again."""
    net = nn.ModuleDict({"a": nn.Linear(100, 100, bias=False)})
    assert carrying.own_bytes({"a": net, "again": net}, torch.device("cpu")) == 40_000
    assert carrying.own_bytes({"a": net}, torch.device("cuda", 0)) == 0
    monkeypatch.setattr(machine, "available_ram", lambda: 10_000)
    assert budgets.on_host(None, {"net": net}) == budgets.on_device(None, {"net": net}, torch.device("cpu")) == 45_000
    pipe = tiny.load("sd", saved)
    loose = sum(b.nbytes for m in pipe.modules.values() for b in m.buffers())
    assert carrying.own_bytes(pipe.modules, torch.device("cpu")) <= loose


def test_weights_of_no_file_rest_in_host_memory_or_nowhere() -> None:
    """On an accelerator what does not fit into ``ram`` rests in its file; what has none has to fit."""
    parts = [part("loose", 8, 10_000, loose=True), part("net", 8, 20_000)]
    made = planner.plan(parts, 100_000, 90_000, "cuda:0", SPEED)
    assert {r.home for r in made.of("loose")} == {"host"} and {r.home for r in made.of("net")} == {"disk"}
    with pytest.raises(BudgetError, match=r"host memory.*\['loose'\].*offload_folder"):
        planner.plan(parts, 50_000, 70_000, "cuda:0", SPEED)
    stays = planner.plan([part("loose", 2, 10_000, loose=True)], 100_000, 1000, "cuda:0", SPEED)
    assert {r.home for r in stays.rows} == {"device"}
    net = nn.Linear(1000, 1000)
    known = part_of("net", net, Rehearsed(), 1, torch.device("cuda", 0), Mappings())
    assert known.loose and not known.bound
    known = part_of("net", net, Rehearsed(), 1, torch.device("cpu"), Mappings())
    assert known.loose and known.bound


# -- all or nothing ----------------------------------------------------------------------------------------


def test_refused_before_anything_changes(saved: Path) -> None:
    pipe = tiny.load("sd", saved)
    wanted = tiny.run("sd", pipe)
    plan = pipe.plan("1GB", **CALL)
    row = next(r for r in plan.rows if r.component == "unet" and r.nbytes > 64)
    form = {"form": "bfloat16", "compute_dtype": "float32"}
    rows = tuple(replace(r, **form) if r.component == "text_encoder" else r for r in plan.rows)  # type: ignore[arg-type]
    cast = plan.replace(rows=rows, switches={"storage_dtype": "bfloat16"})
    policies.cpu_offload(pipe.unet.down_blocks[0], "cpu")
    with pytest.raises(PlanConflict, match="a policy of its own"):
        pipe.apply(cast)
    policies.remove(pipe.unet.down_blocks[0])
    wrong = plan.replace(rows=tuple(r for r in plan.rows if r != row))
    with pytest.raises(PlanConflict, match="plan again"):
        pipe.apply(wrong)
    with pytest.raises(ValueError, match="no device"):
        pipe.apply(plan.replace(rows=tuple(replace(r, device="cuda:77") for r in plan.rows)))
    assert pipe.text_encoder.dtype == torch.float32 and "_plan" not in pipe.__dict__
    assert torch.equal(tiny.run("sd", pipe), wanted)


@pytest.mark.parametrize("planned", [False, True])
def test_no_room_half_way(planned: bool, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny.load("sd", saved)
    wanted = tiny.run("sd", pipe)
    if planned:
        pipe.fit(least(pipe, batch_size=2), **CALL, batch_size=2)
    before, plan = pipe.__dict__.get("_plan"), pipe.plan("1GB", **CALL)
    place, calls = carrying._place, [0]

    def fails(*args: Any) -> None:
        calls[0] += 1
        if calls[0] == 2:
            raise torch.OutOfMemoryError("no room")
        place(*args)

    monkeypatch.setattr(carrying, "_place", fails)
    with pytest.raises(BudgetError, match="no room"):
        pipe.apply(plan)
    assert pipe.__dict__.get("_plan") is before
    assert (engine_of(pipe.unet) is not None) == planned
    assert torch.equal(tiny.run("sd", pipe), wanted)


def test_a_plan_replaces_a_device_map(saved: Path) -> None:
    pipe = tiny.load("sd", saved, device_map="cpu")
    assert pipe.hf_device_map is not None
    pipe.fit("1GB", **CALL)
    assert pipe.hf_device_map is None


def test_stages_have_the_names_of_components(saved: Path) -> None:
    """Whatever served them before."""
    pipe = tiny.load("sd", saved)
    pipe.enable_sequential_cpu_offload(device="cpu")
    pipe.fit(least(pipe, batch_size=2), **CALL, batch_size=2)
    tiny.run("sd", pipe)
    report = pipe.memory_report()
    assert list(report.stages) == ["text_encoder", "unet", "vae"]
    assert "–" not in str(report)
