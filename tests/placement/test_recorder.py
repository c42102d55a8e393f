"""What is measured: on an accelerator (a simulated one), after errors, with runs inside of runs, where systems know little."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from effusion.placement import machine, meter, pages
from effusion.placement.meter import Accelerator, meter_of
from effusion.placement.plan import Plan, Row
from effusion.placement.recorder import Recorder
from effusion.placement.rooms import room_on

from . import tiny_pipelines as tiny

CUDA = torch.device("cuda:0")
CALL = {"height": tiny.SIZE, "width": tiny.SIZE, "batch_size": 2, "num_inference_steps": 2, "device": "cpu"}


class Allocator:
    """Stands for the functions of ``torch.cuda``; what is computed is there when the device has been waited for."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.held = self.most = self.queued = 0
        patch.setattr(torch.cuda, "memory_allocated", lambda device: self.held)
        patch.setattr(torch.cuda, "max_memory_allocated", lambda device: self.most)
        patch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: setattr(self, "most", self.held))
        patch.setattr(machine, "synchronize", lambda device: self.wait())
        self.waits = 0

    def take(self, nbytes: int) -> None:
        self.held += nbytes
        self.most = max(self.most, self.held)

    def wait(self) -> None:
        self.waits += 1


@pytest.fixture
def allocator(monkeypatch: pytest.MonkeyPatch) -> Allocator:
    return Allocator(monkeypatch)


def recorder(*names: str) -> Recorder:
    rows = tuple(Row(f"{name}/", 100, "device", "cuda:0") for name in names)
    return Recorder({name: nn.Linear(4, 4) for name in names}, Plan(rows))


def test_what_others_hold_does_not_count(allocator: Allocator, monkeypatch: pytest.MonkeyPatch) -> None:
    allocator.take(5000)
    made = recorder("net")
    monkeypatch.setattr(Accelerator, "there", lambda self, tensor: 600)  # weight and bias: 1200 of the 5000 are ours
    with made.running():
        made._enter("net")
        allocator.take(300)
        allocator.take(-300)
    assert made.report().stages["net"].peak == 1500


def test_the_device_is_waited_for_where_stages_and_steps_end(allocator: Allocator) -> None:
    made = recorder("a", "b")
    with made.running():
        begun = allocator.waits
        made._enter("a")
        made._enter("b")
        made.step()
        assert allocator.waits == begun + 3


def test_a_run_inside_of_a_run(allocator: Allocator) -> None:
    """The outer one goes on being told, and keeps the peak that it had before."""
    outer, inner = recorder("net"), recorder("other")
    room = room_on(CUDA)
    with outer.running():
        outer._enter("net")
        allocator.take(900)
        allocator.take(-900)
        with inner.running():
            inner._enter("other")
            allocator.take(100)
            allocator.take(-100)
        assert room.told == outer._enters
    assert room.told is None
    assert outer.report().stages["net"].peak == 900
    assert inner.report().stages["other"].peak == 100


def test_networks_of_others_are_no_stages(allocator: Allocator) -> None:
    made = recorder("net")
    engine: Any = type("Engine", (), {"root": nn.Linear(1, 1), "name": "text_encoder"})()
    with made.running():
        made._enter("net")
        made._enters(engine)
    assert list(made.report().stages) == ["net"]


def test_accelerators_without_peaks_are_read_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    levels = iter([100, 700, 300])
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: next(levels))
    made = meter_of(torch.device("mps"))
    made.forget()
    assert [made.level(), made.level()] == [100, 700]
    assert made.peak() == 700 and "highest of readings" in str(made.flaw)


def test_a_system_without_proc_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tiny.save("sd", tmp_path)
    pipe = tiny.load("sd", tmp_path)
    pipe.fit("1GB", **CALL)
    monkeypatch.setattr(pages, "forget_peak", lambda: False)
    tiny.run("sd", pipe)
    assert any("highest of readings in between" in note for note in pipe.memory_report().notes)
    monkeypatch.setattr(pages, "_status", lambda key: 0)
    tiny.run("sd", pipe)
    assert any("can't be measured on this system" in note for note in pipe.memory_report().notes)
    monkeypatch.undo()
    tiny.run("sd", pipe)
    assert not pipe.memory_report().notes and pipe.memory_report().peak > 0
    assert meter.meter_of(torch.device("cpu")).level() > 1 << 20


def test_the_report_after_an_error_is_that_of_the_run_that_failed(tmp_path: Path) -> None:
    tiny.save("sd", tmp_path)
    pipe = tiny.load("sd", tmp_path)
    pipe.fit("1GB", **CALL)
    tiny.run("sd", pipe)
    before = pipe.memory_report()

    def stop(*_: Any) -> Any:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        tiny.run("sd", pipe, callback_on_step_end=stop)
    after = pipe.memory_report()
    assert after is not before and "vae" not in after.stages
    assert "the run ended early: RuntimeError" in after.notes
