"""Hoisting changes no bit of any family's pictures, in any task."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import effusion
from effusion.placement.engine import engine_of
from effusion.placement.lender import MISS
from effusion.placement.table import Hoisting

from . import test_parity, test_transformer_parity
from .conftest import Pipes
from .test_parity import Case

ALL = [*test_parity.CASES, *test_transformer_parity.CASES, *test_transformer_parity.SILENT]
MORE = ("sd no guidance", "i2i ancestral", "sd3-skip", "qwen-cfg", "flux-dev-cfg", "flux-controlnet-part", "sigma-free")
# one case for each face with each checkpoint, and what is special about the calls of the network
CASES = [*{(c.face, c.checkpoint): c for c in reversed(ALL)}.values(), *(c for c in ALL if c.name in MORE)]


def picture(pipe: Any, case: Case) -> torch.Tensor:
    inputs = case.inputs()
    if inputs["output_type"] == "np":
        inputs["output_type"] = "latent"
    return torch.stack([torch.as_tensor(np.array(image)) for image in pipe(**inputs).images])


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_same_bits(case: Case, ours: Pipes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, the first time and the second, which finds the table of the first and asks it for everything."""
    pipe = ours(case.face, case.checkpoint)
    if case.scheduler is not None:
        pipe.scheduler = getattr(effusion, case.scheduler).from_config(pipe.scheduler.config, **case.scheduler_config)
    network = pipe.components[pipe.family.denoiser]
    wanted = picture(pipe, case)
    asked: list[bool] = []
    answer = Hoisting.answer

    def noted(self: Hoisting, *args: Any) -> Any:
        found = answer(self, *args)
        asked.append(found is not MISS)
        return found

    monkeypatch.setattr(Hoisting, "answer", noted)
    pipe.enable_hoisting()
    try:
        assert torch.equal(picture(pipe, case), wanted)
        engine = engine_of(network)
        assert engine is not None and engine.hoisting is not None
        table = engine.hoisting._answers
        assert 0 < engine.hoisting.table < engine.hoisting.weights
        assert torch.equal(picture(pipe, case), wanted)
        assert engine.hoisting._answers is table, "made again"
        assert asked and all(asked)
    finally:
        pipe.disable_hoisting()
    assert engine_of(network) is None
