"""A run in which no network computes: what each would allocate and how much it would calculate, before weights are read.

A network's call is carried out on fake tensors (shapes without values) while the storages that are alive are
counted; its callers get zeros of the right shape. Everything else (tokenizers, schedulers, the loop) runs for real, so
any pipeline can be rehearsed without knowing what it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from ..core.errors import PlanConflict
from .alive import Alive
from .arena import tensors_in
from .asides import as_it_was, undrawn
from .engine import engine_of
from .foresight import shape_of
from .lender import ENTRIES, StandsIn, first_device
from .policies import execution_device
from .repeats import rehearse_once
from .trees import mapped
from .units import Slot, all_slots


@dataclass
class Work:
    """Calls, their floating-point operations, and the bytes moved by operators whose time is not in those."""

    calls: int = 0
    flops: float = 0.0
    moved: float = 0.0
    turns: int = 0  # how often another component had been called before

    def add(self, flops: float, moved: float) -> None:
        self.flops += flops
        self.moved += moved


@dataclass
class Rehearsed:
    """What the calls of one component need."""

    activations: int = 0  # bytes alive at the worst moment, weights not
    workspaces: int = 0  # bytes that the operator of that moment takes besides
    once: Work = field(default_factory=lambda: Work())  # all calls but those of the loop's further steps
    each: Work = field(default_factory=lambda: Work())  # the calls of one further step
    touched: dict[str, int] = field(default_factory=dict)  # weight -> bytes of it that are read, in the order of use
    computed: dict[str, torch.dtype] = field(
        default_factory=dict
    )  # weight -> dtype in the calls, if it rests in another
    kernels: set[Any] = field(default_factory=set)  # that are compiled for it on the CPU, and stay
    failure: str | None = None  # why it could not be rehearsed (it was run for real then)
    seen: dict[Any, Any] = field(default_factory=dict, repr=False)  # calls alike -> what they return and cost

    def passes(self, steps: int) -> int:
        """How often all of it is needed in a run of ``steps``."""
        return max(self.once.calls + (steps - 1) * self.each.calls, 1)

    def outline(self, args: Any, kwargs: Any) -> Any:
        """What a call of the network with such arguments gave, on ``meta``; ``None`` if there was none."""
        found = self.seen.get(_key("_call_impl", args, kwargs))
        return mapped(found[0], shape_of) if found is not None else None

    def work(self, steps: int) -> Work:
        """All of it in a run of ``steps``."""
        further = steps - 1
        return Work(
            self.passes(steps),
            self.once.flops + further * self.each.flops,
            self.once.moved + further * self.each.moved,
            self.once.turns + further * self.each.turns,
        )


def rehearse(
    components: Mapping[str, nn.Module], run: Callable[[], Any], device: torch.device, scheduler: Any = None
) -> dict[str, Rehearsed]:
    """Call ``run`` with the networks in ``components`` rehearsing: what each of them that was called needs, in order.

    Args:
        device: what they would compute on.
        scheduler: its steps tell which calls belong to the loop.
    """
    found: dict[str, Rehearsed] = {}
    counter = _Steps()
    with ExitStack() as stack:
        stack.enter_context(undrawn(components.values()))
        stack.enter_context(counter.of(scheduler))
        for name, module in components.items():
            stack.enter_context(_rehearsing(_Rehearsal(module, name, found, device, counter)))
        run()
    return found


class _Steps:
    """How many steps a scheduler has made."""

    def __init__(self) -> None:
        self.done = 0
        self.last = ""  # the component that was called last

    @contextmanager
    def of(self, scheduler: Any) -> Iterator[None]:
        step = getattr(scheduler, "step", None)
        if step is None:
            yield
            return

        @functools.wraps(step)
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.done += 1
            return step(*args, **kwargs)

        scheduler.step = counted
        try:
            yield
        finally:
            del scheduler.step


# -- what stands in for a network ----------------------------------------------------------------------------


@dataclass
class _Rehearsal:
    """One network that is rehearsed, and where what it needs is noted."""

    module: nn.Module
    name: str
    found: dict[str, Rehearsed]
    device: torch.device
    steps: _Steps


class StandIn(StandsIn):
    """Stands for a network's call, or for a method that starts work without one."""

    def __init__(self, rehearsal: _Rehearsal, method: Callable[..., Any], placed: dict[str, Any]) -> None:
        self.rehearsal, self.method, self.placed = rehearsal, method, placed

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        r = self.rehearsal
        result = r.found.setdefault(r.name, Rehearsed())
        work = result.each if r.steps.done == 1 else result.once
        work.calls += 1
        work.turns += r.steps.last != r.name
        r.steps.last = r.name
        attributes = r.module.__dict__
        for key in self.placed:  # a method of the module may call another one: that is part of the same call
            attributes.pop(key, None)
        try:
            return _call(r.module, self.method, args, kwargs, result, r.device, work)
        finally:
            attributes.update(self.placed)


@contextmanager
def _rehearsing(rehearsal: _Rehearsal) -> Iterator[None]:
    module = rehearsal.module
    engine = engine_of(module)
    if engine is not None:
        engine.settle()
        engine.uninstall()
    compiled = {m: m.__dict__.pop("_compiled_call_impl", None) for m in module.modules()}
    placed: dict[str, Any] = {}
    placed["_compiled_call_impl"] = StandIn(rehearsal, module._call_impl, placed)
    placed |= {n: StandIn(rehearsal, getattr(module, n), placed) for n in ENTRIES if hasattr(type(module), n)}
    module.__dict__.update(placed)
    try:
        yield
    finally:
        for key in placed:
            module.__dict__.pop(key, None)
        for m, run in compiled.items():
            if run is not None:
                m.__dict__["_compiled_call_impl"] = run
        if engine is not None:
            engine.install()


def _call(
    module: nn.Module, method: Callable[..., Any], args: Any, kwargs: Any, result: Rehearsed, device: torch.device,
    work: Work,
) -> Any:  # fmt: skip
    key = _key(getattr(method, "__name__", ""), args, kwargs)
    try:
        if key not in result.seen:
            result.seen[key] = _rehearsed_call(module, method, args, kwargs, result, device)
        out, flops, moved = result.seen[key]
        work.add(flops, moved)
        place = first_device(args, kwargs) or execution_device(module)  # the code around goes on there
        return mapped(out, functools.partial(_zeros, place))
    except Exception as error:  # code that looks at values can't run without them
        result.failure = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if any(t.is_meta for t in module.parameters()):
        raise PlanConflict(
            f"{type(module).__name__} looks at values, so it can't be planned without its weights ({result.failure}); "
            f"load the pipeline and call `plan` of it"
        )
    before = [t.nbytes for t in tensors_in([args, kwargs])]
    out = _for_real(module, method, args, kwargs)
    result.activations = max(result.activations, 4 * (sum(before) + sum(t.nbytes for t in tensors_in(out))))
    return out


def _for_real(module: nn.Module, method: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """The call as it would be outside of a rehearsal: weights that travel or rest packed are lent."""
    engine = engine_of(module)
    if engine is None:
        return method(*args, **kwargs)
    engine.install()
    try:
        name = method.__name__
        return (module if name == "_call_impl" else getattr(module, name))(*args, **kwargs)
    finally:
        engine.settle()
        engine.uninstall()


def _key(name: str, args: Any, kwargs: Any) -> str:
    """What calls that need the same have in common."""
    return repr((name, mapped([args, kwargs], lambda t: (tuple(t.shape), t.dtype))))


# -- without values ------------------------------------------------------------------------------------------


def _rehearsed_call(
    module: nn.Module, method: Callable[..., Any], args: Any, kwargs: Any, result: Rehearsed, device: torch.device
) -> tuple[Any, float, float]:
    """What the call returns, on fake tensors, its flops and the bytes it moves."""
    with as_it_was(module), torch.inference_mode(False), torch.no_grad():
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        weights = _place_fakes(module, mode, result, device)
        inputs = mapped([args, kwargs], lambda t: _fake(mode, t, device))
        with mode, Alive(weights, device) as alive:
            rehearse_once(module, alive)
            out = method(*inputs[0], **inputs[1])
        given = sum(alive.taken(t.nbytes) for t in tensors_in(inputs))
        if alive.peak + alive.workspace + given > result.activations + result.workspaces:
            result.activations, result.workspaces = alive.peak + given, alive.workspace
        result.kernels |= alive.kernels
        for name, nbytes in alive.touched.items():
            result.touched[name] = max(result.touched.get(name, 0), nbytes)
        return out, alive.flops, alive.moved


def _place_fakes(module: nn.Module, mode: FakeTensorMode, result: Rehearsed, device: torch.device) -> dict[str, Tensor]:
    """Fake weights in the place of those of ``module``, as they are computed with; by name."""
    weights: dict[str, Tensor] = {}
    fakes: dict[int, Tensor] = {}
    for slot in all_slots(module):
        real = slot.tensor
        if id(real) not in fakes:
            like = _computed_with(module, slot)
            fakes[id(real)] = weights[slot.path] = _fake(mode, like, device)
            if real.is_floating_point() and like.dtype != real.dtype:
                result.computed[slot.path] = like.dtype
        fake = fakes[id(real)]
        slot.store[slot.name] = fake if slot.is_buffer else nn.Parameter(fake, requires_grad=False)
    return weights


def _computed_with(module: nn.Module, slot: Slot) -> Tensor:
    """The weight in ``slot``, decoded, without values."""
    engine = engine_of(module)
    transform = engine.transforms.get(slot.module) if engine is not None else None
    return slot.tensor if transform is None else transform.like(slot.name, slot.tensor)


def _fake(mode: FakeTensorMode, tensor: Tensor, device: torch.device) -> Tensor:
    with mode:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)


def _zeros(device: torch.device, tensor: Tensor) -> Tensor:
    if not isinstance(tensor, FakeTensor):
        return tensor
    return torch.zeros(tuple(tensor.shape), dtype=tensor.dtype, device=device)
