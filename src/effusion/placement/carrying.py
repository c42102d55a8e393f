"""Carrying out a plan: its networks in the forms, at the homes and in the units that its rows name."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import PlanConflict
from . import casting, homes, machine, policies
from .engine import engine_for, engine_of
from .plan import Plan, Row
from .sources import Mappings, bring_in, give_back_pages, join, set_apart
from .unit import Unit
from .units import Group, all_slots, by_block, by_leaf

Form = tuple[torch.dtype, torch.dtype]  # at rest, of computing
Cuts = Mapping[str, Sequence[Group]]  # the units of networks, by name


@dataclass(frozen=True)
class InForce:
    """What was carried out on one network, by whichever pipeline has it; ``ended`` by another policy since."""

    rows: tuple[Row, ...]
    switches: Mapping[str, Any]
    ended: bool = False


_in_force: weakref.WeakKeyDictionary[nn.Module, InForce] = weakref.WeakKeyDictionary()


def in_force(module: nn.Module) -> InForce | None:
    """The part of a plan that was carried out on ``module``; ``None`` if none ever was."""
    return _in_force.get(module)


def check(networks: Mapping[str, nn.Module], plan: Plan) -> Cuts:
    """The units of ``networks`` that ``plan`` has rows for. Whatever can refuse does so here, before anything changes.

    Raises:
        PlanConflict: the plan is for other components, or someone else places (a part of) one of these.
        ValueError: there is no such device here.
    """
    unknown = sorted({row.component for row in plan.rows} - set(networks))
    if unknown:
        raise PlanConflict(f"the plan has rows for {unknown}; this pipeline's networks are {sorted(networks)}")
    cuts = {}
    for name, module in networks.items():
        rows = _rows(plan, name)
        if not rows:
            continue
        cut = next((g for g in (by_block(module), by_leaf(module)) if {x.name for x in g} == set(rows)), None)
        if cut is None:
            raise PlanConflict(
                f"the plan's units of {name!r} are not those of this {type(module).__name__}; plan again"
            )
        policies.check_free(module)
        homes.refuse_meta([slot for group in cut for slot in group.slots], name)
        for device in {row.device for row in rows.values()}:
            machine.check_device(device)
        cuts[name] = cut
    return cuts


def carry_out(networks: Mapping[str, nn.Module], plan: Plan, cuts: Cuts) -> tuple[str, ...]:
    """Carry out ``plan`` on ``networks``, cut into ``cuts`` by :func:`check`.

    Returns:
        How far its casts take weights from what they were.
    """
    _rejoin(networks)
    for name in cuts:  # nothing travels by an older plan while weights are converted
        engine_for(networks[name], name).set_units([], {"kind": "resident"})
    notes = _cast(networks, cast_by(plan), goes_on=True)
    for name, cut in cuts.items():
        _place(name, networks[name], plan, cut)
    for name, module in networks.items():
        _in_force[module] = InForce(plan.of(name), plan.switches)
    return notes


def release(networks: Mapping[str, nn.Module]) -> None:
    """No plan is in force on ``networks`` any more: what one has cast is as it was. Nothing is moved."""
    _rejoin(networks)
    _cast(networks, {})
    for module in networks.values():
        found = _in_force.get(module)
        if found is not None:
            _in_force[module] = replace(found, ended=True)


def to_host(networks: Mapping[str, nn.Module]) -> None:
    """Everything rests in host memory, by no policy: where one ends that could not be carried out."""
    release(networks)
    for module in networks.values():
        policies.resident(module, "cpu")


def _rejoin(networks: Mapping[str, nn.Module]) -> None:
    """Areas of mapped files that a plan in force has set apart are read as ever again."""
    planned = [m for m in networks.values() if (found := _in_force.get(m)) is not None and not found.ended]
    if planned:
        mappings = Mappings()
        tensors = (slot.tensor for module in planned for slot in all_slots(module))
        join(tensor for tensor in tensors if mappings.span(tensor) is not None)


# -- forms -----------------------------------------------------------------------------------------------


def cast_by(plan: Plan) -> dict[str, Form]:
    """The components that ``plan`` itself brings into another form."""
    storage = plan.switches.get("storage_dtype")
    cast = {row.component: row.compute_dtype for row in plan.rows if storage and row.form == storage}
    return {name: (getattr(torch, str(storage)), getattr(torch, str(compute))) for name, compute in cast.items()}


def is_cast(module: nn.Module) -> bool:
    """Whether a plan has brought ``module`` into another form."""
    engine = engine_of(module)
    return engine is not None and engine.planned is not None


def _cast(networks: Mapping[str, nn.Module], wanted: Mapping[str, Form], goes_on: bool = False) -> tuple[str, ...]:
    """Let networks rest in the forms ``wanted``, the others as before any plan."""
    notes = []
    for name, module in networks.items():
        engine, form = engine_of(module), wanted.get(name)
        before = engine.planned if engine is not None else None
        if before is not None and before[0] == form:
            notes.append(before[1])
            continue
        if before is not None:
            casting.uncast(module, goes_on)
        if form is not None:
            away = casting.apply_layerwise_casting(module, *form, casting.usual_patterns(module))
            note = f"{name}: its weights in {str(form[0])[6:]} are {away:.2%} from what they were"
            engine_for(module, name).planned = (form, note)
            notes.append(note)
    return tuple(notes)


# -- homes and units -------------------------------------------------------------------------------------


def _rows(plan: Plan, name: str) -> dict[str, Row]:
    return {row.unit.partition("/")[2]: row for row in plan.of(name)}


def _place(name: str, module: nn.Module, plan: Plan, cut: Sequence[Group]) -> None:
    rows = _rows(plan, name)
    engine = engine_for(module, name)
    device = machine.check_device(next(iter(rows.values())).device)
    engine.folder = folder = plan.switches.get("offload_folder")
    engine.offload = None
    files = []
    for home in dict.fromkeys(row.home for row in rows.values()):
        part = [g for g in cut if rows[g.name].home == home]
        slots = [s for g in part for s in g.slots]
        if home == "device":
            homes.to_device(slots, device)
            bring_in(_mapped([g for g in part if rows[g.name].filled]))
        elif home == "disk" and folder is None:  # what is in no file (small buffers) stays in memory
            homes.to_host(slots)
            files += homes.files_of(slots)
        else:
            files += policies.go_home(engine, part, home, folder)
        if home == "disk":
            _clear_pages([g for g in part if rows[g.name].keep], [g for g in part if not rows[g.name].keep])
    units = [Unit(rows[g.name], list(g.slots), list(g.triggers), device) for g in cut]
    if not any(row.travels for row in rows.values()) and device.type == "cpu":
        units = []
    engine.exclude, engine.give_back = frozenset(), False
    engine.set_units(units, {"kind": "plan"})
    engine.replace_files(files)
    engine.close_if_idle()


def _clear_pages(kept: Sequence[Group], streamed: Sequence[Group]) -> None:
    """Pages of mapped files that an earlier plan brought in go; what is computed with in place is set apart."""
    mappings = Mappings()
    inside, outside = _mapped(kept, mappings), _mapped(streamed, mappings)
    give_back_pages([*inside, *outside])
    set_apart(inside, outside)


def _mapped(groups: Sequence[Group], mappings: Mappings | None = None) -> list[Tensor]:
    """The weights of ``groups`` that are views of mapped files."""
    tensors = {id(s.tensor): s.tensor for g in groups for s in g.slots}.values()
    if not tensors:
        return []
    mappings = mappings or Mappings()
    return [t for t in tensors if mappings.span(t) is not None]


def own_bytes(networks: Mapping[str, nn.Module], device: torch.device) -> int:
    """Bytes that the weights of ``networks`` take on ``device``; of the CPU's, those that no file could give back."""
    slots = [slot for module in networks.values() for slot in all_slots(module)]
    there = [same[0] for same in homes.distinct(slots) if same[0].device == device]
    mappings = Mappings() if device.type == "cpu" else None
    return sum(t.nbytes for t in there if mappings is None or mappings.span(t) is None)
