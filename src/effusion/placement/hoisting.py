"""Hoisting: what depends on timestep and prompt alone is computed before the loop, and its weights are left out of it.

Of a diffusion transformer that is every projection that modulates its norms (27 % of FLUX.1's weights, 33 % of
Qwen-Image's), of a UNet the keys and values of the text. Nothing in a network says so. Before the loop its calls are
foreseen with latents on ``meta`` (:mod:`.foresight`); modules that give values are computed for all steps, weight by
weight, in exactly the shapes of the calls; in the loop a table answers instead of them. The bits are the same.

A call that the table does not know (another prompt or timestep, other weights, gradients) is computed as ever, with
the weights fetched from where they rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..core import log
from . import homes
from .asides import undrawn
from .calls import Call, Keys, Opaque, Path, as_one, unknown_paths
from .engine import Engine, engine_for, engine_of
from .exhausted import is_out_of_memory
from .foresight import Foresight, NoWeights, Unforeseen
from .sources import Mappings, give_back_pages
from .table import Hoisting
from .unit import Unit
from .units import peeking_owners
from .watch import Lent, Node, best, every, outline, refusal, tree, unit_for, watch

logger = log.get_logger(__name__)


@dataclass(frozen=True)
class Hoistable:
    """What hoisting would do to a network: ``modules`` whose ``weights`` bytes are left out for a ``table`` of bytes."""

    modules: tuple[str, ...] = ()
    weights: int = 0
    table: int = 0
    total: int = 0  # bytes of all weights
    reason: str = ""  # why nothing can be hoisted

    @property
    def part(self) -> float:
        """The part of the network's weights that the loop does without."""
        return self.weights / self.total if self.total else 0.0


# -- before the loop ---------------------------------------------------------------------------------------


def foresee(networks: Mapping[str, nn.Module], run: Callable[[], Any], strict: bool = False) -> dict[str, str]:
    """Hoist what can be hoisted in the calls of ``networks`` that ``run`` makes.

    Args:
        run: what the loop will do, with everything that it can't know yet on ``meta``.
        strict: whether memory that runs out is an error.

    Returns:
        For networks in which nothing can be hoisted, why.
    """
    reasons: dict[str, str] = {}
    try:
        with undrawn(networks.values()):
            found = collect(networks, run, reasons)
    except Exception as error:  # code of the loop that looks at latents: nothing is lost but the saving
        if strict and is_out_of_memory(error):
            raise
        logger.info("nothing is hoisted: the loop can't be foreseen (%s: %s)", type(error).__name__, error)
        return dict.fromkeys(networks, str(error))
    for name, calls in found.items():
        try:
            _hoist(networks[name], name, calls)
        except Exception as error:
            if not (isinstance(error, (Unforeseen, Opaque)) or is_out_of_memory(error)):
                raise
            unhoist(networks[name])
            if strict and is_out_of_memory(error):
                raise
            reasons[name] = str(error)
    for name, reason in reasons.items():
        logger.info("nothing is hoisted in %s: %s", name, reason)
    return reasons


def collect(
    networks: Mapping[str, nn.Module],
    run: Callable[[], Any],
    reasons: dict[str, str] | None = None,
    outlines: Mapping[str, Callable[[Any, Any], Any]] | None = None,
) -> dict[str, list[Call]]:
    """The calls of ``networks`` that ``run`` makes, without carrying them out.

    Args:
        reasons: takes up why a network can't be watched.
        outlines: what calls of a network give on ``meta``, where that is known already.
    """
    found: dict[str, list[Call]] = {}
    devices = [device_of(m) for m in networks.values()]
    reasons, outlines = reasons if reasons is not None else {}, outlines or {}
    stubs = {name: _Stub(m, name, found, reasons, outlines.get(name)) for name, m in networks.items()}
    try:
        for stub in stubs.values():
            stub.place()
        place = next((d for d in devices if d.type != "cpu"), torch.device("cpu"))
        with Foresight(NoWeights(place)) as mode:
            for stub in stubs.values():
                stub.mode = mode
            run()
    finally:
        for stub in stubs.values():
            stub.leave()
    return found


class _Stub:
    """Stands for a network while the loop is foreseen: notes the call, gives what it would give on ``meta``."""

    def __init__(
        self, module: nn.Module, name: str, found: dict[str, list[Call]], reasons: dict[str, str],
        outline: Callable[[Any, Any], Any] | None,
    ) -> None:  # fmt: skip
        self.module, self.name, self.found, self.reasons, self.outline = module, name, found, reasons, outline
        self.outs: dict[Any, Any] = {}
        self.mode: Foresight | None = None  # that of the loop around
        self.before: Any = None  # what stood before the network

    def place(self) -> None:
        self.before = self.module.__dict__.get("_compiled_call_impl")
        self.module.__dict__["_compiled_call_impl"] = self

    def leave(self) -> None:
        if self.module.__dict__.get("_compiled_call_impl") is self:
            del self.module.__dict__["_compiled_call_impl"]
            if self.before is not None:
                self.module.__dict__["_compiled_call_impl"] = self.before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        assert self.mode is not None
        self.mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        try:
            call: Call = (args, kwargs)
            unknown = unknown_paths([call])
            form = Keys().form(call, unknown)
            if form not in self.outs:
                self.outs[form] = self._shapes(call, unknown)
            self.found.setdefault(self.name, []).append(call)
            return self.outs[form]
        finally:
            self.mode.__enter__()  # type: ignore[no-untyped-call]

    def _shapes(self, call: Call, unknown: frozenset[Path]) -> Any:
        reason = refusal(self.module)
        if reason is not None:
            self.reasons[self.name] = reason
            raise Unforeseen(f"{self.name}: {reason}")
        known = self.outline(*call) if self.outline is not None else None
        if known is not None:
            return known
        self.leave()
        root = tree(self.module)
        engine, fresh = _engine(self.module, self.name)
        device = device_of(self.module)
        try:
            lent = Lent(engine, root, device)
            try:
                out = outline(engine, root, call, lent)
            except Unforeseen:  # it looks at values: with those that are known it may work
                call = as_one([call], unknown, Keys(), device)
                out = watch(engine, root, [(call, 1)], lent, symbolic=False)[0]
        finally:
            if fresh:
                engine.close_if_idle()
            self.place()
        return out


def device_of(module: nn.Module) -> torch.device:
    """Where ``module`` computes."""
    engine = engine_of(module)
    if engine is not None and engine.device is not None:
        return engine.device
    return next((p.device for p in module.parameters() if not p.is_meta), torch.device("cpu"))


def _engine(module: nn.Module, name: str) -> tuple[Engine, bool]:
    fresh = engine_of(module) is None
    return engine_for(module, name), fresh


def hoistable(module: nn.Module, calls: Sequence[Call], steps: int | None = None) -> Hoistable:
    """What hoisting would save in ``calls`` of ``module``, found out without values: weights may be on ``meta``.

    Args:
        calls: arguments, unknown tensors on ``meta`` and known ones with values; two that differ as the steps do
            are enough.
        steps: the number of calls that they stand for; as many as there are if not given.
    """
    root = tree(module)
    reason = refusal(module)
    engine, fresh = _engine(module, "")
    try:
        if reason is None:
            unknown, keys, device = unknown_paths(calls), Keys(), device_of(module)
            forms: dict[Any, list[Call]] = {}
            for call in calls:
                forms.setdefault(keys.form(call, unknown), []).append(call)
            each = [(as_one(same, unknown, keys, device), len(same)) for same in forms.values()]
            scale = (steps or len(calls)) / len(calls)
            watch(engine, root, [(c, max(1, round(n * scale))) for c, n in each], Lent(engine, root, device), True)
            nodes = _chosen(engine, root)
            return Hoistable(
                tuple(n.path for n in nodes), sum(n.nbytes for n in nodes), sum(n.held for n in nodes), root.nbytes
            )
    except (Unforeseen, Opaque) as error:
        reason = str(error)
    finally:
        if fresh:
            engine.close_if_idle()
    return Hoistable(total=root.nbytes, reason=reason)


def _hoist(module: nn.Module, name: str, calls: Sequence[Call]) -> None:
    engine, fresh = _engine(module, name)
    before = engine.hoisting
    if before is not None and before.knows(calls):
        return
    try:
        keys = before.keys if before is not None else Keys()
        unknown = unknown_paths(calls)
        distinct = {keys.of(call, unknown): call for call in calls}
        forms: dict[Any, list[tuple[Any, Call]]] = {}
        for key, call in distinct.items():
            forms.setdefault(keys.form(call, unknown), []).append((key, call))
        device = device_of(module)
        each = [(as_one([c for _, c in same], unknown, keys, device), len(same)) for same in forms.values()]
        root = tree(module)
        lent = Lent(engine, root, device)
        watch(engine, root, each, lent, symbolic=False)
        nodes = _chosen(engine, root)
        places = {key: (f, i) for f, same in enumerate(forms.values()) for i, (key, _) in enumerate(same)}
        if before is None or [n.module for n in nodes] != before.modules:
            engine.unhoist()
            if not nodes:
                return
            before = Hoisting(engine, nodes, [])
            before.keys = keys
            _leave_out(engine, before, nodes, device)
        before.renew(nodes, list(lent.used.values()), places, unknown)
    finally:
        if fresh:
            engine.close_if_idle()


def _chosen(engine: Engine, root: Node) -> list[Node]:
    """The modules to hoist; none inside of something compiled, and none whose weights others read."""
    refused = {*peeking_owners(root.module), *engine.inside_compiled()}
    for node in every(root):
        if id(node.module) in refused:
            node.hoistable = False
    return best(root)[1]


def _leave_out(engine: Engine, hoisting: Hoisting, nodes: Sequence[Node], device: torch.device) -> None:
    """Serve by units without the weights of ``nodes`` from now on."""
    gone = {(id(s.module), s.name) for s in hoisting.slots}
    own = [unit_for(engine, node, device) for node in nodes]
    rest = []
    for unit in engine.units:
        slots = [s for s in unit.slots if (id(s.module), s.name) not in gone]
        if len(slots) == len(unit.slots):
            rest.append(unit)
        elif slots:
            row = unit.row.__class__(**{**unit.row.__dict__, "nbytes": homes.nbytes_of(slots)})
            rest.append(Unit(row, slots, unit.triggers, unit.device))
    for same in homes.distinct(hoisting.slots):
        if same[0].device.type != "cpu":
            hoisting.moved.append((same, same[0].device))
            homes.set_data(same, same[0].detach().cpu())
    mappings = Mappings()
    give_back_pages(s.tensor for s in hoisting.slots if mappings.span(s.tensor) is not None)
    engine.hoist(hoisting, [*rest, *own])


def unhoist(module: nn.Module) -> None:
    """Undo hoisting in ``module``: its weights are where its policy has them, and no table is left."""
    engine = engine_of(module)
    if engine is not None:
        engine.unhoist()
        engine.close_if_idle()
