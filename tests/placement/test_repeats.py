"""Blocks that are alike are rehearsed once, and nothing that is counted changes by it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from effusion.placement import rehearsal
from effusion.placement.rehearsal import Rehearsed, rehearse

from . import tiny_pipelines as tiny


class Block(nn.Module):
    def __init__(self, width: int = 8, keeps: bool = False) -> None:
        super().__init__()
        self.keeps = keeps
        self.linear = nn.Linear(width, width)
        self.calls = {"all": 0}

    def forward(self, x: Tensor, seen: Any = None) -> Tensor:
        self.calls["all"] += 1
        y = torch.relu(self.linear(x).repeat(2, 1))[: x.shape[0]]
        if self.keeps:
            self.kept = y * 2
        if seen is not None:
            seen.note(y)
        return x + y


class Chain(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(**options) for _ in range(5))

    def forward(self, x: Tensor, seen: Any = None) -> Tensor:
        for block in self.blocks:
            x = block(x, seen)
        return x

    @property
    def carried_out(self) -> int:
        return sum(b.calls["all"] for b in self.blocks)


def both(net: nn.Module, run: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is counted with twins, and without."""
    counted = []
    for twins in (True, False):
        if not twins:
            monkeypatch.setattr(rehearsal, "rehearse_once", lambda *_: None)
        found = rehearse({"net": net}, run, torch.device("cpu"))["net"]
        assert found.failure is None
        counted.append(_numbers(found))
    return counted


def _numbers(found: Rehearsed) -> Any:
    return found.activations, found.workspaces, found.once, list(found.touched.items()), found.kernels


def test_one_of_a_chain_is_carried_out_and_counts_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Chain()
    x = torch.randn(4, 8)
    twins, each = both(net, lambda: net(x), monkeypatch)
    assert twins == each
    assert net.carried_out == 1 + 5
    assert len(twins[3]) == 10


def test_another_shape_another_setting_is_another_call() -> None:
    net = Chain()
    net.blocks[2].keeps = True
    net.blocks[3] = Block(8, keeps=False)
    rehearse({"net": net}, lambda: net(torch.randn(4, 8)), torch.device("cpu"))
    assert net.carried_out == 2
    rehearse({"net": net}, lambda: [net(torch.randn(n, 8)) for n in (4, 6)], torch.device("cpu"))
    assert net.carried_out == 2 + 2 * 2


@pytest.mark.parametrize("way", ["keeps", "object", "hook"])
def test_calls_with_effects_are_all_carried_out(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net = Chain(keeps=way == "keeps")
    seen: list[Any] = []

    class Notes:
        def note(self, y: Tensor) -> None:
            seen.append(y.shape)

    if way == "hook":
        for block in net.blocks:
            block.linear.register_forward_hook(lambda *_: seen.append(1))
    x = torch.randn(4, 8)
    twins, each = both(net, lambda: net(x, Notes() if way == "object" else None), monkeypatch)
    assert twins == each
    assert net.carried_out == 10
    assert len(seen) == (0 if way == "keeps" else 10)


@pytest.mark.parametrize("name", ["sd", "sdxl", "flux"])
def test_networks_count_the_same(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.save(name, tmp_path)
    pipe = tiny.load(name, tmp_path)
    with pytest.raises(TypeError, match="promt_embeds"):
        pipe.plan("1GB", promt_embeds=None)
    call: dict[str, Any] = {"height": 32, "width": 32, "device": "cpu"}
    if name == "flux":
        config = pipe.transformer.config
        call["prompt_embeds"] = torch.zeros(1, 6, config.joint_attention_dim)
        call["pooled_prompt_embeds"] = torch.zeros(1, config.pooled_projection_dim)
    twins = pipe.plan("1GB", ram="1GB", **call)
    monkeypatch.setattr(rehearsal, "rehearse_once", lambda *_: None)
    each = pipe.plan("1GB", ram="1GB", **call)
    assert (each.rows, each.stages) == (twins.rows, twins.stages)
