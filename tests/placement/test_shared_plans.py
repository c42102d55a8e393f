"""Plans and components: a plan belongs to those that it placed, also where several pipelines share them."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import effusion
from effusion.placement import casting
from effusion.placement.engine import engine_of

from . import tiny_pipelines as tiny
from .test_calls import CALL, least

FP8 = torch.float8_e4m3fn


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipelines")
    tiny.save("sd", folder)
    return folder


def streaming(pipe: Any) -> Any:
    plan = pipe.fit(least(pipe, batch_size=2), **CALL, batch_size=2)
    assert any(row.travels for row in plan.rows)
    return plan


def test_another_network_is_placed_at_the_next_call(saved: Path) -> None:
    pipe, other = tiny.load("sd", saved), tiny.load("sd", saved)
    for p in other.unet.parameters():
        p.data = p.data * 1.01
    wanted = tiny.run("sd", other)
    plan = streaming(pipe)
    pipe.unet = tiny.load("sd", saved).unet
    tiny.run("sd", pipe)
    engine = engine_of(pipe.unet)
    assert engine is not None and engine.policy["kind"] == "plan"
    assert pipe._plan.budget == plan.budget and pipe.memory_report().plan.peak <= plan.budget
    pipe.fit("1GB", **CALL, batch_size=2)
    pipe.unet = other.unet
    assert torch.equal(tiny.run("sd", pipe), wanted)


def test_a_pipeline_of_the_same_components_keeps_the_budget(saved: Path) -> None:
    pipe = tiny.load("sd", saved)
    wanted = tiny.run("sd", pipe)
    plan = pipe.fit("500MB", **CALL, batch_size=2)
    other = effusion.StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    other("a cat", image=Image.new("RGB", (64, 64)), num_inference_steps=4, output_type="pt")
    report = other.memory_report()
    assert report.plan.budget == plan.budget and report.plan.call["height"] == 64
    assert torch.equal(tiny.run("sd", pipe), wanted) and pipe._plan == plan


def test_two_plans_for_the_same_components(saved: Path) -> None:
    """Each pipeline runs by its own; one that another's policy has ended is over."""
    pipe = tiny.load("sd", saved)
    wanted = tiny.run("sd", pipe)
    plan = streaming(pipe)
    other = effusion.StableDiffusionPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    other.fit("1GB", **CALL, batch_size=2)
    assert engine_of(pipe.unet) is None
    assert torch.equal(tiny.run("sd", pipe), wanted)
    assert pipe._plan == plan and engine_of(pipe.unet) is not None
    other.to("cpu")
    assert torch.equal(tiny.run("sd", pipe), wanted)
    assert "_plan" not in pipe.__dict__ and engine_of(pipe.unet) is None


def _saved(module: Any) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("again", [copy.deepcopy, _saved], ids=["copy", "pickle"])
@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
def test_copies_of_cast_networks_decode(part: str, again: Any, saved: Path) -> None:
    pipe, kept = tiny.load("sd", saved), tiny.load("sd", saved)
    module = getattr(pipe, part)
    dtypes = {n: p.dtype for n, p in module.named_parameters()}
    casting.apply_layerwise_casting(module, FP8, torch.float32, casting.usual_patterns(module))
    wanted = tiny.run("sd", pipe)
    twin = again(module)
    assert {p.dtype for p in twin.parameters()} == {p.dtype for p in module.parameters()}
    setattr(kept, part, twin)
    assert torch.equal(tiny.run("sd", kept), wanted)
    assert torch.equal(tiny.run("sd", pipe), wanted)
    casting.uncast(twin)
    assert {n: p.dtype for n, p in twin.named_parameters()} == dtypes
    if again is copy.deepcopy:
        plain = getattr(tiny.load("sd", saved), part)
        assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), plain.parameters(), strict=True))
    assert torch.equal(tiny.run("sd", pipe), wanted), "undoing the copy's cast changed the original"


def test_a_copy_of_a_pipeline_runs_by_its_own_plan(saved: Path) -> None:
    pipe = tiny.load("sd", saved)
    wanted = tiny.run("sd", pipe)
    plan = pipe.fit("1GB", **CALL, batch_size=2)
    twin = copy.deepcopy(pipe)
    assert torch.equal(tiny.run("sd", twin), wanted)
    assert twin._plan.budget == plan.budget
    assert torch.equal(tiny.run("sd", pipe), wanted) and pipe._plan is plan
