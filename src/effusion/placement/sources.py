"""Where the bytes of a resting weight come from: memory, or slices of files read with ``pread``.

A weight that was loaded from a file is a view of a private mapping of that file. Reading it through
the mapping would fill this process with pages that nobody counts; reading the same bytes with
``pread`` into a buffer that is used again costs no memory beyond the buffer. So the mapping is what
rests in the module (``state_dict`` and saving see true weights, at no cost), and the slice is what
is read. Which file, and where in it, is asked of the system: that also finds mappings that other
libraries made.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import functools
import mmap
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..core.errors import CheckpointError

_PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
_SECTOR = 512  # bytes that disks are read in, past the system's cache


@dataclass(frozen=True)
class Span:
    """``nbytes`` at ``offset`` of an open file; ``once``: read past the system's file cache."""

    file: OpenFile
    offset: int
    nbytes: int
    once: bool = False


class OpenFile:
    """A file kept open, so that replacing or removing its name changes nothing; changing its bytes is noticed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        self.stamp = self._stamp()

    def __del__(self) -> None:
        for fd in (self.__dict__.get("fd"), self.__dict__.get("_direct")):
            if fd is not None:
                with contextlib.suppress(OSError):
                    os.close(fd)

    @functools.cached_property
    def _direct(self) -> int | None:
        """The file opened once more, past the system's cache; ``None`` where there is no such thing."""
        try:
            return os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        except (OSError, AttributeError):
            return None

    def _stamp(self) -> tuple[int, int, int, int]:
        s = os.fstat(self.fd)
        return s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns

    def check(self) -> None:
        """Raise :class:`CheckpointError` if the bytes of the file were changed since it was opened."""
        if self._stamp() != self.stamp:
            raise CheckpointError(
                f"{self.path} was changed while weights are lent from it; they are no longer what was loaded. "
                f"Load the model again (files may be replaced or removed at any time, but not written into)"
            )

    def read(self, target: memoryview, offset: int, once: bool = False) -> None:
        """Fill ``target`` from ``offset``; :class:`CheckpointError` if the file ends before that.

        Args:
            once: past the system's file cache, where that can be done.
        """
        if once and self._past_cache(target, offset):
            return
        done = 0
        while done < len(target):
            got = os.preadv(self.fd, [target[done:]], offset + done)
            if got <= 0:
                raise CheckpointError(
                    f"{self.path} ends at byte {offset + done}, weights were expected up to {offset + len(target)}: "
                    f"it was truncated while they are lent from it. Load the model again"
                )
            done += got

    def _past_cache(self, target: memoryview, offset: int) -> bool:
        """Fill ``target`` straight from the disk; ``False`` where the file system, the address or the end of the file
        forbids it. Sectors that stick out at both ends go through a small buffer."""
        before, first = offset % _SECTOR, -offset % _SECTOR
        last = first + (len(target) - first) // _SECTOR * _SECTOR
        address = ctypes.addressof(ctypes.c_char.from_buffer(target)) if len(target) else 0
        if self._direct is None or last <= first or (address + first) % _SECTOR:
            return False
        edges = memoryview(mmap.mmap(-1, 2 * _SECTOR))
        parts = [target[first:last]]
        parts = [edges[:_SECTOR], *parts] if first else parts
        parts = [*parts, edges[_SECTOR:]] if last < len(target) else parts
        try:
            if os.preadv(self._direct, parts, offset - before) < before + len(target):
                return False
        except OSError:
            return False
        target[:first] = edges[before:_SECTOR] if first else b""
        target[last:] = edges[_SECTOR : _SECTOR + len(target) - last]
        return True


_open_files: dict[tuple[int, int], OpenFile] = {}  # (device, inode) -> file; see `release_unused_files`


def open_file(path: Path, inode: int | None = None) -> OpenFile | None:
    """The open file of ``path``; ``None`` if it is gone or is another file than the one with ``inode``."""
    try:
        stat = os.stat(path)
    except OSError:
        return None
    if inode is not None and stat.st_ino != inode:
        return None
    key = (stat.st_dev, stat.st_ino)
    if key not in _open_files or _open_files[key]._stamp() != _open_files[key].stamp:
        _open_files[key] = OpenFile(path)
    return _open_files[key]


def release_unused_files() -> None:
    """Close the files that no weight refers to any more."""
    for key in [k for k, f in _open_files.items() if sys.getrefcount(f) <= 3]:
        del _open_files[key]


class Mappings:
    """The file mappings of this process at one moment: from a tensor to the slice of a file behind it."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._areas: list[tuple[int, int, int, int, str]] = []  # start, end, offset in file, inode, path
        self._written: set[int] = set()  # starts of those of which pages were written to
        try:
            lines = Path("/proc/self/smaps").read_text().splitlines()
        except OSError:  # not Linux: nothing is known to be mapped
            return
        start = 0
        for line in lines:  # in the order of addresses
            if line.startswith(("Anonymous:", "Swap:")) and line.split()[1] != "0":
                self._written.add(start)
            fields = line.split(None, 5)
            if fields[0].endswith(":"):
                continue
            start, end = (int(n, 16) for n in fields[0].split("-"))
            if len(fields) < 6 or not fields[5].startswith("/") or fields[5].startswith("/dev/"):
                continue
            offset, inode, path = int(fields[2], 16), int(fields[4]), fields[5].replace("\\012", "\n")
            last = self._areas[-1] if self._areas else (0, 0, 0, 0, "")
            if last[1] == start and last[2] + (start - last[0]) == offset and last[3:] == (inode, path):
                start, offset = last[0], last[2]  # one mapping, of which a part was given an advice of its own
                self._areas.pop()
            self._areas.append((start, end, offset, inode, path))
        self._starts = [area[0] for area in self._areas]

    def span(self, tensor: Tensor, once: bool = False) -> Span | None:
        """The slice of a file that ``tensor`` is an unchanged view of, or ``None``; ``once`` as in :class:`Span`."""
        if tensor.device.type != "cpu" or tensor.numel() == 0 or not is_dense(tensor):
            return None
        at, nbytes = tensor.data_ptr(), tensor.numel() * tensor.element_size()
        index = bisect.bisect_right(self._starts, at) - 1
        if index < 0:
            return None
        start, end, offset, inode, path = self._areas[index]
        if at + nbytes > end or path.endswith(" (deleted)") or (start in self._written and changed_in_memory(tensor)):
            return None
        file = open_file(Path(path), inode)
        if file is None or offset + (at - start) + nbytes > file.stamp[2]:
            return None
        return Span(file, offset + (at - start), nbytes, once)


def changed_in_memory(tensor: Tensor) -> bool:
    """Whether pages of a privately mapped ``tensor`` were written to, so that the file no longer says what it holds.

    Bit 61 of a page's entry says that it still is the file's; a written page is this process's own.
    """
    start = tensor.data_ptr()
    first = start // _PAGE
    count = (start + max(tensor.nbytes, 1) - 1) // _PAGE - first + 1
    raw = _page_entries(8 * first, 8 * count)
    if count <= 64:
        return any(e >> 62 and not e >> 61 & 1 for e in memoryview(raw).cast("Q"))
    entries = torch.frombuffer(bytearray(raw), dtype=torch.int64)
    touched = (entries >> 62) != 0  # present, or swapped out
    return bool((touched & ((entries & (1 << 61)) == 0)).any())


def give_back_pages(tensors: Iterable[Tensor]) -> None:
    """Take the pages of ``tensors``, unchanged views of mapped files, out of this process; whoever reads them again
    gets them from the file (or from the system's cache of it)."""
    _advise(tensors, "MADV_DONTNEED")


def bring_in(tensors: Iterable[Tensor]) -> None:
    """Read the pages of ``tensors``, views of mapped files, into this process."""
    for tensor in tensors:
        flat_bytes(tensor)[::_PAGE].max()


def join(tensors: Iterable[Tensor]) -> None:
    """Take back what :func:`set_apart` has done to ``tensors``, views of mapped files."""
    _advise(tensors, "MADV_NORMAL")


def set_apart(inside: Iterable[Tensor], outside: Iterable[Tensor]) -> None:
    """Let reading ``inside``, views of mapped files, bring in no pages of ``outside``: the system maps all of a piece of
    up to two megabytes that its cache holds together, but not across areas with different advice."""
    join(inside)
    _advise(outside, "MADV_RANDOM")


def _advise(tensors: Iterable[Tensor], advice: str) -> None:
    """Tell the system about the whole pages that ``tensors`` lie in."""
    areas: list[list[int]] = []
    for start, stop in sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors if t.numel()):
        if areas and start - areas[-1][1] <= 64:
            areas[-1][1] = max(stop, areas[-1][1])
        else:
            areas.append([start, stop])
    if not hasattr(mmap, advice):
        return
    libc = ctypes.CDLL(None)
    for start, stop in areas:
        first, last = -(-start // _PAGE) * _PAGE, stop // _PAGE * _PAGE
        if last > first:
            libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), getattr(mmap, advice))


def present_bytes(tensor: Tensor) -> int:
    """Bytes of ``tensor`` whose pages are in memory now: all of it, or part of a mapped file."""
    if tensor.device.type != "cpu" or not tensor.numel():
        return 0
    first = tensor.data_ptr() // _PAGE
    count = (tensor.data_ptr() + tensor.nbytes - 1) // _PAGE - first + 1
    raw = _page_entries(8 * first, 8 * count)
    if len(raw) < 8 * count:
        return tensor.nbytes
    entries = torch.frombuffer(bytearray(raw), dtype=torch.int64)
    return min(int((entries < 0).sum()) * _PAGE, tensor.nbytes)  # the highest bit: present


_pagemap: list[int] = []  # descriptor of this process's page map; empty: not opened yet, [-1]: there is none


def _page_entries(offset: int, nbytes: int) -> bytes:
    if not _pagemap:
        try:
            _pagemap.append(os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC))
        except (OSError, AttributeError):
            _pagemap.append(-1)
    return os.pread(_pagemap[0], nbytes, offset) if _pagemap[0] >= 0 else b""


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pagemap.clear)  # a child has pages of its own


def is_dense(tensor: Tensor) -> bool:
    """Whether ``tensor`` covers one piece of memory without holes or overlaps, in any order of dimensions."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def flat_bytes(tensor: Tensor) -> Tensor:
    """The memory of a dense ``tensor`` as bytes, in the order it lies in."""
    if tensor.numel() == 0:
        return torch.empty(0, dtype=torch.uint8, device=tensor.device)
    flat = tensor.detach()
    flat = flat.view(-1) if flat.is_contiguous() else flat.as_strided((flat.numel(),), (1,), flat.storage_offset())
    return flat.view(torch.uint8)
