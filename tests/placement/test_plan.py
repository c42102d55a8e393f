"""Plans are data; planning is a pure function; a budget is kept and the picture stays the same."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from effusion.core.errors import BudgetError, PlanConflict
from effusion.placement import lane, planner
from effusion.placement.engine import engine_of
from effusion.placement.plan import Plan, Row, Stage, parse_size, size_text
from effusion.placement.sources import give_back_pages, present_bytes

from . import tiny_pipelines as tiny
from .parts import SPEED, part


def test_plans_survive_json_and_print() -> None:
    made = planner.plan([part(), part("vae", 2)], 30_000, None, "cpu", SPEED).replace(call={"height": 64})
    again = Plan.from_dict(json.loads(json.dumps(made.to_dict())))
    assert again == made and again.exact
    assert "net" in str(made) and "peak" in str(made)
    with pytest.raises(ValueError, match="no fields"):
        Plan.from_dict({**made.to_dict(), "colour": "red"})


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ({"home": "cloud"}, ValueError),
        ({"ahead": -1}, ValueError),
        ({"home": "pinned"}, PlanConflict),
    ],
)
def test_rows_that_cant_be(row: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        Row(**{"unit": "a/b", "nbytes": 1, "home": "host", "device": "cpu", **row})


def test_exactness_is_said() -> None:
    row = Row("a/b", 10, "host", "cpu")
    assert Plan((row,)).exact
    assert not Plan((Row("a/b", 10, "host", "cpu", form="float8_e4m3fn"),)).exact
    assert not Plan((row,), switches={"vae_tiling": True}).exact
    assert Plan((row,), stages=(Stage("a", 5, 6, 7),)).peak == 18


@pytest.mark.parametrize(
    ("text", "value"), [("6GB", 6 * 10**9), ("5.5 GiB", 5905580032), (100, 100), ("800mb", 8 * 10**8), ("7", 7)]
)
def test_sizes(text: Any, value: int) -> None:
    assert parse_size(text) == value


@pytest.mark.parametrize("text", ["", "six", "6 parsec", "-1GB", 0, "0", None, True, float("nan"), float("inf"), [6]])
def test_nonsense_sizes(text: Any) -> None:
    with pytest.raises(ValueError, match="memory="):
        parse_size(text)


def test_sizes_print() -> None:
    assert [size_text(n) for n in (12, 1500, 2_500_000, 6e9, 3e12)] == [
        "12 B",
        "1.50 KB",
        "2.50 MB",
        "6.00 GB",
        "3.00 TB",
    ]


def test_a_pipeline_in_less_and_less_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Predicted before weights are read, kept in the ring, the same bits; too little is refused with the least."""
    tiny.save("sd", tmp_path)
    pipe = tiny.load("sd", tmp_path)
    wanted = tiny.run("sd", pipe)
    size = {"height": tiny.SIZE, "width": tiny.SIZE, "batch_size": 2, "num_inference_steps": 2, "device": "cpu"}
    pipe.fit("1GB", **size)
    tiny.run("sd", pipe)  # libraries are in memory then; forecasts of a process that is cold count them
    everything = pipe.plan("1GB", **size)
    assert not everything.notes, everything.notes
    assert everything.exact and not any(r.travels for r in everything.rows)
    assert {s.name for s in everything.stages} == {"text_encoder", "unet", "vae"}
    assert all(s.activations > 0 for s in everything.stages)
    weights = {n: sum(r.nbytes for r in everything.of(n)) for n in pipe.modules}
    with pytest.raises(BudgetError, match="The least for this call is") as refused:
        pipe.plan(1000, **size)
    assert "activations" in str(refused.value)
    rings: list[int] = []
    make = lane.Arena

    def arena(capacity: int, device: torch.device) -> lane.Arena:
        rings.append(capacity)
        return make(capacity, device)

    monkeypatch.setattr(lane, "Arena", arena)
    for part_of_it in (0.98, 0.7):
        budget = int(max(s.activations + s.workspaces + part_of_it * weights[s.name] for s in everything.stages))
        made = pipe.fit(budget, **size)
        assert made.peak <= budget
        assert any(r.travels for r in made.rows)
        rings.clear()
        assert torch.equal(tiny.run("sd", pipe), wanted)
        assert rings and max(rings) <= max(s.ring for s in made.stages)
    pipe.apply(everything)
    assert all(engine_of(m) is None for m in pipe.modules.values())
    assert torch.equal(tiny.run("sd", pipe), wanted)
    with pytest.raises(PlanConflict, match="rows for"):
        pipe.apply(Plan((Row("nobody/x", 1, "host", "cpu"),)))
    with pytest.raises(ValueError, match="quality"):
        pipe.plan("1GB", quality="great")
    again = tiny.load("sd", tmp_path, memory="1GB")
    assert torch.equal(tiny.run("sd", again), wanted)


def advised(folder: Path) -> int:
    """How many mapped areas of files in ``folder`` are read at random, as far as the system knows."""
    count, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        fields = line.split()
        if not fields[0].endswith(":"):
            inside = len(fields) > 5 and fields[5].startswith(str(folder))
        elif fields[0] == "VmFlags:" and inside:
            count += "rr" in fields
    return count


def test_files_are_read_as_ever_when_a_plan_ends(tmp_path: Path) -> None:
    tiny.save("sd", tmp_path)
    pipe = tiny.load("sd", tmp_path)
    size = {"height": tiny.SIZE, "width": tiny.SIZE, "batch_size": 2, "num_inference_steps": 2, "device": "cpu"}
    everything = pipe.plan("4GB", **size)
    streamed = tuple(replace(row, home="disk") for row in everything.rows)

    def ends(how: Any) -> int:
        pipe.apply(everything.replace(rows=streamed))
        assert advised(tmp_path), "nothing was set apart"
        how()
        return advised(tmp_path)

    assert not ends(lambda: pipe.apply(everything))
    assert not ends(lambda: pipe.to("cpu"))
    assert not ends(pipe.remove_all_hooks)
    kept = tuple(replace(row, keep=True) for row in streamed)
    assert not ends(lambda: pipe.apply(everything.replace(rows=kept))), "what stays is read at random"
    pipe.remove_all_hooks()


def test_devices_of_rows_get_their_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.save("sd", tmp_path)
    pipe = tiny.load("sd", tmp_path)
    wanted = tiny.run("sd", pipe)
    size = {"height": tiny.SIZE, "width": tiny.SIZE, "batch_size": 2, "num_inference_steps": 2, "device": "cpu"}
    body = pipe.plan("4GB", **size).to_dict()
    made = Plan.from_dict({**body, "rows": [{**row, "device": "cpu:0"} for row in body["rows"]]})
    pipe.apply(made)
    assert {row.device for row in pipe._plan.rows} == {"cpu"}
    assert torch.equal(tiny.run("sd", pipe), wanted)
    assert pipe.memory_report().device == "cpu"
    with pytest.raises(ValueError, match="no device 'cuda:7'"):
        pipe.apply(Plan.from_dict({**body, "rows": [{**row, "device": "cuda:7"} for row in body["rows"]]}))
    assert torch.equal(tiny.run("sd", pipe), wanted)


def test_what_rests_for_good_and_is_read_is_there_before_the_first_call(tmp_path: Path) -> None:
    """Else the first call holds less than is predicted, and reads files in the middle of the loop."""
    tiny.save("sd", tmp_path)
    pipe = tiny.load("sd", tmp_path)
    plan = pipe.plan("1GB", height=tiny.SIZE, width=tiny.SIZE, num_inference_steps=2, device="cpu")
    filled = {row.unit.partition("/")[2] for row in plan.of("vae") if row.filled}
    assert filled and not any(unit.startswith("encoder") for unit in filled), "a picture needs no encoder"
    weights = {n: p for n, p in pipe.vae.named_parameters() if n.startswith(("encoder.", "decoder."))}
    give_back_pages(weights.values())
    pipe.apply(plan)
    there = {n: present_bytes(p) for n, p in weights.items() if p.nbytes >= 8192}  # smaller ones share pages
    assert all(there[n] == weights[n].nbytes for n in there if n.startswith("decoder."))
    assert sum(there[n] for n in there if n.startswith("encoder.")) == 0
