"""How fast this machine computes, moves and reads weights; measured once."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import torch

from ..core.files import write_atomically
from .lane import Lane
from .machine import default_device, synchronize

UNKNOWN_DISK, UNKNOWN_MAPPING = 2e8, 1e9  # bytes/s where no file can be written to measure them: rather little


@dataclass(frozen=True)
class Rates:
    """How fast this machine is, measured once: bytes or floating-point operations per second."""

    device: str
    matmul: dict[str, float]  # dtype -> flop/s
    memory: float  # bytes/s read and written by the compute device
    host_to_device: float  # bytes/s of plain memory, as weights travel
    disk: float  # bytes/s, cold reads of the temporary folder's disk
    mapped: float  # bytes/s at which pages of mapped files come into a process, out of the system's cache

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def cache_folder() -> Path:
    """Where rates are kept: ``EFFUSION_CACHE``, or a folder of the user's."""
    wish = os.environ.get("EFFUSION_CACHE")
    return Path(wish) if wish else Path("~/.cache/effusion").expanduser()


def rates(device: torch.device | str | None = None, fresh: bool = False) -> Rates:
    """The rates of ``device``, measured in about a second and cached in the user's cache folder."""
    where = default_device(device=device)
    file = _rates_file(where)
    known = _read(file)
    if known is not None and not fresh:
        return known
    found = _measure(where)
    if known is not None:  # a busy machine measures too little; what it could once is what it can
        found = _best(found, known)
    if file is not None and found.disk != UNKNOWN_DISK:
        with contextlib.suppress(OSError):  # a cache that can't be written costs a second next time
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, json.dumps(found.to_dict(), indent=1).encode())
    return found


def _rates_file(device: torch.device) -> Path | None:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}-{os.cpu_count()}"
    threads = torch.get_num_threads() if device.type == "cpu" else 0
    label = f"rates-3-{name.replace(' ', '_')}-{threads}-{torch.__version__}.json"  # 3: with `mapped`
    try:
        return cache_folder() / label.replace("/", "_")
    except RuntimeError:  # there is no home
        return None


def _read(file: Path | None) -> Rates | None:
    try:
        return Rates(**json.loads(file.read_text())) if file is not None else None
    except (OSError, ValueError, TypeError):  # none yet, not ours to read, another version's
        return None


def _best(a: Rates, b: Rates) -> Rates:
    matmul = {dtype: max(rate, b.matmul.get(dtype, 0.0)) for dtype, rate in a.matmul.items()}
    others = (max(getattr(a, n), getattr(b, n)) for n in ("memory", "host_to_device", "disk", "mapped"))
    return Rates(a.device, matmul, *others)


def _measure(device: torch.device) -> Rates:
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    matmul = {str(dtype).removeprefix("torch."): _matmul_rate(device, dtype) for dtype in dtypes}
    block = torch.ones((256 if device.type != "cpu" else 64) << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(block)  # written to again and again, as the ring is: fresh pages cost more than copying
    memory = 2 * block.numel() / _seconds(lambda: target.copy_(block), device)
    disk, cached, mapped = _file_rates()
    host = min(cached, memory / 2) if device.type == "cpu" else _host_rate(device)
    return Rates(str(device), matmul, memory, host, disk, mapped)


def _host_rate(device: torch.device, size: int = 64 << 20) -> float:
    """Bytes/s of plain host memory on the way that weights of a plan go: through two pinned chunks."""
    lane, source = Lane(device), torch.ones(size, dtype=torch.uint8)

    def fetch() -> None:
        cargo = lane.start([source], [None], own_memory=True)
        assert cargo is not None
        lane.arrive(cargo)
        lane.leave(cargo)

    try:
        return size / _seconds(fetch, device)
    finally:
        lane.release()


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
    best, start, runs = float("inf"), time.perf_counter(), 0
    while runs < 3 or time.perf_counter() - start < budget:
        synchronize(device)
        t = time.perf_counter()
        work()
        synchronize(device)
        best, runs = min(best, time.perf_counter() - t), runs + 1
    return best


def _file_rates() -> tuple[float, float, float]:
    """Bytes/s of reading a file cold, of reading it out of the system's cache, and of mapping it from there; guesses
    where none can be written."""
    for size in (64 << 20, 8 << 20):
        with contextlib.suppress(OSError), tempfile.TemporaryFile() as file:  # no folder for it, or it is full
            file.write(os.urandom(1 << 20) * (size >> 20))
            file.flush()
            return _cold_rate(file, size), _read_rate(file, size), _mapped_rate(file, size)
    return UNKNOWN_DISK, UNKNOWN_MAPPING, UNKNOWN_MAPPING


def _cold_rate(file: IO[bytes], size: int) -> float:
    """Bytes/s of reading ``file`` once its pages were dropped from the system's cache."""
    os.fsync(file.fileno())
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return _read_rate(file, size)


def _read_rate(file: IO[bytes], size: int) -> float:
    """Bytes/s of reading ``file`` into the same buffer again and again."""
    file.seek(0)
    buffer = bytearray(8 << 20)
    start = time.perf_counter()
    while file.readinto(buffer):  # type: ignore[attr-defined]
        pass
    return size / (time.perf_counter() - start)


def _mapped_rate(file: IO[bytes], size: int) -> float:
    """Bytes/s at which the pages of ``file``, which was read just now, come into this process."""
    start = time.perf_counter()
    pages = torch.frombuffer(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY), dtype=torch.uint8)
    pages[:: mmap.PAGESIZE].max()
    return size / (time.perf_counter() - start)
