"""A run in which no network computes: what each would allocate and how much it would calculate, before weights are read.

A network's call is carried out on fake tensors (shapes without values) while the storages that are alive are
counted; its callers get zeros of the right shape. Everything else (tokenizers, schedulers, the loop) runs for real, so
any pipeline can be rehearsed without knowing what it is.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from .arena import tensors_in
from .engine import engine_of
from .units import all_slots
from .workspaces import workspace

ENTRIES = ("encode", "decode")


@dataclass
class Rehearsed:
    """What the calls of one component need."""

    activations: int = 0  # bytes alive at the worst moment, workspaces included, weights not
    flops: float = 0.0  # of one call
    calls: int = 0
    failure: str | None = None  # why it could not be rehearsed (it was run for real then)


class Alive(TorchDispatchMode):
    """Counts the bytes of the storages that operators make and that are still alive."""

    def __init__(self, known: Iterator[Tensor], on_cpu: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self.flops = 0.0
        self.on_cpu = on_cpu
        self._seen: dict[int, weakref.ref[Any]] = {}
        for tensor in known:
            self._remember(tensor, counts=False)

    def _remember(self, tensor: Tensor, counts: bool = True) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        nbytes = storage.nbytes() if counts else 0
        self.now += nbytes

        def gone(_: Any) -> None:
            self.now -= nbytes
            self._seen.pop(key, None)

        self._seen[key] = weakref.ref(storage, gone)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tensors_in(out if isinstance(out, (tuple, list)) else [out]):
            self._remember(tensor)
        self.peak = max(self.peak, self.now + (workspace(str(func), args, out) if self.on_cpu else 0))
        formula = flop_registry.get(getattr(func, "_overloadpacket", None))
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        return out


def rehearse(components: Mapping[str, nn.Module], run: Callable[[], Any], device: torch.device) -> dict[str, Rehearsed]:
    """Call ``run`` with the networks in ``components`` rehearsing; what each of them that was called needs."""
    found: dict[str, Rehearsed] = {}
    with ExitStack() as stack:
        for name, module in components.items():
            stack.enter_context(_rehearsing(module, found, name, device.type == "cpu"))
        run()
    return found


@contextmanager
def _rehearsing(module: nn.Module, found: dict[str, Rehearsed], name: str, on_cpu: bool) -> Iterator[None]:
    engine = engine_of(module)
    if engine is not None:
        engine.settle()
        engine.uninstall()
    compiled = {m: m.__dict__.pop("_compiled_call_impl", None) for m in module.modules()}

    def stand_in(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with _set_aside(placed):
                return _call(module, method, args, kwargs, found.setdefault(name, Rehearsed()), on_cpu)

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
    module: nn.Module, method: Callable[..., Any], args: Any, kwargs: Any, result: Rehearsed, on_cpu: bool
) -> Any:
    result.calls += 1
    try:
        with _as_it_was(module), torch.inference_mode(False), torch.no_grad():
            mode = FakeTensorMode(allow_non_fake_inputs=True)
            dtypes = _compute_dtypes(module)
            weights = []
            for slot in all_slots(module):
                fake: Tensor = mode.from_tensor(slot.tensor.detach())
                fake = fake.to(dtypes[slot.path]) if slot.path in dtypes else fake
                weights.append(fake)
                slot.store[slot.name] = fake if slot.is_buffer else nn.Parameter(fake, requires_grad=False)
            inputs = _convert([args, kwargs], mode.from_tensor)
            with mode, Alive(iter(weights), on_cpu) as alive:
                out = method(*inputs[0], **inputs[1])
            result.activations = max(result.activations, alive.peak + sum(t.nbytes for t in tensors_in(inputs)))
            result.flops = max(result.flops, alive.flops)
            return _convert(out, _zeros)
    except Exception as error:  # code that looks at values can't run without them
        result.failure = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    before = [t.nbytes for t in tensors_in([args, kwargs])]
    out = method(*args, **kwargs)
    result.activations = max(result.activations, 4 * (sum(before) + sum(t.nbytes for t in tensors_in(out))))
    return out


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


def _convert(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
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
        for key, item in vars(value).items():
            if isinstance(item, Tensor):
                object.__setattr__(value, key, function(item))
    return value
