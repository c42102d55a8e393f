"""A run in which no network computes: what each would allocate and how much it would calculate, before weights are read.

A network's call is carried out on fake tensors (shapes without values) while the storages that are alive are
counted; its callers get zeros of the right shape. Everything else (tokenizers, schedulers, the loop) runs for real, so
any pipeline can be rehearsed without knowing what it is.
"""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ..core.errors import PlanConflict
from .arena import tensors_in
from .engine import engine_of
from .foresight import shape_of
from .repeats import rehearse_once
from .units import all_slots
from .workspaces import kernel, workspace

ENTRIES = ("encode", "decode")
_FAULT = 64 << 10  # bytes of a mapped file that the system brings in around one that is read


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
    kernels: set[Any] = field(default_factory=set)  # that are compiled for it on the CPU, and stay
    failure: str | None = None  # why it could not be rehearsed (it was run for real then)
    seen: dict[Any, Any] = field(default_factory=dict, repr=False)  # calls alike -> what they return and cost

    def passes(self, steps: int) -> int:
        """How often all of it is needed in a run of ``steps``."""
        return max(self.once.calls + (steps - 1) * self.each.calls, 1)

    def outline(self, args: Any, kwargs: Any) -> Any:
        """What a call of the network with such arguments gave, on ``meta``; ``None`` if there was none."""
        found = self.seen.get(_key("_call_impl", args, kwargs))
        return _convert(found[0], shape_of) if found is not None else None

    def work(self, steps: int) -> Work:
        """All of it in a run of ``steps``."""
        further = steps - 1
        return Work(
            self.passes(steps),
            self.once.flops + further * self.each.flops,
            self.once.moved + further * self.each.moved,
            self.once.turns + further * self.each.turns,
        )


class Alive(TorchDispatchMode):
    """Counts the bytes of the storages that operators make and that are still alive, and what they work."""

    def __init__(self, weights: Mapping[str, Tensor], on_cpu: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = self.workspace = 0
        self.flops = self.moved = 0.0
        self.touched: dict[str, int] = {}
        self.kernels: set[Any] = set()
        self.on_cpu = on_cpu
        self._seen: dict[int, weakref.ref[Any]] = {}
        self._weights = {tensor.untyped_storage()._cdata: (name, tensor) for name, tensor in weights.items()}
        for tensor in weights.values():
            self._remember(tensor, counts=False)

    def _remember(self, tensor: Tensor, counts: bool = True) -> bool:
        """Whether ``tensor`` is memory that was not there before."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return False
        nbytes = storage.nbytes() if counts else 0
        self.now += nbytes

        def gone(_: Any) -> None:
            self.now -= nbytes
            self._seen.pop(key, None)

        self._seen[key] = weakref.ref(storage, gone)
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = list(tensors_in(out if isinstance(out, (tuple, list)) else [out]))
        fresh = [self._remember(tensor) for tensor in made]
        works = any(fresh) or func._schema.is_mutable
        extra = workspace(str(func), args, out) if self.on_cpu else 0
        if self.on_cpu and (found := kernel(str(func), args)) is not None:
            self.kernels.add(found)
        if self.now + extra > self.peak + self.workspace:
            self.peak, self.workspace = self.now, extra
        if works:
            self._count(func, args, kwargs or {}, out, made)
        return out

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any, made: list[Tensor]) -> None:
        given = list(tensors_in([args, kwargs]))
        formula = flop_registry.get(getattr(func, "_overloadpacket", None))
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        else:
            self.moved += sum(t.nbytes for t in (*given, *made))
        for tensor in given:
            found = self._weights.get(tensor.untyped_storage()._cdata)
            if found is not None:
                name, weight = found
                rows = given[1].numel() * (weight[:1].nbytes + _FAULT) if "embedding" in str(func) else weight.nbytes
                self.touched[name] = max(self.touched.get(name, 0), min(rows, weight.nbytes))


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
        stack.enter_context(torch.random.fork_rng([]))
        stack.enter_context(counter.of(scheduler))
        for name, module in components.items():
            stack.enter_context(_rehearsing(module, found, name, device, counter))
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


@contextmanager
def _rehearsing(
    module: nn.Module, found: dict[str, Rehearsed], name: str, device: torch.device, steps: _Steps
) -> Iterator[None]:
    engine = engine_of(module)
    if engine is not None:
        engine.settle()
        engine.uninstall()
    compiled = {m: m.__dict__.pop("_compiled_call_impl", None) for m in module.modules()}

    def stand_in(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = found.setdefault(name, Rehearsed())
            work = result.each if steps.done == 1 else result.once
            work.calls += 1
            work.turns += steps.last != name
            steps.last = name
            with _set_aside(placed):
                return _call(module, method, args, kwargs, result, device, work)

        return call

    placed: dict[str, Any] = {"_compiled_call_impl": stand_in(module._call_impl)}
    placed |= {n: stand_in(getattr(module, n)) for n in ENTRIES if hasattr(type(module), n)}

    @contextmanager
    def _set_aside(attributes: Mapping[str, Any]) -> Iterator[None]:
        """A method of the module may call another one: that is part of the same call."""
        for key in attributes:
            module.__dict__.pop(key, None)
        try:
            yield
        finally:
            module.__dict__.update(attributes)

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
        return _convert(out, _zeros)
    except Exception as error:  # code that looks at values can't run without them
        result.failure = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if any(t.is_meta for t in module.parameters()):
        raise PlanConflict(
            f"{type(module).__name__} looks at values, so it can't be planned without its weights ({result.failure}); "
            f"load the pipeline and call `plan` of it"
        )
    before = [t.nbytes for t in tensors_in([args, kwargs])]
    out = method(*args, **kwargs)
    result.activations = max(result.activations, 4 * (sum(before) + sum(t.nbytes for t in tensors_in(out))))
    return out


def _key(name: str, args: Any, kwargs: Any) -> str:
    """What calls that need the same have in common."""
    return repr((name, _convert([args, kwargs], lambda t: (tuple(t.shape), t.dtype))))


def _rehearsed_call(
    module: nn.Module, method: Callable[..., Any], args: Any, kwargs: Any, result: Rehearsed, device: torch.device
) -> tuple[Any, float, float]:
    """What the call returns, on fake tensors, its flops and the bytes it moves."""
    with _as_it_was(module), torch.inference_mode(False), torch.no_grad():
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        dtypes = _compute_dtypes(module)
        weights: dict[str, Tensor] = {}
        fakes: dict[int, Tensor] = {}
        for slot in all_slots(module):
            real = slot.tensor
            if id(real) not in fakes:
                fakes[id(real)] = weights[slot.path] = _fake(mode, real, device, dtypes.get(slot.path, real.dtype))
            fake = fakes[id(real)]
            slot.store[slot.name] = fake if slot.is_buffer else nn.Parameter(fake, requires_grad=False)
        inputs = _convert([args, kwargs], lambda t: _fake(mode, t, device, t.dtype))
        with mode, Alive(weights, device.type == "cpu") as alive:
            rehearse_once(module, alive)
            out = method(*inputs[0], **inputs[1])
        given = sum(t.nbytes for t in tensors_in(inputs))
        if alive.peak + alive.workspace + given > result.activations + result.workspaces:
            result.activations, result.workspaces = alive.peak + given, alive.workspace
        result.kernels |= alive.kernels
        for name, nbytes in alive.touched.items():
            result.touched[name] = max(result.touched.get(name, 0), nbytes)
        return out, alive.flops, alive.moved


def _fake(mode: FakeTensorMode, tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    with mode:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device=device)


def _compute_dtypes(module: nn.Module) -> dict[str, torch.dtype]:
    engine = engine_of(module)
    if engine is None:
        return {}
    paths = {id(m): n for n, m in module.named_modules()}
    return {
        f"{paths[id(layer)]}.{name}".lstrip("."): compute
        for layer, transform in engine.transforms.items()
        for name, (_, compute) in transform.casts.items()
    }


@contextmanager
def _as_it_was(module: nn.Module) -> Iterator[None]:
    """What a call on fake tensors leaves in ``module`` (caches, counters) is taken away again."""
    kept = [(m, dict(m.__dict__), dict(m._parameters), dict(m._buffers)) for m in module.modules()]
    try:
        yield
    finally:
        for m, attributes, parameters, buffers in kept:
            m.__dict__.clear()
            m.__dict__.update(attributes)
            m._parameters.clear()
            m._parameters.update(parameters)
            m._buffers.clear()
            m._buffers.update(buffers)


def _zeros(tensor: Tensor) -> Tensor:
    if not isinstance(tensor, FakeTensor):
        return tensor
    return torch.zeros(tuple(tensor.shape), dtype=tensor.dtype)


def _convert(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """``value`` with ``function`` applied to the tensors in it, objects that hold tensors included."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (tuple, list)):
        items = [_convert(item, function) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        converted = {k: _convert(v, function) for k, v in value.items()}
        return type(value)(**converted) if type(value) is not dict else converted
    if hasattr(value, "__dict__") and any(isinstance(v, Tensor) for v in vars(value).values()):
        value = copy.copy(value)
        for key, item in list(vars(value).items()):
            if isinstance(item, Tensor):
                object.__setattr__(value, key, function(item))
    return value
