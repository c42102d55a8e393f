"""Runs under a plan are measured; the report is a table, data, a picture and a page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from . import tiny_pipelines as tiny

CALL = {"height": tiny.SIZE, "width": tiny.SIZE, "batch_size": 2, "num_inference_steps": 2, "device": "cpu"}


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("report")
    tiny.save("sd", folder)
    made = tiny.load("sd", folder)
    made.fit("1GB", **CALL)
    tiny.run("sd", made)
    return made


def test_predicted_beside_measured(pipe: Any) -> None:
    report = pipe.memory_report()
    assert list(report.stages) == ["text_encoder", "unet", "vae"]
    assert report.seconds > 0 and len(report.steps) == 2
    assert all(s.seconds > 0 for s in report.stages.values())
    text = str(report)
    assert "unet" in text and "1.00 GB" in text and "predicted" in text


def test_data_survives_json(pipe: Any) -> None:
    body = json.loads(json.dumps(pipe.memory_report().to_dict()))
    assert body["budget"] == 10**9
    assert [s["stage"] for s in body["stages"]] == ["text_encoder", "unet", "vae"]
    assert body["predicted_peak"] == pipe.memory_report().plan.peak


def test_picture_and_page(pipe: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report = pipe.memory_report()
    report.plot(tmp_path / "timeline.png")
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")
    report.save(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "<svg" in page and "text_encoder" in page and "budget" in page
    assert "http" not in page and "src=" not in page, "the page needs something else"


def test_nothing_measured_is_said(tmp_path: Path) -> None:
    tiny.save("sd", tmp_path)
    fresh = tiny.load("sd", tmp_path)
    with pytest.raises(ValueError, match="nothing was measured"):
        fresh.memory_report()
    tiny.run("sd", fresh)
    with pytest.raises(ValueError, match="nothing was measured"):
        fresh.memory_report()


def test_a_larger_call_is_planned_again_or_refused(tmp_path: Path) -> None:
    from effusion.core.errors import BudgetError

    tiny.save("sd", tmp_path)
    fresh = tiny.load("sd", tmp_path)
    wanted = tiny.run("sd", fresh, height=64, width=64)
    planned = fresh.fit("1GB", **CALL)
    assert torch.equal(tiny.run("sd", fresh, height=64, width=64), wanted)
    again = fresh.memory_report().plan
    assert again.call["height"] == 64 and again.peak > planned.peak
    fresh.fit(planned.peak, **CALL)
    steps: list[int] = []
    with pytest.raises(BudgetError):
        tiny.run("sd", fresh, height=128, width=128, callback_on_step_end=lambda p, i, t, k: steps.append(i) or k)
    assert not steps
    fresh.enable_sequential_cpu_offload(device="cpu")
    tiny.run("sd", fresh, height=64, width=64)
    assert fresh.memory_report().plan.call["height"] == 64, "measured without a plan"
