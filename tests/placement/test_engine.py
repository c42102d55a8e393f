"""The engine on small networks: every policy gives the same bits, and what rests stays true."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from effusion.core.errors import BudgetError, PlanConflict
from effusion.placement import arena, lane, moving, policies
from effusion.placement.engine import engine_of

from . import toys
from .conftest import POLICIES, Policy, travel_always


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    return all(_same(x, y) for x, y in zip(a, b, strict=True))


def _net() -> tuple[nn.Module, tuple[Any, ...]]:
    net = toys.Net().eval()
    net.conv.to(memory_format=torch.channels_last)
    return net, (torch.randn(3, 16),)


NETS = {
    "net": _net,
    "tied": lambda: (toys.Tied(), (torch.arange(5),)),
    "peeking": lambda: (toys.Peeking().eval(), (torch.randn(2, 3, 8),)),
    "views": lambda: (toys.Views(), (3,)),
    "coder": lambda: (toys.Coder(), (torch.randn(2, 6),)),
}


@pytest.mark.parametrize("name", NETS)
def test_same_bits_under_every_policy(name: str, policy: Policy, tmp_path: Path) -> None:
    module, inputs = NETS[name]()
    with torch.no_grad():
        resident = module(*inputs)
    before = {k: (v.clone(), v.stride()) for k, v in module.state_dict().items()}
    policy(module, tmp_path)
    with torch.no_grad():
        for _ in range(3):
            assert _same(module(*inputs), resident)
    policies.free(module)
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key][0]), key
        assert value.stride() == before[key][1], key
    policies.remove(module)
    assert engine_of(module) is None
    with torch.no_grad():
        assert _same(module(*inputs), resident)
    assert not list(tmp_path.iterdir()), "offload files outlive their policy"


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_modes_can_alternate(mode: Any, policy: Policy, tmp_path: Path) -> None:
    module, inputs = _net()
    with torch.no_grad():
        resident = module(*inputs)
    policy(module, tmp_path)
    with mode():
        assert _same(module(*inputs), resident)
    assert _same(module(*inputs), resident)  # with gradients
    with mode():
        assert _same(module(*inputs), resident)
    policies.remove(module)


def test_gradients_reach_resting_weights(policy: Policy, tmp_path: Path) -> None:
    module, inputs = _net()
    module(*inputs)[0].sum().backward()
    wanted = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    policy(module, tmp_path)
    module(*inputs)[0].sum().backward()
    policies.remove(module)
    found = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys()
    for name, grad in found.items():
        assert torch.equal(grad, wanted[name]), name


def test_methods_place_their_weights(policy: Policy, tmp_path: Path) -> None:
    module = toys.Coder()
    x = torch.randn(2, 6)
    with torch.no_grad():
        z, y = module.encode(x), module.decode(module.encode(x))
        policy(module, tmp_path)
        assert torch.equal(module.encode(x), z)
        assert torch.equal(module.decode(z), y)
    policies.remove(module)
    assert "encode" not in module.__dict__


def test_lent_tensors_are_other_memory(tmp_path: Path) -> None:
    module = toys.Fails()
    seen: list[tuple[int, int]] = []
    resting = module.blocks[1].up.weight.data_ptr()
    module.blocks[1].up.register_forward_pre_hook(lambda m, a: seen.append((m.weight.data_ptr(), resting)))
    POLICIES["leaf"](module, tmp_path)
    with torch.no_grad():
        module(torch.randn(2, 8))
    assert seen[0][0] != seen[0][1]
    policies.remove(module)


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt(), torch.OutOfMemoryError("no room")])
def test_exceptions_in_the_middle(policy: Policy, tmp_path: Path, error: BaseException) -> None:
    module, x = toys.Fails(), torch.randn(2, 8)
    with torch.no_grad():
        resident = module(x)
    before = dict(module.named_parameters())
    policy(module, tmp_path)
    module.fail_at, module.error = 2, error
    for _ in range(2):
        with torch.no_grad(), pytest.raises(type(error)):
            module(x)
    policies.free(module)
    assert all(p is before[n] for n, p in module.named_parameters())
    module.fail_at = None
    with torch.no_grad():
        assert torch.equal(module(x), resident)
    policies.remove(module)


def test_policies_replace_one_another(tmp_path: Path) -> None:
    module, inputs = _net()
    with torch.no_grad():
        resident = module(*inputs)
        for name in [*POLICIES, *reversed(POLICIES)]:
            POLICIES[name](module, tmp_path)
            assert _same(module(*inputs), resident), name
    moving.to(module, "cpu")
    assert engine_of(module) is None
    assert not any(isinstance(m.__dict__.get("compile"), object) and "compile" in m.__dict__ for m in module.modules())


def test_what_a_call_writes_is_kept(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    twin = copy.deepcopy(module)
    x = torch.randn(6, 4)
    POLICIES["disk-leaf-stream"](module, tmp_path)
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(module(x), twin(x))
    assert torch.equal(module[1].running_mean, twin[1].running_mean)
    assert int(module[1].num_batches_tracked) == 3
    module.eval(), twin.eval()
    with torch.no_grad():
        assert torch.equal(module(x), twin(x))
    policies.remove(module)


@pytest.mark.parametrize("name", ["disk-leaf-stream", "disk-block", "leaf-stream", "model"])
def test_weights_changed_by_hand_are_used(name: str, tmp_path: Path) -> None:
    """In place, through ``.data``, by assignment, by load_state_dict: what is in the module is the truth."""
    module, inputs = _net()
    twin = copy.deepcopy(module)
    POLICIES[name](module, tmp_path)

    def check() -> None:
        with torch.no_grad():
            assert _same(module(*inputs), twin(*inputs))
        policies.free(module)

    check()
    with torch.no_grad():
        for m in (module, twin):
            m.blocks[1].up.weight.mul_(1.5)
    check()
    for m in (module, twin):
        m.blocks[2].up.weight.data += 0.25  # no version counter sees this
    check()
    for m in (module, twin):
        m.enter.weight = nn.Parameter(torch.full((16, 16), 0.125))
    check()
    state = {k: v * 0.5 for k, v in twin.state_dict().items()}
    module.load_state_dict(state), twin.load_state_dict(state)
    check()
    module.load_state_dict({k: v.clone() for k, v in state.items()}, assign=True)
    check()
    policies.remove(module)


def test_dtype_and_layout_change_under_a_policy(tmp_path: Path) -> None:
    module, inputs = _net()
    twin = copy.deepcopy(module)
    POLICIES["disk-leaf-stream"](module, tmp_path)
    moving.to(module, dtype=torch.float64), twin.to(torch.float64)
    with torch.no_grad():
        assert _same(module(inputs[0].double()), twin(inputs[0].double()))
    moving.to(module, memory_format=torch.channels_last), twin.to(memory_format=torch.channels_last)
    with torch.no_grad():
        assert _same(module(inputs[0].double()), twin(inputs[0].double()))
    assert module.conv.weight.stride() == twin.conv.weight.stride()
    module.half(), twin.half()  # behind the engine's back: a plain nn.Module
    with torch.no_grad():
        assert _same(module(inputs[0].half()), twin(inputs[0].half()))
    policies.remove(module)


def test_weights_gone_to_meta_are_named(tmp_path: Path) -> None:
    module, inputs = _net()
    kept = copy.deepcopy(module)
    POLICIES["leaf"](module, tmp_path)
    module.blocks[1].to("meta")
    with pytest.raises(PlanConflict, match=r"blocks\.1\..*meta"), torch.no_grad():
        module(*inputs)
    policies.remove(module)
    module.blocks[1] = kept.blocks[1]
    POLICIES["leaf"](module, tmp_path)
    with torch.no_grad():
        assert _same(module(*inputs), kept(*inputs))
    policies.remove(module)


def test_two_policies_that_overlap_are_refused(tmp_path: Path) -> None:
    module, _ = _net()
    POLICIES["leaf"](module, tmp_path)
    with pytest.raises(PlanConflict, match="the whole that it is part of"):
        POLICIES["leaf"](module.blocks[0], tmp_path)
    policies.remove(module)
    POLICIES["leaf"](module.blocks[0], tmp_path)
    with pytest.raises(PlanConflict, match="a part of it"):
        POLICIES["block"](module, tmp_path)
    policies.remove(module.blocks[0])
    POLICIES["block"](module, tmp_path)
    policies.remove(module)


def test_copies_and_pickles_are_free_of_it(policy: Policy, tmp_path: Path) -> None:
    module, inputs = _net()
    with torch.no_grad():
        resident = module(*inputs)
    policy(module, tmp_path)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert engine_of(twin) is None
        assert not any(m.__dict__.get("_compiled_call_impl") for m in twin.modules())
        with torch.no_grad():
            assert _same(twin(*inputs), resident)
    policies.remove(module)


def test_engines_die_with_their_modules(tmp_path: Path) -> None:
    module, inputs = _net()
    POLICIES["disk-leaf-stream"](module, tmp_path)
    with torch.no_grad():
        module(*inputs)  # what was fetched ahead is still in the ring
    engine, root = weakref.ref(engine_of(module)), weakref.ref(module)
    del module
    gc.collect()
    assert engine() is None
    assert root() is None
    assert not list(tmp_path.iterdir())


def test_nothing_grows_over_fifty_calls(tmp_path: Path) -> None:
    module, inputs = _net()
    POLICIES["disk-leaf-stream"](module, tmp_path)

    def sizes() -> tuple[int, ...]:
        gc.collect()
        engine = engine_of(module)
        assert engine is not None
        known = sum(len(u.known) for u in engine.units)
        return len(engine.order.next), known, lane.lane_to(torch.device("cpu")).held, len(gc.get_objects()) // 500

    with torch.no_grad():
        for _ in range(5):
            module(*inputs)
        before = sizes()
        for _ in range(50):
            module(*inputs)
        assert sizes() == before
    policies.remove(module)


def test_the_ring_has_the_size_of_what_passes(tmp_path: Path) -> None:
    module = toys.Fails()
    POLICIES["disk-block-stream"](module, tmp_path)
    with torch.no_grad():
        module(torch.randn(2, 8))
        block = sum(p.nbytes for p in module.blocks[0].parameters())
        ring = lane.lane_to(torch.device("cpu")).arena
    assert ring is not None
    assert 2 * block <= ring.capacity <= 2 * (block + 1024)
    policies.remove(module)


def test_order_is_learnt_from_what_runs(tmp_path: Path) -> None:
    class Backwards(toys.Fails):
        def forward(self, x: Tensor) -> Tensor:
            for block in reversed(self.blocks):
                x = block(x)
            return x

    module, x = Backwards(), torch.randn(2, 8)
    POLICIES["disk-block-stream"](module, tmp_path)
    engine = engine_of(module)
    assert engine is not None
    with torch.no_grad():
        module(x)
        moved = lane.lane_to(torch.device("cpu")).transferred
        for _ in range(4):
            module(x)
    block = sum(p.nbytes for p in module.blocks[0].parameters())
    extra = lane.lane_to(torch.device("cpu")).transferred - moved - 4 * 4 * block
    assert extra <= 2 * block, "units were fetched that were not needed"
    policies.remove(module)


def test_out_of_memory_while_fetching_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module, x = toys.Fails(), torch.randn(2, 8)
    POLICIES["disk-block"](module, tmp_path)

    def no_room(*args: Any) -> Tensor:
        raise torch.OutOfMemoryError("no room")

    with torch.no_grad():
        resident = module(x)
        policies.free(module)
        with monkeypatch.context() as patch, pytest.raises(BudgetError, match="bytes of weights don't fit on cpu"):
            patch.setattr(lane, "allocate", no_room)
            patch.setattr(arena, "allocate", no_room)
            module(x)
        assert torch.equal(module(x), resident)
    policies.remove(module)


def test_hooks_of_others_keep_working(policy: Policy, tmp_path: Path) -> None:
    module, inputs = _net()
    seen: list[str] = []
    module.register_forward_pre_hook(lambda m, a: seen.append("before"))
    module.blocks[0].register_forward_hook(lambda m, a, o: seen.append("after"))
    policy(module, tmp_path)
    with torch.no_grad():
        module(*inputs)
    assert seen == ["before", "after"]
    policies.remove(module)


def test_resident_modules_have_nothing_in_front(tmp_path: Path) -> None:
    module, _ = _net()
    policies.model_offload(module, "cpu")  # computing where it rests: nothing has to travel
    assert not any("_compiled_call_impl" in m.__dict__ for m in module.modules())
    policies.remove(module)


@pytest.mark.parametrize("name", ["disk-leaf-stream", "block", "model"])
def test_autocast(name: str, tmp_path: Path) -> None:
    """The same bits, and autocast keeps no copies of weights that were lent for a moment."""
    module, x = toys.Fails(), torch.randn(2, 8)
    asked: list[bool] = []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        resident = module(x)
    POLICIES[name](module, tmp_path)
    module.blocks[0].up.register_forward_pre_hook(lambda m, a: asked.append(m.weight.requires_grad))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            assert torch.equal(module(x), resident)
    assert asked == [False, False]
    policies.remove(module)


@pytest.mark.parametrize("late", [False, True], ids=["compiled-first", "compiled-later"])
def test_compiled_blocks(late: bool, tmp_path: Path) -> None:
    import torch._dynamo
    from torch._dynamo.utils import counters

    module, x = toys.Fails(), torch.randn(2, 8)

    def compile_blocks(backend: str = "aot_eager") -> None:
        for block in module.blocks:
            block.compile(backend=backend, fullgraph=True)

    torch._dynamo.reset()
    counters.clear()
    with torch.no_grad():
        resident = module(x)
        if not late:
            compile_blocks()
            assert torch.equal(module(x), resident)
        for name in ("disk-leaf-stream", "block", "disk-block-stream", "model"):
            POLICIES[name](module, tmp_path)
            if late and name == "disk-leaf-stream":
                compile_blocks()
            for _ in range(2):
                assert torch.equal(module(x), resident), name
        policies.remove(module)
        assert torch.equal(module(x), resident)
    assert counters["stats"]["unique_graphs"] == 1, "blocks were compiled again"
    torch._dynamo.reset()


def test_a_compiled_model_goes_round_the_engine(tmp_path: Path) -> None:
    import torch._dynamo

    module, x = toys.Fails(), torch.randn(2, 8)
    torch._dynamo.reset()
    with torch.no_grad():
        resident = module(x)
        POLICIES["disk-block-stream"](module, tmp_path)
        compiled = torch.compile(module, backend="aot_eager")
        for _ in range(2):
            assert torch.equal(compiled(x), resident)
    policies.remove(module)
    torch._dynamo.reset()


def test_threads_share_what_is_lent(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    module, x = toys.Fails(), torch.randn(2, 8)
    with torch.no_grad():
        resident = module(x)
    POLICIES["disk-leaf-stream"](module, tmp_path)

    def run(_: int) -> bool:
        with torch.no_grad():
            return torch.equal(module(x), resident)

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(run, range(12)))
    policies.remove(module)


def test_travel_always_is_undone_with_the_engine(tmp_path: Path) -> None:
    module, _ = _net()
    policies.model_offload(module, "cpu")
    travel_always(module)
    policies.remove(module)
    assert engine_of(module) is None
