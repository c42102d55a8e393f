"""Hoisting under every policy: the same bits, fewer weights, and back again."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from effusion.placement import hoisting, patches
from effusion.placement.engine import engine_of
from effusion.placement.foresight import Foresight, Known, NoWeights, Unforeseen
from effusion.placement.lender import MISS
from effusion.placement.table import Hoisting

from . import tiny_pipelines as tiny
from .conftest import travel_always

POLICIES: dict[str, Callable[[Any, Path], None]] = {
    "resident": lambda pipe, folder: None,
    "model": lambda pipe, folder: pipe.enable_model_cpu_offload(device="cpu"),
    "blocks": lambda pipe, folder: pipe.enable_group_offload("cpu", offload_type="block_level"),
    "leaves": lambda pipe, folder: pipe.enable_group_offload("cpu", offload_type="leaf_level", use_stream=True),
    "disk": lambda pipe, folder: pipe.enable_group_offload("cpu", use_stream=True, offload_to_disk_path=folder),
}
CAST = (("sd", "resident"), ("sdxl", "leaves"), ("flux", "disk"))
UNIT_OF = {"sd": "time_embedding", "sdxl": "add_embedding", "flux": "time_text_embed"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipelines")
    for name in tiny.MAKERS:
        tiny.save(name, folder)
    return folder


def table(pipe: Any) -> Hoisting:
    engine = engine_of(tiny.denoiser(pipe))
    assert engine is not None and engine.hoisting is not None
    return engine.hoisting


def fetched(pipe: Any, call: Callable[[], Any]) -> set[str]:
    """The names of the units that were lent during ``call``."""
    engine = engine_of(tiny.denoiser(pipe))
    assert engine is not None
    seen: set[str] = set()
    lend = engine._lend

    def noted(unit: Any) -> None:
        seen.add(unit.row.unit.partition("/")[2])
        lend(unit)

    engine._lend = noted  # type: ignore[method-assign]
    try:
        call()
    finally:
        del engine._lend
    return seen


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each question for a hoisted module had an answer."""
    asked: list[bool] = []
    answer = Hoisting.answer

    def noted(self: Hoisting, module: nn.Module, args: Any, kwargs: Any) -> Any:
        found = answer(self, module, args, kwargs)
        if module in self.modules:
            asked.append(found is not MISS)
        return found

    monkeypatch.setattr(Hoisting, "answer", noted)
    return asked


class _Stop(Exception):
    pass


def _stop(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    raise _Stop


CELLS = [(n, p, c) for n in tiny.MAKERS for p in POLICIES for c in (False, True) if not c or (n, p) in CAST]


@pytest.mark.parametrize(("name", "policy", "cast"), CELLS)
def test_policies(name: str, policy: str, cast: bool, saved: Path, tmp_path: Path, counted: list[bool]) -> None:
    """First call, second, after an exception in the middle, with the policy set after; and undone."""

    def prepare() -> Any:
        pipe = tiny.load(name, saved)
        if cast:
            pipe.enable_layerwise_casting(torch.float8_e4m3fn)
        return pipe

    wanted = tiny.run(name, prepare())
    pipe = prepare()
    POLICIES[policy](pipe, tmp_path)
    if policy != "resident":
        travel_always(tiny.denoiser(pipe))
    pipe.enable_hoisting()
    assert torch.equal(tiny.run(name, pipe), wanted)
    first = table(pipe)._answers
    units = fetched(pipe, lambda: tiny.run(name, pipe))
    if policy in ("leaves", "blocks"):
        assert units and not units & set(table(pipe).names)
    with pytest.raises(_Stop):
        tiny.run(name, pipe, callback_on_step_end=_stop)
    assert torch.equal(tiny.run(name, pipe), wanted)
    assert table(pipe)._answers is first and all(counted)
    state = {k: v.clone() for k, v in tiny.denoiser(pipe).state_dict().items()}
    pipe.enable_sequential_cpu_offload(device="cpu")
    engine = engine_of(tiny.denoiser(pipe))
    assert engine is not None and engine.hoisting is None, "the table outlived its policy"
    assert torch.equal(tiny.run(name, pipe), wanted)
    pipe.disable_hoisting()
    assert engine.hoisting is None
    assert all(torch.equal(v, state[k]) for k, v in tiny.denoiser(pipe).state_dict().items())
    pipe.remove_all_hooks()
    assert torch.equal(tiny.run(name, pipe), wanted)


@pytest.mark.parametrize("name", tiny.MAKERS)
def test_what_is_new_is_computed(name: str, saved: Path, counted: list[bool]) -> None:
    """Another seed keeps the table; another prompt, schedule, guidance or patch makes it again."""
    pipe, plain = tiny.load(name, saved), tiny.load(name, saved)
    pipe.enable_hoisting()
    g = torch.Generator().manual_seed(9)
    other = {"prompt": ["a hat", "a bat"]}
    if name == "flux":
        other = {"prompt_embeds": torch.randn(2, 5, 16, generator=g)}
    calls: list[dict[str, Any]] = [
        {}, {"generator": torch.Generator().manual_seed(77)}, other, {"num_inference_steps": 3}, {"guidance_scale": 1.0},
        {"guidance_scale": 4.0},
    ]  # fmt: skip
    for options in calls:
        again = {k: v.clone_state() if isinstance(v, torch.Generator) else v for k, v in options.items()}
        assert torch.equal(tiny.run(name, pipe, **again), tiny.run(name, plain, **options)), options
    assert all(counted)
    for network in (tiny.denoiser(pipe), tiny.denoiser(plain)):
        names = [n for n, p in network.named_parameters() if n.startswith(UNIT_OF[name]) and n.endswith("weight")]
        g.manual_seed(1)
        patches.add_patch(
            network, "style", {n: torch.randn(network.get_parameter(n).shape, generator=g) for n in names}
        )
    before = tiny.run(name, tiny.load(name, saved))
    patched = tiny.run(name, plain)
    assert not torch.equal(patched, before)
    assert torch.equal(tiny.run(name, pipe), patched)
    for scale in (0.5, 0.0):
        for each in (pipe, plain):
            patches.scale_patch(tiny.denoiser(each), "style", scale)
        assert torch.equal(tiny.run(name, pipe), tiny.run(name, plain))
    patches.remove_patch(tiny.denoiser(pipe), "style")
    assert torch.equal(tiny.run(name, pipe), before)


def test_a_call_that_was_not_foreseen(saved: Path, counted: list[bool]) -> None:
    """A callback that changes the prompt or a weight, or a call of the network by hand: no wrong result."""

    def meddle(kind: str) -> Callable[..., dict[str, Any]]:
        def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            network = pipe.components["unet"]
            if kind == "weight" and step == 0:
                network.time_embedding.linear_1.weight.data.mul_(1.5)
                network.time_embedding.linear_1.bias.mul_(1.5)
            return {"prompt_embeds": tensors["prompt_embeds"] * 1.1} if kind == "prompt" else {}

        return callback

    for kind in ("prompt", "weight"):
        pipe, plain = tiny.load("sd", saved), tiny.load("sd", saved)
        pipe.enable_hoisting()
        options = {"callback_on_step_end_tensor_inputs": ["prompt_embeds"], "num_inference_steps": 3}
        wanted = tiny.run("sd", plain, callback_on_step_end=meddle(kind), **options)
        assert torch.equal(tiny.run("sd", pipe, callback_on_step_end=meddle(kind), **options), wanted)
        assert torch.equal(tiny.run("sd", pipe), tiny.run("sd", plain))
    asked = len(counted)
    x, text = torch.randn(1, 4, 16, 16), torch.randn(1, 7, 16)
    with torch.no_grad():
        assert torch.equal(pipe.unet(x, 3, text).sample, plain.unet(x, 3, text).sample)
    assert len(counted) > asked and not any(counted[asked:])
    out = pipe.unet(x, 3, text).sample
    out.sum().backward()
    assert pipe.unet.time_embedding.linear_1.weight.grad is not None


def test_weights_written_behind_everyones_back(saved: Path) -> None:
    pipe, plain = tiny.load("sdxl", saved), tiny.load("sdxl", saved)
    pipe.enable_hoisting()
    tiny.run("sdxl", pipe)
    for each in (pipe, plain):
        each.unet.add_embedding.linear_1.weight.data += 0.1
    assert torch.equal(tiny.run("sdxl", pipe), tiny.run("sdxl", plain))
    for each in (pipe, plain):
        each.unet.half()
        each.unet.float()
    assert torch.equal(tiny.run("sdxl", pipe), tiny.run("sdxl", plain))
    pipe.unet.load_state_dict(tiny.load("sdxl", saved).unet.state_dict())
    assert torch.equal(tiny.run("sdxl", pipe), tiny.run("sdxl", tiny.load("sdxl", saved)))


def test_compiled_blocks_keep_what_is_inside(saved: Path) -> None:
    pipe = tiny.load("flux", saved)
    for block in pipe.transformer.single_transformer_blocks:
        block.compile(backend="eager")
    wanted = tiny.run("flux", pipe)
    pipe.enable_hoisting()
    assert torch.equal(tiny.run("flux", pipe), wanted)
    names = table(pipe).names
    assert "time_text_embed" in names and not any(n.startswith("single") for n in names)
    pipe.transformer.transformer_blocks[0].compile(backend="eager")
    found = tiny.run("flux", pipe)
    pipe.disable_hoisting()
    assert torch.equal(found, tiny.run("flux", pipe))
    pipe.enable_hoisting()
    assert torch.equal(found, tiny.run("flux", pipe))
    assert not any("blocks" in n for n in table(pipe).names)


def test_who_is_not_foreseen(saved: Path) -> None:
    """Hooks and foreign attention processors would see the rehearsal: nothing is hoisted, nothing breaks."""
    pipe = tiny.load("sd", saved)
    wanted = tiny.run("sd", pipe)
    pipe.enable_hoisting()
    seen: list[torch.device] = []
    handle = pipe.unet.conv_in.register_forward_hook(lambda m, a, out: seen.append(out.device))
    assert torch.equal(tiny.run("sd", pipe), wanted)
    assert engine_of(pipe.unet) is None and len(seen) == 2 and {d.type for d in seen} == {"cpu"}
    handle.remove()
    assert torch.equal(tiny.run("sd", pipe), wanted)
    assert table(pipe).names


class _Net(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.time, self.body, self.big = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 64)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        time = self.time(t) * self.scale
        if self.kind == "looks" and time.sum() > 0:
            time = -time
        if self.kind == "draws":
            time = time + torch.randn(4)
        if self.kind == "writes":
            room = torch.zeros(2, 4)
            room[:1] = self.body(x)[:1]
            time = time + self.big(room)[:1, :4]
        if self.kind == "twice":
            time = time + self.time(x)
        return self.body(x) + time


class _Peeking(_Net):
    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return super().forward(x @ self.time.weight, t)


class _Reaching(_Net):
    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return super().forward(x @ next(iter(self.time.parameters())), t)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("plain", {"time"}),
        ("looks", set()),
        ("draws", set()),
        ("writes", {"time"}),
        ("twice", set()),
        ("peeks", set()),
        ("reaches", set()),
    ],
)
def test_what_can_be_hoisted(kind: str, names: set[str]) -> None:
    """Nothing that looks at values that differ, draws, or whose weights are needed elsewhere."""
    torch.manual_seed(0)
    net = {"peeks": _Peeking, "reaches": _Reaching}.get(kind, _Net)(kind).requires_grad_(False)
    times = [torch.full((1, 4), value) for value in (0.9, -0.9)]
    latents = [torch.randn(2, 4) for _ in times]
    torch.manual_seed(1)
    wanted = [net(x, t) for x, t in zip(latents, times, strict=True)]
    torch.manual_seed(1)
    hoisting.foresee({"net": net}, lambda: [net(torch.empty(2, 4, device="meta"), t) for t in times])
    engine = engine_of(net)
    hoisted = set(engine.hoisting.names) if engine is not None and engine.hoisting is not None else set()
    assert hoisted == names
    with torch.no_grad():
        assert all(torch.equal(net(x, t), w) for x, t, w in zip(latents, times, wanted, strict=True))
    hoisting.unhoist(net)
    assert engine_of(net) is None


def test_tables_larger_than_weights_are_not_made() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).requires_grad_(False)
    calls = [(((torch.empty(1, 2, device="meta")),), {})]
    assert hoisting.hoistable(net, calls).modules == ()

    class Add(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return x + self.inner(t)

    def found(steps: int) -> hoisting.Hoistable:
        x = torch.empty(1, 4, device="meta")
        return hoisting.hoistable(Add(), [((x, torch.zeros(1, 4)), {}), ((x, torch.ones(1, 4)), {})], steps)

    assert found(4) == hoisting.Hoistable(("inner",), 80, 64, 80)
    assert found(5).modules == () and found(4).part == 1.0


def test_foresight_of_operators() -> None:
    known, unknown = Known.of([torch.ones(2), torch.zeros(2)]), torch.empty(2, device="meta")
    with Foresight(NoWeights(torch.device("cpu"))):
        assert isinstance(known * 2, Known) and unknown.device == torch.device("cpu")
        assert (known * 2).shape == (2,) and known.to(unknown.device).dtype == torch.float32
        room = torch.zeros(2)
        room += unknown
        mixed = [known + unknown, unknown.to("cpu"), room + 1, torch.cat([known, unknown])]
        with pytest.raises(Unforeseen, match="differs"):
            bool(known.sum() > 0)
        with pytest.raises(Unforeseen):
            unknown.sum().item()
    assert all(t.is_meta and not isinstance(t, Known) for t in mixed)


def test_a_look_up_costs_little(saved: Path) -> None:
    """No memory is left behind by runs that find their table."""
    pipe = tiny.load("flux", saved)
    pipe.enable_hoisting()
    for _ in range(2):
        tiny.run("flux", pipe)
    tracemalloc.start()
    before = tracemalloc.take_snapshot()
    for _ in range(3):
        tiny.run("flux", pipe)
    grown = [s for s in tracemalloc.take_snapshot().compare_to(before, "filename") if "placement" in str(s.traceback)]
    tracemalloc.stop()
    assert sum(s.size_diff for s in grown) < 100_000
