"""What plans may do besides moving weights: leave them out of the loop, let them rest in smaller forms; and undo it."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import small

import effusion
from effusion.core.errors import BudgetError
from effusion.placement import casting, pages
from effusion.placement.engine import engine_of
from effusion.placement.forecast import Speed
from effusion.placement.pipeline_choices import Choices
from effusion.placement.sources import Mappings, present_bytes, set_apart

SIZE, STEPS = 128, 2
CALL: dict[str, Any] = {"height": SIZE, "width": SIZE, "num_inference_steps": STEPS, "device": "cpu"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.save("FLUX.1", tmp_path_factory.mktemp("ways"), 32)


@pytest.fixture
def pipe(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A pipeline on a machine whose disk is so slow that whatever spares reading is worth it."""
    slow = Speed(1e12, 1e6, 1e10, copying=1e10)
    monkeypatch.setattr(Choices, "speed", lambda *_: slow)
    made = effusion.DiffusionPipeline.from_pretrained(folder)
    made.set_progress_bar_config(disable=True)
    yield made
    made.remove_all_hooks()


def run(pipe: Any, **more: Any) -> torch.Tensor:
    call = {"height": SIZE, "width": SIZE, "num_inference_steps": STEPS, "output_type": "pt", **more}
    out: torch.Tensor = pipe("a cat", **call, generator=torch.Generator().manual_seed(3)).images
    return out


def tight(pipe: Any) -> int:
    """A budget that the weights of the transformer don't fit into."""
    plan = pipe.plan("4GB", **CALL)
    transformer = sum(p.nbytes for p in pipe.transformer.parameters())
    return int(max(s.activations + s.workspaces for s in plan.stages) + 0.6 * transformer)


def test_a_plan_leaves_out_of_the_loop_what_it_need_not_stream(pipe: Any) -> None:
    wanted = run(pipe)
    plan = pipe.fit(tight(pipe), **CALL)
    assert plan.switches["hoist"] and plan.exact
    hoisted = pipe.transformer, sum(p.nbytes for p in pipe.transformer.parameters())
    assert sum(r.nbytes for r in plan.of("transformer")) < 0.85 * hoisted[1]
    assert torch.equal(run(pipe), wanted)
    engine = engine_of(pipe.transformer)
    assert engine is not None and engine.hoisting is not None and engine.hoisting.weights > 0.2 * hoisted[1]
    assert torch.equal(run(pipe), wanted)
    everything = pipe.fit("4GB", **CALL)
    assert "hoist" not in everything.switches
    engine = engine_of(pipe.transformer)
    assert engine is None or engine.hoisting is None
    assert torch.equal(run(pipe), wanted)


def test_what_cant_be_left_out_of_the_loop_after_all(pipe: Any) -> None:
    """A hook was added since: weights are in the loop again, so another plan is made, that keeps the budget too."""
    wanted = run(pipe)
    plan = pipe.fit(tight(pipe), **CALL)
    assert plan.switches["hoist"] == ["transformer"]
    handle = pipe.transformer.register_forward_hook(lambda *_: None)
    assert torch.equal(run(pipe), wanted)
    report = pipe.memory_report()
    assert any("transformer: FluxTransformer2DModel has hooks" in note for note in report.notes)
    assert "hoist" not in report.plan.switches and report.plan.peak <= report.plan.budget == plan.budget
    before = pipe._plan
    assert torch.equal(run(pipe), wanted) and pipe._plan is before
    handle.remove()


def test_more_steps_are_a_larger_table(pipe: Any) -> None:
    pipe.fit(tight(pipe), **CALL)
    run(pipe, num_inference_steps=3)
    assert pipe._plan.call["num_inference_steps"] == 3


def test_hoisted_again_after_memory_ran_out(pipe: Any) -> None:
    wanted = run(pipe)
    pipe.fit(tight(pipe), **CALL)
    net, tables = pipe.transformer, list[bool]()
    forward = net.proj_out.forward

    def fails(*args: Any) -> Any:
        engine = engine_of(net)
        if args[0].device.type == "cpu" and type(args[0]) is torch.Tensor:
            tables.append(engine is not None and engine.hoisting is not None)
            if len(tables) == 2:
                raise torch.OutOfMemoryError("no room")
        return forward(*args)

    net.proj_out.forward = fails
    assert torch.equal(run(pipe), wanted)
    del net.proj_out.forward
    assert tables == [False, True, False, True, True], "the weights stayed in the loop"  # foreseen, and again


def test_hoisting_lowers_the_least_budget_and_the_error_says_so(pipe: Any) -> None:
    choices = Choices(pipe, pipe.modules, {**CALL, "batch_size": 1, "num_frames": None}, torch.device("cpu"))
    ways = {tuple(switches): parts for switches, parts in choices.ways("exact")}
    plain, hoisted = ({p.name: p for p in ways[key]}["transformer"] for key in ((), ("hoist",)))
    assert hoisted.nbytes + hoisted.hoisted == plain.nbytes
    assert hoisted.activations > plain.activations, "the table takes room"
    with pytest.raises(BudgetError, match="quality='lossy'|x64 pixels"):
        pipe.plan("1MB", **CALL)


@pytest.mark.parametrize(("quality", "form"), [("near", "bfloat16"), ("lossy", "float8_e4m3fn")])
def test_weights_rest_in_smaller_forms_only_when_asked_for(pipe: Any, folder: Path, quality: str, form: str) -> None:
    wanted = run(pipe)
    everything = sum(p.nbytes for m in pipe.modules.values() for p in m.parameters())
    needed = max(s.activations + s.workspaces for s in pipe.plan("4GB", **CALL).stages)
    budget = int(needed + (0.8 if quality == "near" else 0.5) * everything)
    assert pipe.plan(budget, **CALL).exact
    plan = pipe.fit(budget, quality=quality, **CALL)
    assert plan.switches["storage_dtype"] == form and not plan.exact
    assert {r.form for r in plan.of("transformer")} == {form} and {r.form for r in plan.of("vae")} == {"as stored"}
    assert pipe.transformer.transformer_blocks[0].attn.to_q.weight.dtype == getattr(torch, form)
    said = [float(n.split("are ")[1].split("%")[0]) for n in plan.notes if f"weights in {form}" in n]
    assert len(said) == 3 and all((0.1, 1.5)[quality == "lossy"] < n < (0.5, 4.0)[quality == "lossy"] for n in said)
    cast = effusion.DiffusionPipeline.from_pretrained(folder)
    cast.set_progress_bar_config(disable=True)
    for name in ("text_encoder", "text_encoder_2", "transformer"):
        module = getattr(cast, name)
        casting.apply_layerwise_casting(module, getattr(torch, form), torch.float32, casting.usual_patterns(module))
    assert torch.equal(run(pipe), run(cast)), "not what casting by hand gives"
    again = pipe.fit(budget, **CALL)
    assert again.exact and {r.form for r in again.rows} == {"as stored"}
    assert pipe.transformer.transformer_blocks[0].attn.to_q.weight.dtype == torch.float32
    assert torch.equal(run(pipe), wanted)
    spans = Mappings()
    assert all(spans.span(p) is not None for p in pipe.transformer.parameters()), "they don't rest in their file again"


def test_from_streaming_to_smaller_forms_and_from_one_to_another(pipe: Any) -> None:
    """Every plan replaces the one before, whatever travelled and however weights rested; the last is exact again."""
    wanted = run(pipe)
    everything = sum(p.nbytes for m in pipe.modules.values() for p in m.parameters())
    needed = max(s.activations + s.workspaces for s in pipe.plan("4GB", **CALL).stages)
    assert any(row.travels for row in pipe.fit(tight(pipe), **CALL).rows)
    pictures = {}
    for quality, share in (("near", 0.8), ("lossy", 0.5), ("near", 0.8), ("lossy", 0.5)):
        plan = pipe.fit(int(needed + share * everything), quality=quality, **CALL)
        assert pipe.transformer.transformer_blocks[0].attn.to_q.weight.dtype == getattr(
            torch, plan.switches["storage_dtype"]
        )
        assert any(plan.switches["storage_dtype"] in note for note in plan.notes)
        assert torch.equal(run(pipe), pictures.setdefault(quality, run(pipe)))
    assert not torch.equal(pictures["near"], pictures["lossy"])
    pipe.fit(tight(pipe), **CALL)
    assert torch.equal(run(pipe), wanted)


def test_casting_by_hand_under_a_plan_that_streams(pipe: Any, folder: Path) -> None:
    cast = effusion.DiffusionPipeline.from_pretrained(folder)
    cast.set_progress_bar_config(disable=True)
    plan = pipe.fit(tight(pipe), **CALL)
    assert any(row.travels for row in plan.rows)
    for each in (pipe, cast):
        each.enable_layerwise_casting(torch.float8_e4m3fn, exclude_modules="vae")
    assert torch.equal(run(pipe), run(cast))
    for each in (pipe, cast):
        each.to(torch.bfloat16)
    assert torch.equal(run(pipe), run(cast))


@pytest.mark.parametrize("quality", ["near", "lossy"])
def test_another_dtype_under_a_plan_with_smaller_forms(pipe: Any, folder: Path, quality: str) -> None:
    """Casts compute in the new dtype, and what they are undone to has it as well."""
    everything = sum(p.nbytes for m in pipe.modules.values() for p in m.parameters())
    needed = max(s.activations + s.workspaces for s in pipe.plan("4GB", **CALL).stages)
    plan = pipe.fit(int(needed + (0.8 if quality == "near" else 0.5) * everything), quality=quality, **CALL)
    assert "storage_dtype" in plan.switches
    pipe.to(torch.bfloat16)
    assert pipe.transformer.dtype == torch.bfloat16
    run(pipe)
    pipe.fit("4GB", **CALL)
    assert {p.dtype for m in pipe.modules.values() for p in m.parameters()} == {torch.bfloat16}
    plain = effusion.DiffusionPipeline.from_pretrained(folder).to(torch.bfloat16)
    plain.set_progress_bar_config(disable=True)
    assert torch.equal(run(pipe), run(plain))


def test_another_policy_undoes_the_forms_of_a_plan(pipe: Any) -> None:
    wanted = run(pipe)
    everything = sum(p.nbytes for m in pipe.modules.values() for p in m.parameters())
    needed = max(s.activations + s.workspaces for s in pipe.plan("4GB", **CALL).stages)
    pipe.fit(int(needed + 0.5 * everything), quality="lossy", **CALL)
    pipe.enable_model_cpu_offload(device="cpu")
    assert pipe.transformer.dtype == torch.float32
    assert torch.equal(run(pipe), wanted)


def test_no_room_is_taken_of_what_a_looser_run_has_left_free() -> None:
    """Pieces of the heap that were freed are not filled again while memory is held to the page."""
    pieces = [torch.ones(100_000) for _ in range(64)]  # below the size from which memory comes from the system
    keep = pieces[::2]
    del pieces
    with pages.exact():
        before = pages.held()
        tensors = [torch.ones(90_000) for _ in range(32)]
        del tensors
        assert pages.held() - before < 2 << 20, "freed memory was kept"
    assert len(keep) == 32


def test_room_is_made_for_a_large_unit_where_there_is_little(monkeypatch: pytest.MonkeyPatch) -> None:
    from effusion.placement import apply_group_offloading, engine

    monkeypatch.setattr(engine, "LARGE", 1000)
    made: list[int] = []
    monkeypatch.setattr(pages, "trim", lambda: made.append(1))
    net = torch.nn.Sequential(torch.nn.Linear(40, 40), torch.nn.Linear(4, 4))
    apply_group_offloading(net, "cpu", offload_type="leaf_level")
    held = engine_of(net)
    assert held is not None
    held.always_travel = True
    held.install()
    monkeypatch.setattr(pages, "available_ram", lambda: 1 << 40)
    net[0](torch.zeros(1, 40))
    assert not made
    monkeypatch.setattr(pages, "available_ram", lambda: engine.COPIES * 40 * 40 * 4 - 1)
    net[0](torch.zeros(1, 40)), net[1](torch.zeros(1, 4))
    assert made == [1]


@pytest.mark.skipif(not hasattr(mmap, "MADV_RANDOM"), reason="the system takes no advice")
def test_reading_what_stays_brings_in_nothing_else(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from effusion.weights.slices import MappedFile, TensorSlice

    file, count, size = tmp_path / "a.safetensors", 64, 64 << 10
    save_file({f"{i:03}": torch.full((size,), i, dtype=torch.uint8) for i in range(count)}, file)
    start = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    mapped = MappedFile(file)
    tensors = [
        mapped.tensor(TensorSlice(file, start + i * size, size, torch.uint8, (size,))) for i in range(count)
    ]  # fmt: skip
    inside, outside = tensors[::4], [t for i, t in enumerate(tensors) if i % 4]
    set_apart(inside, outside)
    assert all(int(t[size // 2]) == 4 * i for i, t in enumerate(inside))
    for t in inside:
        t.sum()
    assert sum(map(present_bytes, inside)) == len(inside) * size
    assert sum(map(present_bytes, outside)) <= 2 * 4096 * len(inside), "neighbours came along"
    spans = [Mappings().span(t) for t in tensors]
    assert [s.offset - start for s in spans if s is not None] == [i * size for i in range(count)]
