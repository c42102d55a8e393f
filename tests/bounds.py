"""Bounds of time and memory for what strangers' files can make a loader do, the processes that it starts included."""

from __future__ import annotations

import contextlib
import re
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

SECONDS, MEMORY = 20, 512 << 20  # of processor time, and more resident memory than before, at most
CHILD = 1 << 30  # of a child, which begins with importing torch


def bounded(load: Callable[[], Any]) -> Any:
    """``load()`` within the bounds; what it raises comes through."""
    _forget_peak()
    start, before, children = _seconds(), _peak(), _largest_child()
    try:
        return load()
    finally:
        assert _seconds() - start < SECONDS
        assert _peak() - before < MEMORY
        # the system counts for a child what its parent had held when it was started
        assert _largest_child() <= max(children, CHILD, _peak())


def _seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def _largest_child() -> int:
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


def _forget_peak() -> None:
    """Without this, what a test before took at its worst would hide what this one takes."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    with contextlib.suppress(OSError):
        found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
        if found is not None:
            return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
