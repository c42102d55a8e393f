"""Watching one call of a network in foresight: which of its modules depend on nothing unknown, and what they give."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import homes
from . import lender as lending
from .arena import tensors_in
from .asides import as_it_was
from .calls import Call
from .engine import Engine, engine_of
from .foresight import Foresight, Known, Unforeseen, shape_of
from .lane import Cargo, lane_to
from .plan import Row
from .sources import is_dense
from .trees import mapped
from .unit import Unit
from .units import Slot, all_slots, is_called

Form = tuple[Any, ...]


@dataclass
class Answer:
    """What one call of a module gives: for every call of the network, or once for all of them."""

    form: Form  # shapes and dtypes of what it was called with
    out: Any  # as the module returned it, tensors that differ between the calls as :class:`Known`

    def of(self, index: int) -> Any:
        """A copy of the output in call ``index`` of the network."""
        return mapped(self.out, lambda t: (t.parts[index] if isinstance(t, Known) else t).clone())


@dataclass(eq=False)
class Node:
    """A module with weights, as the root of a tree of such."""

    path: str
    module: nn.Module
    slots: list[Slot]
    nbytes: int
    children: list[Node]
    hoistable: bool = True  # so far: all of its calls were known, and nobody else used its weights
    held: int = 0  # bytes of its answers
    answers: list[list[Answer]] = field(default_factory=list)  # for each form of call of the network, in order

    @property
    def saving(self) -> int:
        return self.nbytes - self.held if self.hoistable and any(self.answers) else 0


def tree(module: nn.Module, path: str = "") -> Node:
    """``module`` and the modules in it that have weights."""
    slots = all_slots(module, path)
    dot = f"{path}." if path else ""
    children = [tree(m, dot + n) for n, m in module.named_children()]
    return Node(path, module, slots, homes.nbytes_of(slots), [c for c in children if c.slots])


def every(node: Node) -> Iterator[Node]:
    """``node`` and all below it."""
    yield node
    for child in node.children:
        yield from every(child)


def best(node: Node) -> tuple[int, list[Node]]:
    """The modules below ``node`` whose answers instead of whose weights save most, and how many bytes that is."""
    parts = [best(child) for child in node.children]
    below, chosen = sum(p[0] for p in parts), [n for p in parts for n in p[1]]
    if node.saving > 0 and node.saving >= below:
        return node.saving, [node]
    return below, chosen


class Lent:
    """The resting weights of a network under its engine's policy: fetched, decoded and patched one at a time."""

    def __init__(self, engine: Engine, root: Node, device: torch.device) -> None:
        self.engine, self.device = engine, device
        self.calling: set[int] = set()  # ids of the modules that are being called
        self.used: dict[int, Slot] = {}  # by id of the tensor
        self._slots: dict[int, Slot] = {}
        self._nodes: dict[int, list[Node]] = {}
        self._units = {(id(s.module), s.name): unit for unit in engine.units for s in unit.slots}
        self._cargo: list[Cargo] = []
        self._likes: dict[int, Tensor] = {}
        for node in every(root):
            for slot in node.slots:
                self._slots.setdefault(id(slot.tensor), slot)
                self._nodes.setdefault(id(slot.tensor), []).append(node)

    def __contains__(self, tensor: Tensor) -> bool:
        return id(tensor) in self._slots

    def like(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self._likes:
            slot = self._slots[id(tensor)]
            transform = self.engine.transforms.get(slot.module)
            made = shape_of(tensor) if transform is None else transform.like(slot.name, tensor)
            self._likes[id(tensor)] = made
        return self._likes[id(tensor)]

    def note(self, tensor: Tensor) -> None:
        """A weight that is used while its module is not being called can't be left out with that module."""
        for node in self._nodes[id(tensor)]:
            if id(node.module) not in self.calling:
                node.hoistable = False

    def borrow(self, tensor: Tensor) -> Tensor:
        slot = self._slots[id(tensor)]
        self.used[id(tensor)] = slot
        unit = self._units.get((id(slot.module), slot.name))
        value = tensor if unit is None else self._fetched(tensor, unit)
        transform = self.engine.transforms.get(slot.module)
        if transform is None:
            return value
        with torch.inference_mode(False), torch.no_grad():
            return transform.apply(slot.name, value)

    def _fetched(self, tensor: Tensor, unit: Unit) -> Tensor:
        near = tensor.device == unit.device and not self.engine.always_travel
        if near and (unit.row.home != "disk" or tensor.is_meta):
            return tensor
        lane = lane_to(unit.device)
        cargo = lane.start([tensor], self.engine._spans(unit, [tensor]), own_memory=True)
        assert cargo is not None
        self._cargo.append(cargo)
        lane.arrive(cargo)
        return cargo.tensors[0]

    def give_back(self) -> None:
        lane = lane_to(self.device)
        while self._cargo:
            lane.leave(self._cargo.pop())


class Probe:
    """Stands in front of a module while it is watched."""

    def __init__(self, node: Node, mode: Foresight, calling: set[int]) -> None:
        self.node, self.mode, self.calling = node, mode, calling

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        key = id(self.node.module)
        outermost = key not in self.calling
        self.calling.add(key)
        try:
            out = self.node.module._call_impl(*args, **kwargs)  # type: ignore[misc]
        finally:
            if outermost:
                self.calling.discard(key)
        if self.node.hoistable:
            with torch._C.DisableTorchFunction():  # tensors tell the truth about where they are
                self._take(args, kwargs, out)
        return out

    def _take(self, args: Any, kwargs: Any, out: Any) -> None:
        node = self.node
        node.hoistable = _plain([args, kwargs]) and _plain(out) and not self._unknown([args, kwargs, out])
        if not node.hoistable or not (self.mode.symbolic or all(map(_copies_well, tensors_in(out)))):
            node.hoistable = False
        else:
            for tensor in tensors_in(out):
                several = isinstance(tensor, Known) and len(tensor.parts) > 1
                node.held += tensor.nbytes * (self.mode.calls if several else 1)
            node.answers[-1].append(Answer(form_of(args, kwargs), out))
            node.hoistable = node.held < node.nbytes
        if not node.hoistable:
            node.answers = [[] for _ in node.answers]

    def _unknown(self, values: Any) -> bool:
        return any(self.mode.unknown(t) for t in tensors_in(values))


def form_of(args: Any, kwargs: Any) -> Form:
    """Shapes and dtypes of the tensors that a module is called with."""
    return tuple((t.shape, t.dtype) for t in tensors_in([args, kwargs]))


def watch(engine: Engine, root: Node, calls: Sequence[tuple[Call, int]], lent: Lent, symbolic: bool) -> list[Any]:
    """Carry ``calls`` of the network out in foresight; what they give, and in the nodes what their modules gave.

    Args:
        calls: each with the number of calls of the run that it stands for.
        symbolic: without values, so that no weights are needed.

    Raises:
        Unforeseen: the network asks for values that are not known; or it draws random numbers.
    """
    outs = []
    before = _random_state(lent.device)
    for node in every(root):
        node.answers = []
    with bare(engine):
        for call, count in calls:
            mode = Foresight(lent, symbolic, count)
            for node in every(root):
                node.answers.append([])
                if is_called(node.module) and node is not root:
                    node.module.__dict__["_compiled_call_impl"] = Probe(node, mode, lent.calling)
            with mode, torch.no_grad():
                outs.append(root.module._call_impl(*call[0], **call[1]))  # type: ignore[misc]
    root.hoistable = False
    after = _random_state(lent.device)
    if any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)):
        torch.set_rng_state(before[0])
        if len(before) > 1:
            torch.cuda.set_rng_state(before[1], lent.device)
        raise Unforeseen(f"{type(root.module).__name__} draws random numbers")
    return outs


@contextmanager
def bare(engine: Engine) -> Iterator[None]:
    """Within it the network has no lenders and nothing compiled, and what its calls leave in it is taken away again."""
    served = bool(engine._hooked)
    engine.settle()
    engine.uninstall()
    try:
        with as_it_was(engine.root):
            for module in engine.root.modules():
                compiled = lending.has_compiled_forward(module)
                module.__dict__.pop("_compiled_call_impl", None)
                if module._forward_pre_hooks:  # they only look, see `refusal`
                    module.__dict__["_forward_pre_hooks"] = type(module._forward_pre_hooks)()
                if compiled:
                    module.__dict__["forward"] = module.__dict__["forward"]._torchdynamo_orig_callable
            yield
    finally:
        if served:
            engine.install()


def outline(engine: Engine, root: Node, call: Call, lent: Lent) -> Any:
    """What ``call`` gives, on ``meta`` altogether: the quickest way to its shapes.

    Raises:
        Unforeseen: the network looks at values.
    """
    try:
        with bare(engine), torch.no_grad():
            for slot in root.slots:
                slot.store[slot.name] = lent.like(slot.tensor)
            args, kwargs = mapped(call, lambda t: t if t.is_meta else shape_of(t))
            return root.module._call_impl(*args, **kwargs)  # type: ignore[misc]
    except (NotImplementedError, RuntimeError, TypeError) as error:
        raise Unforeseen(str(error)) from error


def refusal(module: nn.Module) -> str | None:
    """Why calls of ``module`` can't be watched: foreign code in it would see them."""
    for name, inner in module.named_modules():
        if inner._forward_hooks or acting_hooks(inner) or hasattr(inner, "_hf_hook"):
            return f"{name or type(module).__name__} has hooks"
        other = engine_of(inner)
        if inner is not module and other is not None and other.units:
            return f"{name} has a policy of its own"
        processor = getattr(inner, "processor", None)
        if processor is not None and not type(processor).__module__.startswith("effusion."):
            return f"{name} has a foreign attention processor"
        if inner.training and isinstance(inner, nn.modules.dropout._DropoutNd) and inner.p > 0:
            return f"{name} drops out"
    return "it was compiled as a whole" if type(module).__name__ == "OptimizedModule" else None


def acting_hooks(module: nn.Module) -> list[Any]:
    """The hooks before ``module`` is called but for those that only measure."""
    return [hook for hook in module._forward_pre_hooks.values() if not getattr(hook, "only_looks", False)]


def unit_for(engine: Engine, node: Node, device: torch.device) -> Unit:
    """A unit of its own for a module whose answers are in a table: fetched only when they are asked in vain."""
    owner = next((u for u in engine.units if any(s.module is node.slots[0].module for s in u.slots)), None)
    home = "host" if owner is None or owner.row.home == "device" else owner.row.home
    row = Row(f"{engine.name}/{node.path}", node.nbytes, home, str(device))
    return Unit(row, list(node.slots), [node.module], device)


def _random_state(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _copies_well(tensor: Tensor) -> bool:
    """Whether a copy has the same strides and lies as well in memory."""
    parts = tensor.parts if isinstance(tensor, Known) else [tensor]
    return all(is_dense(p) and p.storage_offset() == 0 for p in parts)


def _plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_plain, value))
    if isinstance(value, dict):
        return all(map(_plain, value.values()))
    return value is None or isinstance(value, (Tensor, int, float, bool, str, torch.dtype, torch.device))
