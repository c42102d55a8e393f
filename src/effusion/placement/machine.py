"""What this machine has: memory that is free (limits of containers included), devices."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import torch

_UNLIMITED = 1 << 60  # cgroup v1 writes a huge number where there is no limit


def default_device(gpu_id: int | None = None, device: torch.device | str | None = None) -> torch.device:
    """The device that offloaded weights compute on: ``device`` if given, else the accelerator, else the CPU.

    Raises:
        ValueError: no such device here, or ``gpu_id`` contradicts the index of ``device``.
    """
    if device is None:
        kind = accelerator_kind() or "cpu"
        index = gpu_id if kind != "cpu" else None
        if kind == "cpu" and gpu_id is not None:
            raise ValueError(
                f"gpu_id={gpu_id}: this machine has no accelerator; leave gpu_id out to compute on the CPU"
            )
        return check_device(torch.device(kind, index if index is not None else 0) if kind != "cpu" else "cpu")
    wanted = _named(device)
    if gpu_id is not None and wanted.index is not None and wanted.index != gpu_id:
        raise ValueError(f"gpu_id={gpu_id} and device={str(device)!r} name different devices; give one of them")
    return check_device(torch.device(wanted.type, gpu_id) if gpu_id is not None else wanted)


def accelerator_kind() -> str | None:
    """``"cuda"``, ``"xpu"``, ``"mps"``, or ``None``."""
    if torch.cuda.is_available():
        return "cuda"
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        return "xpu"
    return "mps" if torch.backends.mps.is_available() else None


def _named(device: torch.device | str | int) -> torch.device:
    try:
        return torch.device(accelerator_kind() or "cuda", device) if isinstance(device, int) else torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"{device!r} is no device: {str(error).splitlines()[0]}") from None


def check_device(device: torch.device | str | int) -> torch.device:
    """``device`` with its index filled in; :class:`ValueError` if this machine has no such device."""
    found = _named(device)
    if found.type in ("cpu", "meta"):
        return torch.device(found.type)
    count = device_count(found.type)
    index = found.index if found.index is not None else 0
    if index >= count:
        have = [f"{found.type}:{i}" for i in range(count)] or ["cpu"]
        raise ValueError(f"there is no device {str(found)!r} on this machine; it has {', '.join(have)}")
    return torch.device(found.type, index)


def device_count(kind: str) -> int:
    """How many devices of ``kind`` torch can use here."""
    if kind == "mps":
        return int(torch.backends.mps.is_available())
    module = getattr(torch, kind, None)
    available = getattr(module, "is_available", lambda: False)
    return int(module.device_count()) if module is not None and available() else 0


def devices() -> list[torch.device]:
    """Every accelerator here, fastest first, then the CPU."""
    kind = accelerator_kind()
    found = [torch.device(kind, i) for i in range(device_count(kind))] if kind else []
    return [*found, torch.device("cpu")]


def free_device_memory(device: torch.device) -> int:
    """Bytes that may still be allocated on ``device``; for the CPU, available RAM."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory()) - int(torch.mps.driver_allocated_memory())
    if device.type == "xpu":
        return int(torch.xpu.mem_get_info(device)[0])
    return available_ram()


def device_memory(device: torch.device) -> int | None:
    """All the bytes that an accelerator has; ``None`` where that is not known, and for the CPU."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return int(torch.xpu.mem_get_info(device)[1]) if device.type == "xpu" else None


def available_ram() -> int:
    """Bytes of RAM that this process may still take: what the system has, or less if a control group says so."""
    limits = [_meminfo("MemAvailable")]
    limits += [max(limit - used, 0) for limit, used in control_groups()]
    return min(limits)


def _meminfo(field: str) -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:  # no /proc: macOS, BSD
        return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (ValueError, OSError, AttributeError):
        return 1 << 40


def control_groups(
    proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> list[tuple[int, int]]:
    """(limit, used) of every memory control group around this process, versions 1 and 2.

    ``used`` leaves out the file cache that the kernel drops when the group needs room.
    """
    try:
        lines = proc.read_text().splitlines()
    except OSError:
        return []
    found: list[tuple[int, int]] = []
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            for mount in (root, root / "unified"):
                found += _walk(mount, path, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            found += _walk(root / "memory", path, *names)
    return found


def _walk(mount: Path, path: str, limit_name: str, used_name: str, cache_name: str) -> list[tuple[int, int]]:
    """The limits of a group and its parents; inside a container the group's own folder is the mount."""
    found = []
    folder = mount / path.lstrip("/")
    for at in _unique([folder, *folder.parents, mount]):
        if at != mount and mount not in at.parents:
            continue
        limit, used = _number(at / limit_name), _number(at / used_name)
        if limit is None or limit >= _UNLIMITED:
            continue
        found.append((limit, max((used or 0) - _statistic(at / "memory.stat", cache_name), 0)))
    return found


def _unique(paths: Iterable[Path]) -> list[Path]:
    return list(dict.fromkeys(paths))


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such group, or "max"
        return None


def _statistic(path: Path, name: str) -> int:
    try:
        for line in path.read_text().splitlines():
            if line.startswith(name + " "):
                return int(line.split()[1])
    except OSError:
        pass
    return 0


def synchronize(device: torch.device) -> None:
    """Wait until ``device`` has done what was asked of it."""
    if device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(device)
