"""Fetching: the first of what the engine does to a weight, from where it rests to where it computes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.errors import BudgetError, PlanConflict
from . import machine
from .exhausted import is_out_of_memory
from .lane import Cargo, Lane, lane_to, version
from .rooms import room_on
from .sources import Mappings, Span, changed_in_memory
from .unit import Unit
from .units import Slot

CACHE = 75  # percent of the memory that is available which the file cache may count on


class Fetching:
    """For the engine: what of its units has to travel, out of which files, and the room for it."""

    name: str
    units: list[Unit]
    always_travel: bool
    _capacity: dict[torch.device, int]

    def _recall(self, lane: Lane) -> None:
        raise NotImplementedError

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
