"""Out of memory in the middle of a run under a plan: the step is done again, leaner, to the same bits."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import effusion
from effusion.core.errors import BudgetError
from effusion.placement.engine import engine_of
from effusion.placement.rescue import Rescue, leaner

from . import tiny_pipelines as tiny

SIZE = {"height": tiny.SIZE, "width": tiny.SIZE, "batch_size": 2, "device": "cpu"}
SAMPLERS = {
    "ddim": {"eta": 0.7},
    "EulerAncestralDiscreteScheduler": {},
    "DPMSolverMultistepScheduler": {"algorithm_type": "sde-dpmsolver++"},
    "HeunDiscreteScheduler": {},
    "LMSDiscreteScheduler": {},
    "PNDMScheduler": {"skip_prk_steps": True},
    "UniPCMultistepScheduler": {},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipelines")
    for name in tiny.MAKERS:
        tiny.save(name, folder)
    return folder


@contextmanager
def failing(
    module: torch.nn.Module, calls: set[int], error: type[Exception] = torch.OutOfMemoryError
) -> Iterator[list[int]]:
    """The calls of ``module`` with these numbers run out of memory."""
    count = [0]
    forward = module.forward

    def out_of_memory(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        if count[0] - 1 in calls:
            raise error("no room for 6 GiB")
        return forward(*args, **kwargs)

    module.forward = out_of_memory
    try:
        yield count
    finally:
        del module.forward


def with_sampler(name: str, sampler: str, saved: Path) -> Any:
    pipe = tiny.load(name, saved)
    if sampler != "ddim":
        pipe.scheduler = getattr(effusion, sampler).from_config(pipe.scheduler.config, **SAMPLERS[sampler])
    return pipe


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_same_bits(sampler: str, saved: Path) -> None:
    """At random steps, several times, deep inside of the network; with a generator and with the global state."""
    chance = random.Random(sampler)
    pipe = with_sampler("sd", sampler, saved)
    options: dict[str, Any] = {"num_inference_steps": 5, "eta": 0.7 if sampler == "ddim" else 0.0}
    for seeded in (True, False):
        if not seeded:
            options["generator"] = None
        torch.manual_seed(3)
        wanted = tiny.run("sd", pipe, **options)
        plan = pipe.fit("1GB", num_inference_steps=5, **SIZE)
        block = pipe.unet.mid_block
        with failing(block, {chance.randrange(2), 3 + chance.randrange(2)}) as count:
            torch.manual_seed(3)
            assert torch.equal(tiny.run("sd", pipe, **options), wanted)
        assert count[0] >= 7
        report = pipe.memory_report()
        assert sum("memory ran out in step" in note for note in report.notes) == 2
        assert pipe._plan.notes[-2:] == report.notes[-2:] and pipe._plan.rows != plan.rows and pipe._plan.exact
        torch.manual_seed(3)
        assert torch.equal(tiny.run("sd", pipe, **options), wanted)
        pipe.to("cpu")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError, BudgetError])
@pytest.mark.parametrize("part", ["text_encoder", "vae"])
def test_other_stages(part: str, error: type[Exception], saved: Path) -> None:
    pipe = tiny.load("sd", saved)
    wanted = tiny.run("sd", pipe)
    pipe.fit("1GB", num_inference_steps=2, **SIZE)
    module = pipe.text_encoder if part == "text_encoder" else pipe.vae.decoder
    with failing(module, {0}, error):
        assert torch.equal(tiny.run("sd", pipe), wanted)
    block = "encode" if part == "text_encoder" else "decode"
    assert any(f"the block '{block}'" in note for note in pipe.memory_report().notes)


def test_hoisting_goes_on(saved: Path) -> None:
    pipe = tiny.load("sd", saved)
    wanted = tiny.run("sd", pipe)
    plan = pipe.plan("1GB", num_inference_steps=2, **SIZE)
    pipe.apply(plan.replace(switches={**plan.switches, "hoist": True}))
    assert pipe._plan.exact
    assert torch.equal(tiny.run("sd", pipe), wanted)
    with failing(pipe.unet.conv_out, {1}):
        assert torch.equal(tiny.run("sd", pipe), wanted)
    assert torch.equal(tiny.run("sd", pipe), wanted)
    engine = engine_of(pipe.unet)
    assert engine is not None and engine.hoisting is not None
    pipe.to("cpu")
    assert torch.equal(tiny.run("sd", pipe), wanted) and engine_of(pipe.unet) is None


def test_more_than_the_leanest_plan(saved: Path) -> None:
    """The error comes through, and the pipeline can be used again; without a plan it comes at once."""
    pipe = tiny.load("sd", saved)
    wanted = tiny.run("sd", pipe)
    with failing(pipe.unet, set(range(100))) as count, pytest.raises(torch.OutOfMemoryError):
        tiny.run("sd", pipe)
    assert count[0] == 1
    plan = pipe.fit("1GB", num_inference_steps=2, **SIZE)
    tried = len(list(leaner(pipe.modules, plan)))
    with failing(pipe.unet.mid_block, set(range(100))) as count, pytest.raises(torch.OutOfMemoryError):
        tiny.run("sd", pipe)
    assert tried >= 3 and count[0] == tried + 1
    assert torch.equal(tiny.run("sd", pipe), wanted)


def test_leaner_plans_need_less(saved: Path) -> None:
    pipe = tiny.load("sdxl", saved)
    plan = pipe.plan("1GB", **SIZE)
    kept = []
    for made, how in leaner(pipe.modules, plan):
        assert made.exact and how
        assert {r.component for r in made.rows} == {r.component for r in plan.rows}
        kept.append(sum(r.nbytes for r in made.rows if r.keep or not r.travels))
    assert kept == sorted(kept, reverse=True) and kept[-1] < kept[0] / 2


def test_what_was_written_to_is_not_done_twice(saved: Path) -> None:
    """A step that changed the latents in place can't be put back: the error comes through."""
    pipe = tiny.load("sd", saved)
    plan = pipe.plan("1GB", **SIZE)

    class Run:
        latents = torch.zeros(3)

    run = Run()
    run.latents = torch.zeros(3)

    def work() -> None:
        run.latents += 1
        raise MemoryError

    with pytest.raises(MemoryError):
        Rescue(pipe.modules, plan, pipe.apply)("a step", work, run)
    assert run.latents[0] == 1
