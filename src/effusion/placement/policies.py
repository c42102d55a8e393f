"""The public memory switches, each a policy: it says where the units of a component rest and how they travel.

All work on any ``nn.Module``: networks of this library, of transformers, or anyone's. Setting one
replaces the one before; :func:`remove` undoes it.
"""

from __future__ import annotations

import enum
import os
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from ..core import log
from ..core.errors import PlanConflict
from . import homes, machine
from .engine import Engine, engine_for, engine_of, neighbours
from .plan import Row
from .unit import Unit
from .units import Group, all_slots, by_block, by_component, by_leaf

logger = log.get_logger(__name__)


class GroupOffloadingType(str, enum.Enum):
    """How :func:`apply_group_offloading` cuts a module."""

    BLOCK_LEVEL = "block_level"
    LEAF_LEVEL = "leaf_level"


def apply_group_offloading(
    module: nn.Module,
    onload_device: torch.device | str,
    offload_device: torch.device | str = torch.device("cpu"),
    offload_type: str | GroupOffloadingType = "block_level",
    num_blocks_per_group: int | None = None,
    non_blocking: bool = False,
    use_stream: bool = False,
    record_stream: bool = False,
    low_cpu_mem_usage: bool = False,
    offload_to_disk_path: str | os.PathLike[str] | None = None,
    block_modules: list[str] | None = None,
    exclude_kwargs: list[str] | None = None,
) -> None:
    """Let groups of layers of ``module`` rest on ``offload_device`` or disk, and compute on ``onload_device``.

    Args:
        offload_type: ``"block_level"``: groups of ``num_blocks_per_group`` blocks (1 if not given);
            ``"leaf_level"``: layer by layer.
        use_stream: fetch what comes next while the device computes. Weights in host memory are pinned
            (once, exactly their size) unless ``low_cpu_mem_usage``, which pins two small buffers.
        non_blocking, record_stream: accepted; copies are ordered by events, which needs neither.
        offload_to_disk_path: folder for weights to rest in. Those that were loaded from files are read from
            these, nothing is written for them; files written here are removed when they are no longer needed.
        block_modules: children that are one block each.
        exclude_kwargs: keyword arguments that are not moved to ``onload_device``.

    Raises:
        ValueError: an unknown type, device or number.
        PlanConflict: another policy serves a part of ``module``.
        CheckpointError: the folder can't be written to or is too small.
    """
    try:
        kind = GroupOffloadingType(offload_type)
    except ValueError:
        raise ValueError(f"offload_type={offload_type!r}: it is 'block_level' or 'leaf_level'") from None
    if num_blocks_per_group is not None and (not isinstance(num_blocks_per_group, int) or num_blocks_per_group < 1):
        raise ValueError(f"num_blocks_per_group={num_blocks_per_group!r}: give a positive number")
    onload, offload = machine.check_device(onload_device), machine.check_device(offload_device)
    if kind is GroupOffloadingType.LEAF_LEVEL:
        groups = by_leaf(module)
    else:
        if use_stream and num_blocks_per_group not in (None, 1):
            logger.warning(
                "with use_stream the next group is fetched while one computes: num_blocks_per_group=1 is best"
            )
        groups = by_block(module, num_blocks_per_group or 1, block_modules)
    on_disk = offload_to_disk_path is not None
    pinned = use_stream and not low_cpu_mem_usage and onload.type == "cuda" and offload.type == "cpu"
    home = "disk" if on_disk else "pinned" if pinned else "host"
    options: dict[str, object] = {"kind": "group", "offload_type": kind.value, "use_stream": use_stream, "home": home}
    stream(
        module, groups, onload, home, 1 if use_stream else 0, options,
        folder=offload_to_disk_path, offload=offload, exclude=frozenset(exclude_kwargs or ()),
    )  # fmt: skip


def cpu_offload(module: nn.Module, execution_device: torch.device | str | None = None, **ignored: object) -> nn.Module:
    """Sequential offloading: every layer rests in host memory and travels alone, when it is called."""
    device = machine.default_device(device=execution_device)
    stream(module, by_leaf(module), device, "host", 0, {"kind": "sequential"})
    return module


def model_offload(module: nn.Module, device: torch.device | str | None = None, name: str = "") -> None:
    """The whole of ``module`` rests in host memory; it travels when called, and stays until another needs the room."""
    where = machine.default_device(device=device)
    stream(module, by_component(module), where, "host", 0, {"kind": "model"}, keep=True, name=name)


class UserHook:
    """The handle that :func:`cpu_offload_with_hook` gives."""

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)

    def offload(self) -> None:
        """Take the weights off the compute device now."""
        module = self._module()
        engine = engine_of(module) if module is not None else None
        if engine is not None:
            engine.settle()

    def remove(self) -> None:
        """Stop serving the module; its weights stay in host memory."""
        module = self._module()
        if module is not None:
            remove(module)


def cpu_offload_with_hook(
    module: nn.Module,
    execution_device: torch.device | str | None = None,
    prev_module_hook: UserHook | None = None,
) -> tuple[nn.Module, UserHook]:
    """:func:`model_offload`, with a handle. ``prev_module_hook`` is accepted: the order comes from what runs."""
    model_offload(module, execution_device)
    return module, UserHook(module)


# -- one way for all -----------------------------------------------------------------------------------------


def stream(
    module: nn.Module,
    groups: Sequence[Group],
    device: torch.device,
    home: str,
    ahead: int,
    options: dict[str, object],
    *,
    keep: bool = False,
    folder: str | os.PathLike[str] | None = None,
    offload: torch.device | None = None,
    exclude: frozenset[str] = frozenset(),
    name: str = "",
) -> Engine:
    """Let ``groups`` of ``module`` rest at ``home`` and compute on ``device``: the policy under all of the above."""
    check_free(module)
    slots = all_slots(module)
    homes.refuse_meta(slots, name or type(module).__name__)
    engine = engine_for(module, name)
    engine.unhoist()
    if home == "pinned" and device.type == "cpu":
        home = "host"
    files = go_home(engine, groups, home, folder, offload)
    units = []
    for group in groups:
        row = Row(
            f"{engine.name}/{group.name}", homes.nbytes_of(group.slots), home, str(device), keep=keep, ahead=ahead
        )
        units.append(Unit(row, list(group.slots), list(group.triggers), device))
    engine.exclude = exclude
    engine.give_back = False
    engine.folder = folder
    engine.offload = offload
    engine.set_units(units, dict(options))
    engine.replace_files(files)
    return engine


def go_home(
    engine: Engine,
    groups: Sequence[Group],
    home: str,
    folder: str | os.PathLike[str] | None = None,
    offload: torch.device | None = None,
) -> list[Path]:
    """Bring the weights of ``groups`` to ``home``; the files that hold them then, if any."""
    slots = [slot for group in groups for slot in group.slots]
    if home == "disk":
        return homes.to_disk(groups, folder, engine.name)
    if home == "pinned":
        engine.pinned = homes.to_pinned(groups)
    elif offload is not None and offload.type != "cpu":
        homes.to_device(slots, offload)
    else:
        homes.to_host(slots)
    return []


def check_free(module: nn.Module) -> None:
    """Raise :class:`PlanConflict` if someone else places a part of ``module`` or the whole around it."""
    for engine in neighbours(module):
        if not engine.units:
            continue
        part = "a part of it" if any(m is engine.root for m in module.modules()) else "the whole that it is part of"
        raise PlanConflict(
            f"{type(module).__name__} can't have a policy of its own: {part} ({engine.name}) is offloaded already "
            f"({engine.policy.get('kind')}). Undo that first with `effusion.placement.remove(module)`, or set one "
            f"policy for the whole; `block_modules` and `exclude_modules` leave parts out"
        )
    if any(hasattr(m, "_hf_hook") for m in module.modules()):
        raise PlanConflict(
            f"{type(module).__name__} was placed by accelerate already; load it without `device_map`, or call "
            f"`accelerate.hooks.remove_hook_from_submodules(module)` first"
        )


def remove(module: nn.Module) -> None:
    """Undo the policy of ``module``: weights stay where they rest, nothing travels. Casts and patches stay too."""
    engine = engine_of(module)
    if engine is None:
        return
    engine.set_units([], {"kind": "resident"})
    engine.give_back = False
    engine.replace_files([])
    engine.close_if_idle()


def resident(module: nn.Module, device: torch.device | str | None = None) -> None:
    """Everything on ``device`` for good: what ``to(device)`` means."""
    remove(module)
    if device is not None:
        homes.to_device(all_slots(module), machine.check_device(device))


def free(module: nn.Module) -> None:
    """Take back what is lent or kept, with the policy left as it is; the end of a pipeline's call."""
    engine = engine_of(module)
    if engine is not None:
        engine.settle()


def execution_device(module: nn.Module) -> torch.device:
    """Where ``module`` computes, wherever its weights rest."""
    engine = engine_of(module)
    if engine is not None and engine.device is not None:
        return engine.device
    found = next((p.device for p in module.parameters()), torch.device("cpu"))
    return found if found.type != "meta" else torch.device("cpu")  # a network without weights is only rehearsed
