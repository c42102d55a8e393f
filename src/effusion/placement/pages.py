"""Memory of this process on the CPU: how the allocator takes and returns it, and how much there is.

The C library keeps what is freed for later and lets it scatter; after some calls a process holds far more than
is alive. Where a budget is tight, memory above a small size is asked of the system directly and goes back to it at
once, so that what is held is what is alive, to the page. Asking costs a little time, so it is done for the time of a
call only.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path

from .machine import available_ram

_DIRECT = 128 << 10  # bytes from which memory comes from the system
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of glibc's settings
_MAPPED = 2  # glibc's mark in front of memory that came from the system directly
_exact: list[bool] = []  # not empty within `exact`
_LARGEST = 32 << 20  # the largest threshold that glibc chooses by itself


def _libc() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(None)
        return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None
    except (OSError, TypeError):  # another C library
        return None


@contextlib.contextmanager
def exact() -> Iterator[None]:
    """Within it, memory that is freed goes back to the system at once; one inside of another changes nothing."""
    libc = _libc()
    if libc is None or _exact:
        yield
        return
    _exact.append(True)
    libc.malloc_trim(0)
    libc.mallopt(_MMAP_THRESHOLD, _DIRECT)
    libc.mallopt(_TRIM_THRESHOLD, 1 << 20)
    gaps = _taken(libc)
    try:
        yield
    finally:
        _exact.clear()
        for gap in gaps:
            libc.free(gap)
        libc.mallopt(_MMAP_THRESHOLD, _LARGEST)
        libc.mallopt(_TRIM_THRESHOLD, 2 * _LARGEST)
        libc.malloc_trim(0)


def _taken(libc: ctypes.CDLL) -> list[ctypes.c_void_p]:
    """Take the free pieces of the heap that an earlier, looser run has left: tensors would go there instead of to the
    system, and their pages would stay when they are freed. Nothing is written into the pieces, so they take no memory."""
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes = [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    gaps, size = [], 1 << 30
    while size >= _DIRECT:
        piece = libc.malloc(size)
        if (
            piece is not None
            and not ctypes.c_size_t.from_address(piece - ctypes.sizeof(ctypes.c_size_t)).value & _MAPPED
        ):
            gaps.append(ctypes.c_void_p(piece))
            continue
        libc.free(piece)  # it came from the system: the heap has nothing of this size
        size //= 2
    return gaps


def trim() -> None:
    """Give back what earlier runs have left free in between."""
    libc = _libc()
    if libc is not None:
        libc.malloc_trim(0)


def make_room(nbytes: int) -> None:
    """Give back what is free in the heap if ``nbytes`` may not be there otherwise (in a container, say)."""
    if available_ram() < nbytes:
        trim()


_LIBRARIES = 24 << 20  # bytes of code and buffers that torch's libraries bring in with the first run
_warm: list[bool] = []


def libraries() -> int:
    """Bytes that a run adds by being the first of this process."""
    return 0 if _warm else _LIBRARIES


def warmed() -> None:
    """A run is over: the libraries are in memory."""
    _warm[:] = [True]


def held() -> int:
    """Bytes that this process holds now: memory of its own, and pages of mapped files."""
    return _status("VmRSS:")


def peak() -> int:
    """The most that it held since :func:`forget_peak`."""
    return _status("VmHWM:")


def forget_peak() -> bool:
    """Begin to measure the peak anew; ``False`` where the system can't."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(key: str) -> int:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(key):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0
