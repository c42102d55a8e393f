"""Every family, in every task, within the least memory there is a plan for: the same bits, stage by stage as foreseen."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from effusion.placement.pipeline_choices import Choices

from . import test_control_parity, test_parity, test_transformer_parity
from .conftest import Pipes
from .test_hoisting import picture
from .test_parity import Case


class Untold(Case):
    """Nobody says what to draw."""

    def inputs(self) -> dict[str, Any]:
        return {name: value for name, value in super().inputs().items() if name != "prompt"}


MORE = [
    Untold("dit", "DiTPipeline", "dit", {"class_labels": [1, 3]}),
    Untold("ddpm", "DDPMPipeline", "ddpm", {}),
    Untold("ddim", "DDIMPipeline", "ddpm", {"batch_size": 2}),
]
ALL = [
    *test_parity.CASES, *test_transformer_parity.CASES, *test_transformer_parity.SILENT, *test_control_parity.CASES, *MORE
]  # fmt: skip
CASES = list({c.face: c for c in reversed(ALL)}.values())  # one for each face


def planned(inputs: dict[str, Any]) -> dict[str, Any]:
    """The call as plans are asked for it."""
    image = inputs.get("image")
    size = {"height": getattr(image, "height", None), "width": getattr(image, "width", None)}
    taken = {**size, "batch_size": 1, **inputs, "device": "cpu"}
    return {name: value for name, value in taken.items() if value is not None}


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.face)
def test_the_least_plan_gives_the_same_picture(case: Case, ours: Pipes) -> None:
    pipe = ours(case.face, case.checkpoint)
    wanted = picture(pipe, case)
    call = planned(case.inputs())
    everything = pipe.plan("64GB", **call)
    asked = {**dict.fromkeys(("height", "width", "num_frames")), **call, **everything.call}
    least = Choices(pipe, pipe.modules, asked, torch.device("cpu")).least("exact")
    try:
        plan = pipe.fit(least, **call)
        assert plan.exact and plan.peak <= least < everything.peak
        assert any(row.travels for row in plan.rows)
        assert torch.equal(picture(pipe, case), wanted)
        report = pipe.memory_report()
        assert list(report.stages) and set(report.stages) <= {stage.name for stage in plan.stages}
        assert not any("planned again" in note for note in report.notes), report.notes
    finally:
        pipe.remove_all_hooks()
    assert torch.equal(picture(pipe, case), wanted)


@pytest.mark.parametrize("options", [{}, {"strength": 0.1}, {"denoising_start": 0.9, "output_type": "latent"}], ids=str)
def test_calls_of_few_steps_are_rehearsed_with_enough(options: dict[str, Any], ours: Pipes) -> None:
    """The default strength of this task leaves nothing of three steps."""
    case = next(c for c in CASES if c.face == "StableDiffusionXLImg2ImgPipeline")
    pipe = ours(case.face, case.checkpoint)
    plan = pipe.plan("64GB", height=32, width=32, device="cpu", **options)
    assert {"unet", "vae"} <= {stage.name for stage in plan.stages if stage.activations}
