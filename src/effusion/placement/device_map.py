"""Device maps: which module computes on which device, and which rest in host memory or on disk."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from . import homes, machine
from .engine import engine_for, engine_of
from .plan import Row, parse_size
from .policies import check_free
from .unit import Unit
from .units import Group, Slot, all_slots, by_block, called_children, is_called, own_slots

Place = int | str | torch.device
STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")


def apply_device_map(
    module: nn.Module,
    device_map: str | Place | Mapping[str, Place],
    max_memory: Mapping[Place, int | str] | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    no_split: Sequence[str] = (),
    name: str = "",
) -> dict[str, Place]:
    """Place the layers of ``module``; returns the map in full, as ``hf_device_map`` shows it.

    Args:
        device_map: ``"auto"``/``"balanced"`` (spread over the accelerators, then the CPU, then disk),
            ``"sequential"`` (fill one device after the other), one device for all, or a dictionary of
            module names (``""`` for all that is not named) to devices, ``"cpu"`` or ``"disk"``.
        max_memory: bytes (or ``"1GB"``) per device; devices that are not in it are not used.
        offload_folder: where weights for ``"disk"`` are written that were loaded from no file.
        no_split: class names of modules that stay on one device.

    Raises:
        ValueError: an unknown strategy or module name, a device that isn't there, or parts left out.
    """
    check_free(module)
    if isinstance(device_map, str) and device_map in STRATEGIES:
        given: Mapping[str, Place] = infer(module, device_map, max_memory, no_split)
    else:
        given = device_map if isinstance(device_map, Mapping) else {"": device_map}
    placed = {key: _place(where) for key, where in given.items()}
    _check(module, placed)
    _carry_out(module, placed, offload_folder, name)
    if isinstance(device_map, (str, torch.device)) and device_map not in (*STRATEGIES, "disk"):
        placed = {"": torch.device(device_map)}  # the ecosystem shows one device for all as what it is
    engine_for(module).policy["map"] = placed
    return placed


def infer(
    module: nn.Module,
    strategy: str = "auto",
    max_memory: Mapping[Place, int | str] | None = None,
    no_split: Sequence[str] = (),
) -> dict[str, Place]:
    """A map of ``module`` within ``max_memory`` (by default nine tenths of what is free)."""
    limits = _limits(max_memory)
    parts = list(_parts(module, "", set(no_split)))
    sizes = {path: homes.nbytes_of(all_slots(m) if whole else own_slots(m, "")) for path, m, whole in parts}
    accelerators = [d for d in limits if d not in ("cpu", "disk")]
    if strategy in ("auto", "balanced", "balanced_low_0") and len(accelerators) > 1:
        share = sum(sizes.values()) // len(accelerators) + max(sizes.values(), default=0)
        for d in accelerators[:-1]:
            limits[d] = min(limits[d], share)
    order = list(limits)
    placed: dict[str, Place] = {}
    at, used = 0, 0
    for path, size in sizes.items():
        while at < len(order) - 1 and used + size > limits[order[at]]:
            at, used = at + 1, 0
        if used + size > limits[order[at]]:
            raise ValueError(
                f"{type(module).__name__}: {path or 'it'} ({size} bytes) fits on no device within max_memory; "
                f"allow more, or add 'disk' with a size"
            )
        placed[path] = order[at]
        used += size
    return _fold(placed, module)


def _limits(max_memory: Mapping[Place, int | str] | None) -> dict[Place, int]:
    if max_memory is not None:
        given = {
            _place(k): parse_size(v, f"max_memory[{k!r}]") if v not in (0, "0") else 0 for k, v in max_memory.items()
        }
        ordered = sorted(given, key=lambda d: (d == "disk", d == "cpu", str(d)))
        return {d: given[d] for d in ordered}
    found: dict[Place, int] = {}
    for device in machine.devices():
        place: Place = device.index if device.type != "cpu" else "cpu"
        found[place] = machine.free_device_memory(device) * 9 // 10
    return {**found, "disk": 1 << 62}


def _parts(module: nn.Module, path: str, whole: set[str]) -> Iterable[tuple[str, nn.Module, bool]]:
    """Modules that stay together: blocks, and what is not made of blocks; (path, module, all of it)."""
    if own_slots(module, ""):
        yield path, module, False
    for name, child in module.named_children():
        where = f"{path}.{name}".lstrip(".")
        deep = any(isinstance(m, (nn.ModuleList, nn.Sequential)) for m in child.modules())
        if type(child).__name__ in whole or not deep or (isinstance(module, nn.ModuleList) and not whole):
            yield where, child, True
        else:
            yield from _parts(child, where, whole)


def _fold(placed: dict[str, Place], module: nn.Module) -> dict[str, Place]:
    """One entry where all parts of a module are in one place."""
    if len(set(placed.values())) <= 1:
        return {"": next(iter(placed.values()), "cpu")}
    folded: dict[str, Place] = {}
    for path, where in placed.items():
        top = path.split(".")[0]
        same = {w for p, w in placed.items() if p.split(".")[0] == top}
        folded[top if len(same) == 1 and path else path] = where
    return folded


def _place(where: Place) -> Place:
    """A device as maps write it: a number, ``"cpu"``, ``"disk"``, or ``"kind:index"``."""
    if isinstance(where, int) and not isinstance(where, bool):
        machine.check_device(where)
        return where
    if where in ("disk", "cpu"):
        return str(where)
    device = machine.check_device(where)
    return "cpu" if device.type == "cpu" else device.index if device.type == machine.accelerator_kind() else str(device)


def _device(where: Place) -> torch.device:
    return machine.check_device(where) if where not in ("cpu", "disk") else torch.device("cpu")


def _check(module: nn.Module, placed: Mapping[str, Place]) -> None:
    names = {name for name, _ in module.named_modules()} | {n for n, _ in module.named_parameters()}
    unknown = sorted(set(placed) - names - {""})
    if unknown:
        some = sorted(n for n, _ in module.named_children())
        raise ValueError(
            f"device_map names {unknown}, which {type(module).__name__} doesn't have; its parts are {some}"
        )
    left = [slot.path for slot in all_slots(module) if _lookup(placed, slot.path) is None]
    if left:
        raise ValueError(
            f"device_map leaves out {len(left)} weights of {type(module).__name__} (the first is {left[0]!r}); "
            f"name them, or add '' for all that is not named"
        )


def _lookup(placed: Mapping[str, Place], path: str) -> Place | None:
    """The longest entry that ``path`` is in."""
    while True:
        if path in placed:
            return placed[path]
        if not path:
            return None
        path = path.rpartition(".")[0]


def _carry_out(module: nn.Module, placed: Mapping[str, Place], folder: object, name: str) -> None:
    engine = engine_for(module, name)
    engine.set_units([], {"kind": "resident"})
    main = next((_device(w) for w in placed.values() if w not in ("cpu", "disk")), torch.device("cpu"))
    several = len({_device(w) for w in placed.values() if w not in ("cpu", "disk")}) > 1
    groups: dict[Place, list[Group]] = {}
    for group in by_block(module):
        for part in _split(group, placed):
            where = _lookup(placed, part.slots[0].path)
            assert where is not None
            groups.setdefault(where, []).append(part)
    units: list[Unit] = []
    files: list[Path] = []
    for where, parts in groups.items():
        slots = [slot for part in parts for slot in part.slots]
        device = main if where in ("cpu", "disk") else _device(where)
        home = "disk" if where == "disk" else "host" if where == "cpu" else "device"
        if home == "disk":
            files += homes.to_disk(parts, folder, engine.name)  # type: ignore[arg-type]
        else:
            homes.to_device(slots, device if home == "device" else torch.device("cpu"))
        for part in parts:
            row = Row(
                f"{engine.name}/{part.name}",
                homes.nbytes_of(part.slots),
                home,
                str(device),
                ahead=int(home != "device"),
            )
            if row.travels or several or device.type != "cpu":
                units.append(Unit(row, part.slots, part.triggers, device))
    engine.offload, engine.folder = None, folder
    engine.exclude, engine.give_back = frozenset(), True
    engine.set_units(units, {"kind": "device_map"})
    engine.replace_files(files)


def _split(group: Group, placed: Mapping[str, Place]) -> list[Group]:
    """``group``, or its leaves where the map puts parts of it in different places."""
    if len({_lookup(placed, slot.path) for slot in group.slots}) <= 1:
        return [group]
    found: dict[int, Group] = {}
    for slot in group.slots:
        part = found.setdefault(id(slot.module), Group(slot.path.rpartition(".")[0], [], _callers(slot, group)))
        part.slots.append(slot)
    return list(found.values())


def _callers(slot: Slot, group: Group) -> list[nn.Module]:
    return [slot.module] if is_called(slot.module) else list(called_children(slot.module)) or list(group.triggers)


def device_map_of(module: nn.Module) -> dict[str, Place] | None:
    """The map that ``module`` was placed by, or ``None``."""
    engine = engine_of(module)
    found = engine.policy.get("map") if engine is not None else None
    return dict(found) if found is not None else None


# -- pipelines -----------------------------------------------------------------------------------------------


def place_components(
    components: Mapping[str, nn.Module],
    device_map: str | Mapping[str, Place],
    max_memory: Mapping[Place, int | str] | None = None,
) -> dict[str, Place]:
    """Which component goes where: spread evenly (``"balanced"``), all to one device, or as a dictionary says.

    Raises:
        ValueError: an unknown strategy, component or device, or components that don't fit.
    """
    if isinstance(device_map, Mapping):
        unknown = sorted(set(device_map) - set(components) - {""})
        if unknown:
            raise ValueError(f"device_map names {unknown}; the components are {sorted(components)}")
        return {n: _place(device_map.get(n, device_map.get("", "cpu"))) for n in components}
    if device_map not in STRATEGIES:
        return dict.fromkeys(components, _place(device_map))
    limits = _limits(max_memory)
    accelerators = [d for d in limits if d not in ("cpu", "disk")] or ["cpu"]
    limits.setdefault("cpu", 0)
    sizes = {n: homes.nbytes_of(all_slots(m)) for n, m in components.items()}
    used: dict[Place, int] = dict.fromkeys(accelerators, 0)
    placed: dict[str, Place] = {}
    for n in sorted(sizes, key=lambda n: -sizes[n]):
        fitting = [d for d in accelerators if used[d] + sizes[n] <= limits[d]]
        if not fitting and used.get("cpu", 0) + sizes[n] > limits["cpu"]:
            raise ValueError(
                f"the component {n!r} ({sizes[n]} bytes) fits on no device within max_memory {dict(limits)}; "
                f"use enable_model_cpu_offload, or `memory=` which finds a plan that fits"
            )
        where = min(fitting, key=lambda d: used[d]) if fitting else "cpu"
        placed[n] = where
        used[where] = used.get(where, 0) + sizes[n]
    return {n: placed[n] for n in components}
