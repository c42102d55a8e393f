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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..core import log
from ..core.errors import BudgetError, PlanConflict
from . import homes, machine, pages
from . import lender as lending
from .arena import layout, tensors_in
from .exhausted import is_out_of_memory
from .lane import Cargo, Lane, lane_to, version
from .lender import Lender
from .lent import lend, writes_unseen
from .plan import Row
from .rooms import room_on
from .sources import Mappings, Span, changed_in_memory, give_back_pages
from .transform import Transform
from .transform import lock as _lock
from .trees import mapped
from .units import Group, Slot, is_called, peeking_owners

if TYPE_CHECKING:
    from .hoisting import Hoisting

logger = log.get_logger(__name__)
CACHE = 75  # percent of the memory that is available which the file cache may count on
LARGE = 32 << 20  # bytes of a unit for which it is worth asking whether there is room
COPIES = 6  # of a unit's bytes that computing with it may take: decoded to twice its size, and put into another order
_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


@dataclass(eq=False)
class Unit:
    """One row of the plan with the slots and triggers it stands for, and the state it is in."""

    row: Row
    slots: list[Slot]
    triggers: list[nn.Module]
    device: torch.device
    index: int = 0  # in the order of definition
    depth: int = 0  # calls that need it now
    cargo: Cargo | None = None  # lent, or kept
    coming: Cargo | None = None  # fetched ahead
    put: list[tuple[Slot, Tensor, Tensor]] = field(default_factory=list)  # (slot, resting, lent)
    in_place: bool = False  # computes from the mapped file; its pages go back when it is dropped
    outer: bool = False  # modules of other units are called while it is lent
    known: dict[int, tuple[Tensor, int, Span | None]] = field(default_factory=dict)  # slices found, by slot

    @property
    def lent(self) -> bool:
        return bool(self.put) or self.in_place

    @property
    def maps(self) -> bool:
        """Whether it computes from the mapped file itself: what is kept on the CPU needs no copy."""
        return self.row.keep and self.row.home == "disk" and self.device.type == "cpu"

    def knows(self, rest: Tensor) -> bool:
        """Whether it was asked which file ``rest`` is a slice of, and nothing was written into it since."""
        known = self.known.get(id(rest))
        return known is not None and known[0] is rest and known[1] == version(rest)


class Engine:
    """Serves one component according to rows of a plan; see :func:`engine_of` and :mod:`.policies`."""

    def __init__(self, root: nn.Module, name: str = "") -> None:
        self._root = weakref.ref(root)
        self.name = name or type(root).__name__
        self.units: list[Unit] = []
        self.transforms: dict[nn.Module, Transform] = {}
        self.compiled: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self.policy: dict[str, Any] = {"kind": "resident"}
        self.exclude: frozenset[str] = frozenset()
        self.give_back = False
        self.always_travel = False  # tests: treat the CPU as if it were a device of its own
        self._hooked: list[nn.Module] = []
        self._next: dict[Any, Unit] = {}  # what came after (a unit before, a unit) the last time
        self._recent: tuple[Unit | None, Unit | None] = (None, None)
        self._frontier: tuple[Unit | None, Unit] | None = (
            None  # the last unit that was fetched ahead, and the one before
        )
        self._capacity: dict[torch.device, int] = {}
        self.patches: dict[str, Any] = {}  # name -> patch, see `patches`
        self.originals: dict[Any, Any] = {}  # (module, name) -> slice of the file that a cast weight came from
        self.folder: Any = None  # where weights of the disk are written to
        self.offload: torch.device | None = None
        self.pinned = 0  # bytes
        self._files: list[Path] = []
        self.hoisting: Hoisting | None = None
        self._lingering: list[Unit] = []  # lent, not needed by a call now, dropped when another unit comes
        _engines.add(self)
        weakref.finalize(self, homes.remove, self._files)

    def __reduce__(self) -> Any:  # copies and pickles of a component are served by nobody
        return type(None), ()

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

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
        self._next.clear()
        self._recent, self._frontier = (None, None), None
        triggers = {id(t) for u in units for t in u.triggers}
        for index, unit in enumerate(units):
            unit.index = index
            own = {id(t) for t in unit.triggers}
            below = {id(m) for t in unit.triggers for m in t.modules()} - own
            unit.outer = bool(below & (triggers - own))
        self.install()

    def install(self) -> None:
        """Put lenders in front of the modules that need one."""
        self.uninstall()
        lenders: dict[nn.Module, Lender] = {}
        above = _above(self.root)

        def lender_for(module: nn.Module) -> Lender:
            top = self._outermost_compiled(module, above)
            if top not in lenders:
                run = lending.compiled_call(top)
                lenders[top] = Lender(self, top, run if run is not None else top._call_impl)
            return lenders[top]

        for unit in self.units:
            if not self._must_travel(unit):
                continue
            for trigger in unit.triggers:
                lender = lender_for(trigger)
                if unit not in lender.units:
                    lender.units.append(unit)
                if unit.device.type != "cpu":
                    lender.device, lender.exclude = unit.device, self.exclude
        peeked = peeking_owners(self.root) if self.transforms else {}
        for module, transform in self.transforms.items():
            if transform.idle:
                continue
            for place in {module, peeked.get(id(module), ("", module))[1]}:
                if transform not in lender_for(place).transforms:
                    lender_for(place).transforms.append(transform)
        if self.hoisting is not None:
            for module in (self.root, *self.hoisting.modules):
                lender_for(module)
        if self.give_back and self.root not in lenders and lenders:
            lender_for(self.root)
        for module, lender in lenders.items():
            lender.give_back = self.give_back and module is self.root
            lending.install(lender)
        self._guard_compile(lenders, above)
        self._measure()

    def _must_travel(self, unit: Unit) -> bool:
        return unit.row.travels or self.always_travel or (unit.row.home == "device" and unit.device.type != "cpu")

    def _outermost_compiled(self, module: nn.Module, above: dict[nn.Module, nn.Module]) -> nn.Module:
        top, at = module, module
        while True:
            if lending.compiled_call(at) is not None or lending.has_compiled_forward(at):
                top = at
            if at not in above:
                return top
            at = above[at]

    def inside_compiled(self) -> set[int]:
        """The ids of modules that nothing can stand before: they are compiled as a part of another one."""
        return {
            id(inner)
            for module in self.root.modules()
            if lending.compiled_call(module) is not None or lending.has_compiled_forward(module)
            for inner in module.modules()
            if inner is not module
        }

    def _guard_compile(self, lenders: dict[nn.Module, Lender], above: dict[nn.Module, nn.Module]) -> None:
        guarded: dict[nn.Module, None] = {}
        for module in lenders:
            at: nn.Module | None = module
            while at is not None and at not in guarded:
                guarded[at] = None
                at = above.get(at)
        for module in guarded:
            if "compile" not in module.__dict__ and is_called(module):
                module.__dict__["compile"] = lending.CompileLater(self, module)
        self._hooked = list({**dict.fromkeys(lenders), **guarded})

    def uninstall(self) -> None:
        for module in self._hooked:
            lending.uninstall(module)
        self._hooked = []

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
                self._remember(unit)
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

    def _travelling(self, unit: Unit) -> tuple[list[list[Slot]], list[Tensor]]:
        """The distinct tensors that have to be fetched, each with the slots that it (tied weights) fills."""
        found: dict[int, tuple[list[Slot], Tensor]] = {}
        for slot in unit.slots:
            rest = slot.store.get(slot.name)
            if rest is None:
                continue
            if rest.device.type == "meta":
                raise PlanConflict(
                    f"{self.name}: the weight {slot.path!r} is on the meta device, its values are gone; something moved "
                    f"the component while it was offloaded. Load it again, or call `to`/`enable_*` of the pipeline instead"
                )
            if rest.device == unit.device and not self.always_travel and unit.row.home != "disk":
                continue  # moved there by hand: it is where it has to be
            found.setdefault(id(rest), ([], rest))[0].append(slot)
        return [slots for slots, _ in found.values()], [rest for _, rest in found.values()]

    def _spans(self, unit: Unit, rests: list[Tensor]) -> list[Span | None]:
        """The slices of files that ``rests`` are views of; for those of the homes in memory, none."""
        if unit.row.home != "disk":
            return [None] * len(rests)
        if not all(unit.knows(rest) for rest in rests):
            self._locate()
        spans: list[Span | None] = []
        for rest in rests:
            span = unit.known[id(rest)][2]
            if span is not None and changed_in_memory(rest):
                unit.known[id(rest)] = (rest, version(rest), None)
                span = None
            spans.append(span)
        return spans

    def _locate(self) -> None:
        """Find the slices of files behind everything that rests on disk; the system is asked once.

        The system's file cache would hold the latest of what is streamed, which is needed last, and give up pages that
        are kept for it. So only as much goes through the cache as can stay there until the next pass.
        """
        mappings = Mappings()
        room = machine.available_ram() * CACHE // 100 - sum(u.row.nbytes for u in self.units if u.maps)
        for unit in self.units:
            if unit.row.home == "disk" and not unit.put:
                rests = self._travelling(unit)[1]
                room -= 0 if unit.maps else unit.row.nbytes
                once = room < 0 and not unit.maps
                unit.known = {id(rest): (rest, version(rest), mappings.span(rest, once)) for rest in rests}

    def _fetch(self, unit: Unit, rests: list[Tensor], must: bool = True) -> Cargo | None:
        lane = lane_to(unit.device)
        own = unit.row.keep or unit.outer or torch.is_grad_enabled()
        spans = self._spans(unit, rests)
        try:
            if not own:
                lane.reserve(self._capacity.get(unit.device, 0))
            cargo = lane.start(rests, spans, own, must=False, ahead=not must)
            if cargo is None and must:
                self._recall(lane)
                cargo = lane.start(rests, spans, own)
            return cargo
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if not must:
                return None
            return self._fetch_again(unit, rests, spans, error)

    def _fetch_again(self, unit: Unit, rests: list[Tensor], spans: list[Span | None], error: BaseException) -> Cargo:
        """Out of memory: give back whatever is not in use, and try once more."""
        lane = lane_to(unit.device)
        self._recall(lane)
        room_on(unit.device).clear(but=self)
        lane.release()
        if unit.device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            cargo = lane.start(rests, spans, own_memory=True)
            assert cargo is not None
            return cargo
        except Exception as again:
            if not is_out_of_memory(again):
                raise
            need = sum(r.numel() * r.element_size() for r in rests)
            raise BudgetError(
                f"{self.name}/{unit.row.unit}: {need} bytes of weights don't fit on {unit.device} beside what is there. "
                f"Smaller units need less: `enable_group_offload(offload_type='leaf_level')`, or a smaller image"
            ) from error

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

    def _remember(self, unit: Unit) -> None:
        before, last = self._recent
        if last is not None and last is not unit:
            self._next[(id(before), id(last))] = unit
            self._next[id(last)] = unit
        if last is not unit:
            self._recent = (last, unit)

    def _after(self, before: Unit | None, unit: Unit) -> Unit | None:
        found = self._next.get((id(before), id(unit))) or self._next.get(id(unit))
        if found is None:  # never came this far: the order of definition is the best guess
            index = unit.index + 1
            found = self.units[index] if index < len(self.units) else None
        return found

    def _fetch_ahead(self, unit: Unit) -> None:
        """Begin with the units that will be needed next, as many as there is room for."""
        if torch.is_grad_enabled():
            return
        before, at = self._recent[0], unit
        if self._frontier is not None and self._frontier[1].coming is not None:
            before, at = self._frontier  # everything up to there is on its way
        seen = {id(unit)}
        while True:
            before, following = at, self._after(before, at)
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
                self._frontier = (before, following)

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
            self._recent, self._frontier = (None, None), None
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
        groups = [Group(u.row.unit.partition("/")[2], u.slots, u.triggers) for u in self.units]
        home = self.units[0].row.home
        if home == "disk":
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
        engine = module.__dict__[_ATTRIBUTE] = Engine(module, name)
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


def _above(root: nn.Module) -> dict[nn.Module, nn.Module]:
    return {child: module for module in root.modules() for child in module.children()}
