"""What this machine has: memory that is free (limits of containers included), devices, rates."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..core.config import write_atomically

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


# -- rates ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rates:
    """How fast this machine is, measured once: bytes or floating-point operations per second."""

    device: str
    matmul: dict[str, float]  # dtype -> flop/s
    memory: float  # bytes/s read and written by the compute device
    host_to_device: float  # bytes/s
    disk: float  # bytes/s, cold reads of the temporary folder's disk

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def cache_folder() -> Path:
    return Path(os.environ.get("EFFUSION_CACHE", Path.home() / ".cache" / "effusion"))


def rates(device: torch.device | str | None = None, fresh: bool = False) -> Rates:
    """The rates of ``device``, measured in about a second and cached in the user's cache folder."""
    where = default_device(device=device)
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else f"{where.type}-{os.cpu_count()}"
    threads = torch.get_num_threads() if where.type == "cpu" else 0
    file = cache_folder() / f"rates-{name.replace(' ', '_')}-{threads}-{torch.__version__}.json".replace("/", "_")
    if not fresh and file.exists():
        try:
            return Rates(**json.loads(file.read_text()))
        except (ValueError, TypeError):  # another version's file
            pass
    found = _measure(where)
    if file.exists():  # a busy machine measures too little; what it could once is what it can
        with contextlib.suppress(ValueError, TypeError):
            found = _best(found, Rates(**json.loads(file.read_text())))
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(found.to_dict(), indent=1).encode())
    except OSError:  # a cache that can't be written costs a second next time
        pass
    return found


def _best(a: Rates, b: Rates) -> Rates:
    matmul = {dtype: max(rate, b.matmul.get(dtype, 0.0)) for dtype, rate in a.matmul.items()}
    others = (max(a.memory, b.memory), max(a.host_to_device, b.host_to_device), max(a.disk, b.disk))
    return Rates(a.device, matmul, *others)


def _measure(device: torch.device) -> Rates:
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    matmul = {str(dtype).removeprefix("torch."): _matmul_rate(device, dtype) for dtype in dtypes}
    block = torch.ones((256 if device.type != "cpu" else 32) << 20, dtype=torch.uint8, device=device)
    memory = 2 * block.numel() / _seconds(lambda: block.clone(), device)
    host = memory / 2
    if device.type != "cpu":
        source = torch.ones(64 << 20, dtype=torch.uint8, pin_memory=device.type == "cuda")
        host = source.numel() / _seconds(lambda: block[: source.numel()].copy_(source, non_blocking=True), device)
    return Rates(str(device), matmul, memory, host, _disk_rate())


def _matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """flop/s of square products: of large ones, unless a small one says that these would take too long."""
    rate = 0.0
    for size in (512, 1536) if device.type == "cpu" else (4096,):
        if rate and 2 * size**3 / rate > 0.2:
            break
        a = torch.ones(size, size, device=device, dtype=dtype)
        rate = max(rate, 2 * size**3 / _seconds(lambda a=a: a @ a, device))
    return rate


def _seconds(work: object, device: torch.device, budget: float = 0.1) -> float:
    """Best time of one run of ``work`` within about ``budget`` seconds."""
    assert callable(work)
    sync: Any = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    best, start, runs = float("inf"), time.perf_counter(), 0
    while runs < 3 or time.perf_counter() - start < budget:
        sync()
        t = time.perf_counter()
        work()
        sync()
        best, runs = min(best, time.perf_counter() - t), runs + 1
    return best


def _disk_rate(size: int = 64 << 20) -> float:
    """Bytes/s of reading a file whose pages were dropped from the cache first."""
    import tempfile

    with tempfile.TemporaryFile() as file:
        file.write(os.urandom(1 << 20) * (size >> 20))
        file.flush()
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        buffer = bytearray(8 << 20)
        start = time.perf_counter()
        while file.readinto(buffer):
            pass
        return size / (time.perf_counter() - start)
