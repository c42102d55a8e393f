"""Bringing weights home: to a device, to host memory, pinned memory, or a file; once, when a policy is set.

The ``Parameter`` objects stay the same, only their data moves, so ties, optimisers and references hold.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import PlanConflict
from .arena import layout
from .lane import view
from .offload_files import check_folder, write_offload_file
from .sources import Mappings, is_dense
from .streams import pinned_bytes
from .units import Group, Slot


def distinct(slots: Sequence[Slot]) -> list[list[Tensor]]:
    """The tensors in ``slots``, those that are the same memory (tied weights) together."""
    found: dict[Any, dict[int, Tensor]] = {}
    for slot in slots:
        t = slot.tensor
        key = (t.device, t.data_ptr(), t.shape, t.stride(), t.dtype) if t.numel() and not t.is_meta else id(t)
        found.setdefault(key, {})[id(t)] = t
    return [list(same.values()) for same in found.values()]


def set_data(same: Sequence[Tensor], value: Tensor) -> None:
    """``value`` becomes the data of every tensor in ``same``."""
    with torch.no_grad():
        for tensor in same:
            tensor.data = value


def refuse_meta(slots: Sequence[Slot], name: str) -> None:
    for slot in slots:
        if slot.tensor.is_meta:
            raise PlanConflict(
                f"{name}: {slot.path!r} is on the meta device, it has no values to place; load the component first"
            )


def to_device(slots: Sequence[Slot], device: torch.device) -> None:
    """Rest on ``device``; what is there already is not touched."""
    for same in distinct(slots):
        if same[0].device != device:
            set_data(same, same[0].detach().to(device))


def to_host(slots: Sequence[Slot]) -> None:
    to_device(slots, torch.device("cpu"))


def to_pinned(groups: Sequence[Group]) -> int:
    """Rest in page-locked memory, one exact piece per group, laid out as the ring is; returns its bytes."""
    total = 0
    done: set[int] = set()
    for group in groups:
        same = [s for s in distinct(group.slots) if not any(id(t) in done for t in s)]
        done |= {id(t) for s in same for t in s}
        firsts = [s[0] for s in same]
        if not firsts or all(t.is_pinned() for t in firsts if t.device.type == "cpu" and t.numel()):
            continue
        offsets, nbytes = layout(firsts, on_cpu=False)
        buffer = pinned_bytes(nbytes)
        total += nbytes
        for tensors, at in zip(same, offsets, strict=True):
            place = view(buffer, at, tensors[0])
            place.copy_(tensors[0].detach())
            set_data(tensors, place)
    return total


def to_disk(groups: Sequence[Group], folder: str | os.PathLike[str] | None, name: str) -> list[Path]:
    """Rest in files: the ones they were loaded from where that is known, else new ones in ``folder``.

    Returns:
        All files that hold weights of ``groups`` now.

    Raises:
        CheckpointError: ``folder`` can't be written to or is too small; nothing was moved.
        PlanConflict: there are weights without a file, and no folder.
    """
    mappings = Mappings()
    used: dict[Path, None] = {}
    homeless: list[tuple[Group, list[list[Tensor]]]] = []
    seen: set[int] = set()
    for group in groups:
        same = [s for s in distinct(group.slots) if id(s[0]) not in seen and s[0].numel()]
        spans = [mappings.span(s[0]) for s in same]
        used |= dict.fromkeys(span.file.path for span in spans if span is not None)
        same = [s for s, span in zip(same, spans, strict=True) if span is None]
        seen |= {id(t) for s in same for t in s}
        if same:
            homeless.append((group, same))
    need = sum(s[0].numel() * s[0].element_size() for _, same in homeless for s in same)
    if not need:
        return list(used)
    if folder is None:
        first = homeless[0][0].slots[0].path
        raise PlanConflict(
            f"{name}: {need} bytes of weights (the first is {first!r}) are views of no file, so they can't be read from "
            f"one; give a folder to write them to (`offload_to_disk_path`, `offload_folder`), or keep them in host memory"
        )
    path = check_folder(folder, need)
    files = []
    try:
        for group, same in homeless:
            label = (group.name or "all").replace("/", "_")[:80]
            file = path / f"effusion-{os.getpid()}-{uuid.uuid4().hex[:8]}-{name}-{label}.safetensors"
            firsts = [s[0].detach() if is_dense(s[0]) else s[0].detach().contiguous() for s in same]
            files.append(file)
            for tensors, mapped in zip(same, write_offload_file(file, firsts), strict=True):
                set_data(tensors, mapped)
    except BaseException:
        remove(files)
        raise
    return [*used, *files]


def files_of(slots: Sequence[Slot]) -> list[Path]:
    """The files that weights in ``slots`` are views of."""
    mappings = Mappings()
    spans = [mappings.span(same[0]) for same in distinct(slots)]
    return list(dict.fromkeys(span.file.path for span in spans if span is not None))


def is_ours(file: Path) -> bool:
    """Whether ``file`` was written by :func:`to_disk` of this process (and not by whoever saved a model)."""
    return file.name.startswith(f"effusion-{os.getpid()}-")


def remove(files: Sequence[Path]) -> None:
    """Remove offload files; mappings of them stay valid until the last weight over them is gone."""
    for file in files:
        with contextlib.suppress(OSError):
            file.unlink()


def nbytes_of(slots: Sequence[Slot]) -> int:
    return sum(s[0].numel() * s[0].element_size() for s in distinct(slots))
