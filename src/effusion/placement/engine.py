"""The engine: for every weight, always in this order, fetch, decode, patch, lend, drop.

One :class:`Engine` serves one component (a module and what is in it). What rests in the modules is the
truth: true weights, at their home, seen by ``state_dict``, ``parameters`` and saving. For the time of a
call the engine puts others in their place, on the compute device, decoded and patched, and afterwards
the resting ones again. Nothing is copied back, except what the call itself wrote to (statistics of a
batch norm, say).
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..core import log
from . import copying, homes, pages
from .arena import layout, tensors_in
from .fetching import Fetching
from .lane import Lane, lane_to
from .lent import lend, writes_unseen
from .order import Order
from .rooms import room_on
from .sources import give_back_pages
from .standing import Standing
from .transform import Transform
from .transform import lock as _lock
from .trees import mapped
from .unit import Unit
from .units import Group, Slot

if TYPE_CHECKING:
    from .casting import Original
    from .table import Hoisting

logger = log.get_logger(__name__)
LARGE = 32 << 20  # bytes of a unit for which it is worth asking whether there is room
COPIES = 6  # of a unit's bytes that computing with it may take: decoded to twice its size, and put into another order
_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


class Engine(Standing, Fetching):
    """Serves one component according to rows of a plan; see :func:`engine_of` and :mod:`.policies`."""

    def __init__(self, root: nn.Module) -> None:
        self._root = weakref.ref(root)
        self.name = type(root).__name__  # or what a pipeline calls it
        self.units: list[Unit] = []
        self.transforms: dict[nn.Module, Transform] = {}
        self.compiled: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self.policy: dict[str, Any] = {"kind": "resident"}
        self.exclude: frozenset[str] = frozenset()
        self.give_back = False
        self.always_travel = False  # tests: treat the CPU as if it were a device of its own
        self._hooked: list[nn.Module] = []
        self.order = Order()
        self._capacity: dict[torch.device, int] = {}
        self.patches: dict[str, Any] = {}  # name -> patch, see `patches`
        self.originals: dict[tuple[nn.Module, str], Original] = {}  # of cast weights, by where they are
        self.planned: tuple[Any, str] | None = None  # the form that a plan has cast to, and a note about it
        self.folder: Any = None  # where weights of the disk are written to
        self.offload: torch.device | None = None
        self.pinned = 0  # bytes
        self._files: list[Path] = []
        self.hoisting: Hoisting | None = None
        self._lingering: list[Unit] = []  # lent, not needed by a call now, dropped when another unit comes
        _engines.add(self)
        weakref.finalize(self, homes.remove, self._files)

    def __reduce__(self) -> Any:
        return copying.reduced(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Engine | None:
        return copying.twin(self, memo)

    @property
    def root(self) -> nn.Module:
        root = self._root()
        assert root is not None, "the component is gone"
        return root

    # -- setting up --------------------------------------------------------------------------------

    def set_units(self, units: list[Unit], policy: dict[str, Any]) -> None:
        """Serve by ``units`` from now on, instead of whatever was before."""
        self.unhoist()
        self.policy = policy
        self._serve(units)

    def hoist(self, hoisting: Hoisting, units: list[Unit]) -> None:
        """Let a table answer for some modules, and serve by ``units``, those of before without these modules."""
        self.unhoist()
        hoisting.units_before = self.units
        self.hoisting = hoisting
        self._serve(units)

    def unhoist(self) -> None:
        """The weights of hoisted modules travel with their units again."""
        self.settle()
        hoisting, self.hoisting = self.hoisting, None
        if hoisting is not None:
            hoisting.restore()
            self._serve(hoisting.units_before)

    def _serve(self, units: list[Unit]) -> None:
        self.settle()
        self.uninstall()
        self.units = units
        self.order = Order()
        triggers = {id(t) for u in units for t in u.triggers}
        for index, unit in enumerate(units):
            unit.index = index
            own = {id(t) for t in unit.triggers}
            below = {id(m) for t in unit.triggers for m in t.modules()} - own
            unit.outer = bool(below & (triggers - own))
        self.install()

    def compile(self, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        """``module.compile(…)`` while served: weights are lent outside the compiled region."""
        self.unhoist()
        self.uninstall()
        nn.Module.compile(module, *args, **kwargs)
        self.install()

    def _measure(self) -> None:
        """How large the ring to each device has to be: the largest unit, and what may travel ahead of it."""
        self._capacity = {}
        for unit in self.units:
            if not self._must_travel(unit) or unit.row.keep or unit.outer:
                continue
            tensors = list({id(s.tensor): s.tensor for s in unit.slots}.values())
            _, nbytes = layout(tensors, unit.device.type == "cpu")
            need = (-(-(nbytes + 64) // 512) * 512) * (1 + unit.row.ahead)
            self._capacity[unit.device] = max(self._capacity.get(unit.device, 0), need)

    # -- lending -----------------------------------------------------------------------------------

    def enter(self, unit: Unit) -> None:
        """A call that needs ``unit`` begins."""
        with _lock:
            if unit.depth == 0:
                for other in [u for u in self._lingering if u is not unit]:
                    self._drop(other)
                if not unit.lent:
                    self._lend(unit)
            unit.depth += 1
            if not unit.row.keep and not unit.outer:
                self.order.remember(unit)
                if unit.row.ahead:
                    self._fetch_ahead(unit)

    def exit(self, unit: Unit, module: nn.Module, failed: bool) -> None:
        """A call that needed ``unit`` ended."""
        with _lock:
            unit.depth -= 1
            if unit.depth or unit.row.keep:
                return
            if not failed and any(module is t for t in unit.triggers[:-1]):
                self._lingering.append(unit)  # the next block of the group will need it
            else:
                self._drop(unit)

    def _lend(self, unit: Unit) -> None:
        if unit.row.keep or self.policy["kind"] == "plan":  # a plan's peak counts on others being gone
            room_on(unit.device).enter(self)
        if unit.maps:
            unit.in_place = True
            return
        lane = lane_to(unit.device)
        if unit.device.type == "cpu" and unit.row.nbytes >= LARGE:
            pages.make_room(COPIES * unit.row.nbytes)
        slots, rests = self._travelling(unit)
        cargo, unit.coming = unit.coming, None
        if cargo is not None and not cargo.current(rests):
            lane.leave(cargo)
            cargo = None
        try:
            if cargo is None and rests:
                cargo = self._fetch(unit, rests)
            if cargo is not None:
                lane.arrive(cargo)
        except BaseException:
            if cargo is not None:
                lane.leave(cargo)
            raise
        unit.cargo = cargo
        self._swap(unit, slots, rests)

    def _recall(self, lane: Lane) -> None:
        """Drop what was fetched ahead."""
        for engine in list(_engines):
            for unit in engine.units:
                if unit.coming is not None and unit.device == lane.device:
                    lane.leave(unit.coming)
                    unit.coming = None

    def _swap(self, unit: Unit, slots: list[list[Slot]], rests: list[Tensor]) -> None:
        tensors = unit.cargo.tensors if unit.cargo is not None else []
        grad = torch.is_grad_enabled()  # asked first: leaving inference mode switches it on
        with torch.inference_mode(False), torch.set_grad_enabled(grad):
            for places, rest, tensor in zip(slots, rests, tensors, strict=True):
                lent = lend(tensor, rest)
                for slot in places:
                    unit.put.append((slot, slot.tensor, lent))
                    slot.store[slot.name] = lent

    def _drop(self, unit: Unit) -> None:
        """The resting weights again; what the call wrote to is written back."""
        if unit.in_place:
            unit.in_place = False
            rests = self._travelling(unit)[1]
            spans = self._spans(unit, rests)
            give_back_pages(rest for rest, span in zip(rests, spans, strict=True) if span is not None)
        with torch.no_grad():
            for slot, rest, lent in unit.put:
                now = slot.store.get(slot.name)
                if now is lent:
                    if lent.is_leaf and (lent._version or writes_unseen(slot)):
                        rest.copy_(lent)
                    slot.store[slot.name] = rest
        unit.put = []
        if unit in self._lingering:
            self._lingering = [u for u in self._lingering if u is not unit]
        cargo, unit.cargo = unit.cargo, None
        if cargo is not None:
            lane_to(unit.device).leave(cargo)

    def own_output(self, out: Any) -> Any:
        """``out``, with tensors that are views of lent weights copied: their memory is used again."""
        for device in self._capacity:
            arena = lane_to(device).arena
            if arena is not None and any(arena.holds(t) for t in tensors_in(out)):
                return mapped(out, arena.apart)
        return out

    # -- what comes next -----------------------------------------------------------------------------

    def _fetch_ahead(self, unit: Unit) -> None:
        """Begin with the units that will be needed next, as many as there is room for."""
        if torch.is_grad_enabled():
            return
        before, at = self.order.start(unit)
        seen = {id(unit)}
        while True:
            before, following = at, self.order.after(before, at, self.units)
            if following is None or id(following) in seen:
                return
            seen.add(id(following))
            at = following
            if following.lent or following.coming is not None or following.outer or following.row.keep:
                continue
            if following.device != unit.device or not self._must_travel(following):
                continue
            arena = lane_to(unit.device).arena
            if arena is None or arena.free < following.row.nbytes:
                return
            _, rests = self._travelling(following)
            if rests:
                following.coming = self._fetch(following, rests, must=False)
                if following.coming is None:
                    return
                self.order.frontier = (before, following)

    # -- settling ------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Take everything back: the modules hold their resting weights, the compute device nothing of ours."""
        with _lock:
            for unit in self.units:
                if unit.lent or unit.cargo is not None:
                    self._drop(unit)
                unit.depth = 0
                if unit.coming is not None:
                    lane_to(unit.device).leave(unit.coming)
                    unit.coming = None
            self.order.restart()
            for device in self._capacity:
                lane_to(device).release()
            for patch in self.patches.values():
                patch.settle()

    def close(self) -> None:
        """Serve no more; what rests in the modules stays where it is."""
        self.unhoist()
        self.uninstall()
        self.units, self.transforms = [], {}
        self.replace_files([])
        self.root.__dict__.pop(_ATTRIBUTE, None)
        _engines.discard(self)

    def close_if_idle(self) -> None:
        if not self.units and not self.transforms:
            self.close()

    def replace_files(self, files: Sequence[Path]) -> None:
        """``files`` hold weights now; ours that don't any more are removed (mappings of them stay valid)."""
        homes.remove([file for file in self._files if file not in files])
        self._files[:] = [file for file in files if homes.is_ours(file)]

    def rehome(self) -> None:
        """Bring weights whose data was replaced (by a cast) to the home that their rows name."""
        if not self.units or any(slot.tensor.is_meta for unit in self.units for slot in unit.slots):
            return  # what has lost its values can't be brought home; the next call says so
        for home in dict.fromkeys(unit.row.home for unit in self.units):
            units = [unit for unit in self.units if unit.row.home == home]
            groups = [Group(u.row.unit.partition("/")[2], u.slots, u.triggers) for u in units]
            if home == "disk" and self.folder is not None:  # else what is in no file now stays in memory
                self.replace_files(homes.to_disk(groups, self.folder, self.name))
            elif home == "pinned":
                self.pinned = homes.to_pinned(groups)
        for unit in self.units:
            unit.row = replace(unit.row, nbytes=homes.nbytes_of(unit.slots))
            unit.known.clear()

    @property
    def device(self) -> torch.device | None:
        """Where the component computes, if that is decided here."""
        return self.units[0].device if self.units else None


_ATTRIBUTE = "_effusion_engine"


def engine_of(module: nn.Module) -> Engine | None:
    """The engine that serves ``module`` as a component, if one does."""
    found = module.__dict__.get(_ATTRIBUTE)
    return found if isinstance(found, Engine) else None


def engine_for(module: nn.Module, name: str = "") -> Engine:
    """The engine that serves ``module`` as a component, made if there is none."""
    engine = engine_of(module)
    if engine is None:
        engine = module.__dict__[_ATTRIBUTE] = Engine(module)
    engine.name = name or engine.name
    return engine


def neighbours(module: nn.Module) -> list[Engine]:
    """Engines that serve a part of ``module``, or something that ``module`` is part of."""
    inside = {id(m) for m in module.modules()}
    found = []
    for engine in list(_engines):
        root = engine._root()
        if root is None or root is module or not (engine.units or engine.transforms):
            continue
        if id(root) in inside or any(m is module for m in root.modules()):
            found.append(engine)
    return found
