"""Calls under a plan: compared with what was planned as soon as their size is known, and planned again if larger."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import effusion
from effusion.core.errors import BudgetError
from effusion.placement.engine import engine_of
from effusion.placement.pipeline_choices import Choices
from effusion.placement.table import Hoisting

from . import tiny_pipelines as tiny

CALL: dict[str, Any] = {"height": tiny.SIZE, "width": tiny.SIZE, "num_inference_steps": 2, "device": "cpu"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipelines")
    for name in tiny.MAKERS:
        tiny.save(name, folder)
    return folder


def least(pipe: Any, **call: Any) -> int:
    """The smallest budget that some exact plan keeps: almost everything is streamed."""
    size = {"height": tiny.SIZE, "width": tiny.SIZE, "num_frames": None, "batch_size": 1, "num_inference_steps": 2}
    return Choices(pipe, pipe.modules, {**size, **call}, torch.device("cpu"), hoist=False).least("exact")


def embeds(length: int, batch: int = 1) -> dict[str, torch.Tensor]:
    return {"prompt_embeds": torch.zeros(batch, length, 16), "pooled_prompt_embeds": torch.zeros(batch, 16)}


def planned(pipe: Any) -> Any:
    return pipe.memory_report().plan.call


# -- larger than planned -----------------------------------------------------------------------------------


def test_a_size_that_is_left_open_is_the_networks_own(saved: Path) -> None:
    pipe = tiny.load("sd", saved)
    pipe.fit("1GB", **{**CALL, "height": 16, "width": 16})
    encoded: list[int] = []
    pipe.text_encoder.register_forward_pre_hook(lambda *_: encoded.append(len(planned_calls)))
    planned_calls: list[Any] = []
    original = pipe._plan_again
    pipe.__dict__["_plan_again"] = lambda *a, **k: planned_calls.append(a) or original(*a, **k)
    pipe("a cat", num_inference_steps=2, output_type="pt")
    assert planned(pipe)["height"] == planned(pipe)["width"] == tiny.SIZE
    assert len(planned_calls) == 1 and encoded[-1] == 1, "work had begun before"
    assert any("larger than planned (height, width" in note for note in pipe.memory_report().notes)


def test_pictures_have_sizes_too(saved: Path) -> None:
    text = tiny.load("sd", saved)
    pipe = effusion.StableDiffusionImg2ImgPipeline(**text.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.fit("1GB", num_inference_steps=4, device="cpu", image=Image.new("RGB", (32, 32)))
    picture = Image.new("RGB", (64, 64))
    pipe("a cat", image=picture, num_inference_steps=4, output_type="pt")
    assert planned(pipe)["height"] == 64
    pipe(["a", "b"], image=[picture, picture], num_inference_steps=4, output_type="pt")
    assert planned(pipe)["pictures"] == planned(pipe)["batch_size"] == 2
    before = pipe.memory_report().plan
    pipe("a cat", image=Image.new("RGB", (32, 32)), num_inference_steps=4, output_type="pt")
    assert pipe.memory_report().plan == before, "a smaller call was planned again"


@pytest.mark.parametrize(
    ("more", "name"),
    [
        (embeds(9), "tokens"),
        (embeds(5, 2), "batch_size"),
        ({"true_cfg_scale": 2.0, "negative_prompt_embeds": torch.ones(1, 5, 16)}, "branches"),
    ],
    ids=["tokens", "batch", "guidance"],
)
def test_what_else_makes_a_call_larger(more: dict[str, Any], name: str, saved: Path) -> None:
    pipe = tiny.load("flux", saved)
    if name == "branches":
        more = {**more, "negative_pooled_prompt_embeds": torch.ones(1, 16)}
    call = {**embeds(5), **more, "height": 32, "width": 32, "num_inference_steps": 2, "output_type": "pt"}
    pipe.fit("1GB", **CALL, **embeds(5))
    before = pipe._plan
    pipe(**{**call, **embeds(5), "true_cfg_scale": 1.0})
    assert pipe._plan == before
    pipe(**call)
    assert pipe._plan.call[name] > before.call[name]
    assert any(f"larger than planned ({name}" in note for note in pipe.memory_report().notes)


def test_a_longer_prompt_is_planned_again(saved: Path) -> None:
    pipe = tiny.load("flux", saved)
    pipe.fit("1GB", **CALL, **embeds(5), max_sequence_length=16)
    call = {**embeds(5), "height": 32, "width": 32, "num_inference_steps": 2, "output_type": "pt"}
    pipe(**call, max_sequence_length=16)
    assert planned(pipe)["max_sequence_length"] == 16
    pipe(**call, max_sequence_length=64)
    assert planned(pipe)["max_sequence_length"] == 64


def test_refused_before_anything_is_encoded(saved: Path) -> None:
    pipe = tiny.load("sd", saved)
    pipe.fit(least(pipe), **CALL)
    encoded: list[int] = []

    def note(*_: Any) -> None:
        if "_rehearsing" not in pipe.__dict__:
            encoded.append(1)

    pipe.text_encoder.register_forward_pre_hook(note)
    with pytest.raises(BudgetError):
        pipe("a cat", height=256, width=256, num_inference_steps=2)
    assert not encoded
    pipe("a cat", height=tiny.SIZE, width=tiny.SIZE, num_inference_steps=2)
    assert encoded


def test_planning_disturbs_no_scheduler(saved: Path) -> None:
    pipe = tiny.load("sd", saved)
    pipe.scheduler = effusion.PNDMScheduler.from_config(pipe.scheduler.config, skip_prk_steps=True)
    pipe.scheduler.set_timesteps(7)
    before, scale = dict(vars(pipe.scheduler)), pipe._guidance_scale
    pipe.plan("1GB", **CALL)
    assert all(vars(pipe.scheduler)[name] is value for name, value in before.items())
    assert pipe._guidance_scale is scale and pipe._num_timesteps == 0 and "_rehearsing" not in pipe.__dict__


# -- what is rehearsed -------------------------------------------------------------------------------------


def _activations(plan: Any) -> int:
    return next(int(s.activations) for s in plan.stages if s.name == "transformer")


def test_embeddings_and_a_batch_size(saved: Path) -> None:
    pipe = tiny.load("flux", saved)
    one = pipe.plan("1GB", **CALL, **embeds(5))
    four = pipe.plan("1GB", **CALL, **embeds(5), batch_size=4)
    assert four.call["batch_size"] == 4 and _activations(four) > 3 * _activations(one)
    assert pipe.plan("1GB", **CALL, **embeds(5, 2), batch_size=3).call["batch_size"] == 4
    assert pipe.plan("1GB", **CALL, **embeds(5), num_images_per_prompt=3).call["batch_size"] == 3


def test_two_prompts_and_pictures_of_each(saved: Path) -> None:
    pipe = tiny.load("sd", saved)
    pipe.fit("1GB", **CALL)
    out = pipe(["a", "b"], num_images_per_prompt=2, height=32, width=32, num_inference_steps=2, output_type="pt")
    assert len(out.images) == planned(pipe)["batch_size"] == 4
    assert pipe.plan("1GB", **CALL, prompt=["a", "b"], batch_size=4).call["batch_size"] == 4


# -- hoisting ----------------------------------------------------------------------------------------------


def flux_call(pipe: Any, **more: Any) -> torch.Tensor:
    g = torch.Generator().manual_seed(5)
    call = {**embeds(5), "height": 32, "width": 32, "num_inference_steps": 2, "output_type": "pt", "generator": g}
    out: torch.Tensor = pipe(**{**call, **more}).images
    return out


def test_hoisting_by_hand_beside_a_plan(saved: Path) -> None:
    pipe = tiny.load("flux", saved)
    wanted = flux_call(pipe)
    pipe.enable_hoisting()
    pipe.fit("1GB", **CALL, **embeds(5))
    assert torch.equal(flux_call(pipe), wanted)
    engine = engine_of(pipe.transformer)
    assert engine is not None and engine.hoisting is not None, "what measures got in the way"
    assert set(pipe.memory_report().stages) >= {"transformer", "vae"}
    made: list[int] = []
    renew = Hoisting.renew
    engine.hoisting.renew = lambda *a: made.append(1) or renew(engine.hoisting, *a)  # type: ignore[method-assign,func-returns-value,arg-type]
    assert torch.equal(flux_call(pipe), wanted) and not made, "the table was made again"


# -- step by step ------------------------------------------------------------------------------------------


def test_streams_run_as_planned(saved: Path) -> None:
    pipe = tiny.load("sd", saved)
    call: dict[str, Any] = {"prompt": "a cat", "height": 64, "width": 64, "num_inference_steps": 3, "output_type": "pt"}
    wanted = pipe(**call, generator=torch.Generator().manual_seed(1)).images
    pipe.fit("1GB", **CALL)
    grads = []
    for step in pipe.stream(**call, generator=torch.Generator().manual_seed(1)):
        grads.append(torch.is_grad_enabled())
        last = step.state
    assert grads == [True] * 3, "gradients were off between the steps"
    assert torch.equal(last.images, wanted)
    report = pipe.memory_report()
    assert (
        report.plan.call["height"] == 64
        and len(report.steps) == 3
        and set(report.stages) == {"text_encoder", "unet", "vae"}
    )


def test_streams_that_are_left_give_memory_back(saved: Path) -> None:
    pipe = tiny.load("sd", saved)
    pipe.enable_model_cpu_offload(device="cpu")
    freed: list[int] = []
    free: Callable[[], None] = pipe.maybe_free_model_hooks
    pipe.__dict__["maybe_free_model_hooks"] = lambda: freed.append(1) or free()  # type: ignore[func-returns-value]
    for _ in pipe.stream(prompt="a cat", height=32, width=32, num_inference_steps=3, output_type="pt"):
        break
    assert freed == [1] and torch.is_grad_enabled()
