"""Components that take turns in every step: a network and its ControlNet, there at once or fetched again each time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tests.pipelines.tiny_transformers import flux_controlnet

import effusion
from effusion.placement import planner
from effusion.placement.engine import Engine
from effusion.placement.forecast import Speed
from effusion.placement.pipeline_choices import Choices
from effusion.placement.rooms import Shared

from .parts import part

SLOW = Speed(1e12, 1e6, 1e10)


def turning(**more: Any) -> list[Any]:
    """A text encoder, and two networks that alternate for 10 steps."""
    loop = {"passes": 10, "turns": 10, "alternates": True, "activations": 0, **more}
    return [
        part("text", 8, 100_000, activations=0, passes=1),
        part("control", 4, 100_000, **loop),
        part("net", 8, 100_000, **loop),
    ]


def test_what_alternates_comes_again_in_every_step() -> None:
    """With the text encoder too large for all: both there at once is best, streaming next; by turns costs ten times."""
    parts = turning()
    both = planner.plan(parts, 1_210_000, None, "cuda:0", SLOW)
    assert both.switches["together"] == ["control", "net"] and both.exact
    assert [s.weights for s in both.stages][1:] == [1_200_000] * 2 and both.peak <= 1_210_000
    assert both.seconds < 2
    streamed = planner.plan(parts, 1_000_000, None, "cuda:0", SLOW)
    assert "together" not in streamed.switches and streamed.seconds > 4.8
    assert not any(r.keep for r in streamed.of("control")), "what is kept would come again each time"
    once = planner.plan(turning(turns=1, alternates=False), 1_000_000, None, "cuda:0", SLOW)
    assert once.seconds == pytest.approx(2, rel=0.01), "what does not alternate comes once"


class _Engine:
    def __init__(self, name: str) -> None:
        self.name, self.units, self.settled = name, [], 0

    def settle(self) -> None:
        self.settled += 1


def test_rooms_follow_the_plan() -> None:
    room = Shared(torch.device("cpu"))
    text, control, net = (_Engine(n) for n in ("text", "control", "net"))
    room.together = frozenset({"control", "net"})
    for engine in (text, control, net, control, net):
        room.enter(engine)  # type: ignore[arg-type]
    assert (text.settled, control.settled, net.settled) == (1, 0, 0)
    room.clear(name="control")
    assert net.settled == 0
    room.clear(name="vae")
    assert net.settled == control.settled == 1
    room.together = frozenset()
    for engine in (control, net, control):
        room.enter(engine)  # type: ignore[arg-type]
    assert net.settled == 2 and control.settled == 2


def test_a_control_network_and_its_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by the rehearsal, kept by the engine: with room for both each is fetched once, without it they are streamed."""
    import diffusers

    diffusers.FluxControlNetPipeline(**flux_controlnet(tmp_path)).save_pretrained(tmp_path / "pipe")
    pipe = effusion.FluxControlNetPipeline.from_pretrained(tmp_path / "pipe")
    pipe.set_progress_bar_config(disable=True)
    call: dict[str, Any] = {"height": 32, "width": 32, "num_inference_steps": 4}

    def run() -> torch.Tensor:
        g = torch.Generator().manual_seed(2)
        picture = Image.new("RGB", (32, 32), "red")
        out: torch.Tensor = pipe("a cat", control_image=picture, generator=g, output_type="pt", **call).images
        return out

    wanted = run()
    choices = Choices(pipe, pipe.modules, {**call, "batch_size": 1, "num_frames": None}, torch.device("cpu"))
    parts = {p.name: p for p in next(iter(choices.ways("exact")))[1]}
    assert {n for n, p in parts.items() if p.alternates} == {"transformer", "controlnet"}
    assert parts["transformer"].turns == 4 and parts["text_encoder"].turns == 1
    plan = pipe.plan("1GB", **call, device="cpu")
    home = {r.unit: "disk" for r in plan.rows if r.component in ("transformer", "controlnet")}
    rows = tuple(replace(r, home=home.get(r.unit, r.home), keep=r.unit in home) for r in plan.rows)
    dropped: list[str] = []
    drop = Engine._drop

    def noted(engine: Engine, unit: Any) -> None:
        dropped.append(engine.name)
        drop(engine, unit)

    monkeypatch.setattr(Engine, "_drop", noted)
    for together in ([], ["controlnet", "transformer"]):
        pipe.apply(plan.replace(rows=rows, switches={"together": together}))
        dropped.clear()
        assert torch.equal(run(), wanted)
        assert dropped.count("controlnet") == len(plan.of("controlnet")) * (1 if together else 4)
