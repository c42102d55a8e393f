"""The order of copies to a compute device and of computation there.

On CUDA bytes go through pinned memory and a copy stream: events order a copy after the computation that used the room
before, and the computation after the copy. On the CPU everything is done when a call returns.
"""

from __future__ import annotations

import mmap
import sys
import threading
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .arena import host_pages
from .sources import Span

CHUNK = 16 << 20  # bytes per read, and per copy through pinned memory


@dataclass(frozen=True)
class Piece:
    """Bytes of a fetch: ``[start, start + nbytes)`` of the destination come from a file or from memory."""

    start: int
    nbytes: int
    source: Span | Tensor


def merge(pieces: list[Piece]) -> list[Piece]:
    """Pieces that follow one another in a file and in the destination, as one."""
    out: list[Piece] = []
    for piece in sorted(pieces, key=lambda p: p.start):
        last = out[-1] if out else None
        if (
            last is not None
            and isinstance(piece.source, Span)
            and isinstance(last.source, Span)
            and last.source.file is piece.source.file
            and last.start + last.nbytes == piece.start
            and last.source.offset + last.nbytes == piece.source.offset
        ):
            span = replace(last.source, nbytes=last.nbytes + piece.nbytes)
            out[-1] = Piece(last.start, span.nbytes, span)
        elif piece.nbytes:
            out.append(piece)
    return out


def is_pinned(piece: Piece) -> bool:
    """Whether the device can fetch ``piece`` by itself."""
    return isinstance(piece.source, Tensor) and piece.source.is_pinned()


class NoStreams:
    """Compute on the CPU (or on an accelerator that can't copy beside computing): done when the call returns."""

    def mark(self) -> Any:
        return None

    def queued(self) -> Any:
        return None

    def wait(self, event: Any) -> None:
        pass

    def release(self) -> None:
        pass

    def drain(self) -> None:
        pass

    def copy(self, buffer: Tensor, pieces: list[Piece], strays: list[Any], after: list[Any], fill: Any) -> Any:
        if pieces and buffer.device.type == "cpu":
            first, last = pieces[0].start, pieces[-1].start + pieces[-1].nbytes
            fill(memoryview(buffer.numpy())[first:last], pieces, first, last)
        elif pieces:  # an accelerator without streams of its own
            for piece in pieces:
                start, stop = piece.start, piece.start + piece.nbytes
                host = torch.empty(piece.nbytes, dtype=torch.uint8)
                fill(memoryview(host.numpy()), [piece], start, stop)
                buffer[start:stop].copy_(host)
        for target, source in strays:
            target.copy_(source)
        return None


class CudaStreams:
    """A copy stream, and two pinned chunks that pageable memory and files pass through."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.api: Any = getattr(torch, device.type)
        self._copy: Any = None
        self._chunks: list[tuple[Tensor, Any]] = []
        self._lock = threading.Lock()
        self.pinned = 0  # bytes

    def mark(self) -> Any:
        """An event after everything queued on the compute stream so far."""
        event = self.api.Event()
        event.record(self.api.current_stream(self.device))
        return event

    def queued(self) -> Any:
        """An event after all copies queued so far."""
        if self._copy is None:
            return None
        event = self.api.Event()
        event.record(self._copy)
        return event

    def wait(self, event: Any) -> None:
        self.api.current_stream(self.device).wait_event(event)

    def drain(self) -> None:
        """Wait until nothing is being copied."""
        if self._copy is not None:
            self._copy.synchronize()

    def release(self) -> None:
        with self._lock:
            for _, event in self._chunks:
                if event is not None:
                    event.synchronize()
            self._chunks, self.pinned = [], 0

    def copy(self, buffer: Tensor, pieces: list[Piece], strays: list[Any], after: list[Any], fill: Any) -> Any:
        if self._copy is None:
            self._copy = self.api.Stream(self.device)
        with self.api.device(self.device), self.api.stream(self._copy):
            for event in after:
                if event is not None:
                    self._copy.wait_event(event)
            for piece in pieces:
                if is_pinned(piece):
                    self.queue(buffer[piece.start : piece.start + piece.nbytes], piece.source)
            self._through_chunks(buffer, [p for p in pieces if not is_pinned(p)], fill)
            for target, source in strays:
                self.queue(target, source, waits=True)
        return self.queued()

    def queue(self, target: Tensor, source: Any, waits: bool = False) -> None:
        """Copy once what was queued before is done; the caller goes on meanwhile unless it ``waits``."""
        target.copy_(source, non_blocking=not waits)

    def _through_chunks(self, buffer: Tensor, pieces: list[Piece], fill: Any) -> None:
        if not pieces:
            return
        at, end = pieces[0].start, pieces[-1].start + pieces[-1].nbytes
        while at < end:
            stop = min(at + CHUNK, end)
            todo = [p for p in pieces if p.start < stop and p.start + p.nbytes > at]
            if todo:
                with self._lock:  # what is needed at once is fetched beside what is fetched ahead
                    self._one_chunk(buffer, todo, at, stop, fill)
            at = stop

    def _one_chunk(self, buffer: Tensor, todo: list[Piece], at: int, stop: int, fill: Any) -> None:
        if len(self._chunks) < 2:
            self._chunks.append((pinned_bytes(CHUNK), None))
            self.pinned += CHUNK
        chunk, event = self._chunks.pop(0)  # the one whose copy was queued first
        try:
            if event is not None:
                event.synchronize()
            fill(memoryview(chunk.numpy())[: stop - at], todo, at, stop)
            for p in todo:
                a, b = max(p.start, at), min(p.start + p.nbytes, stop)
                self.queue(buffer[a:b], chunk[a - at : b - at])
        finally:
            self._chunks.append((chunk, self.queued()))


class PinnedPages(mmap.mmap):
    """Pages that CUDA knows of until they are unmapped: afterwards the system may give their address to others."""

    address = 0  # 0: not registered

    def pin(self, address: int, nbytes: int) -> None:
        """Register the pages.

        Raises:
            MemoryError: the system would not pin them.
        """
        code = int(torch.cuda.cudart().cudaHostRegister(address, nbytes, 0))
        if code != 0:
            raise MemoryError(
                f"the system would not pin {nbytes} bytes of host memory (CUDA error {code}); "
                f"use low_cpu_mem_usage=True, which pins a small buffer only"
            )
        self.address = address

    def unpin(self) -> None:
        address, self.address = self.address, 0
        if address and not sys.is_finalizing():  # CUDA may be gone before the interpreter is
            torch.cuda.cudart().cudaHostUnregister(address)

    def close(self) -> None:
        self.unpin()
        super().close()

    def __del__(self) -> None:
        self.unpin()


def pinned_bytes(nbytes: int) -> Tensor:
    """Page-locked memory of exactly ``nbytes``; torch's own allocator would round up to a power of two."""
    pages, buffer = host_pages(max(nbytes, 1), PinnedPages)
    if torch.cuda.is_available():
        pages.pin(buffer.data_ptr(), buffer.numel())
    return buffer


def streams_of(device: torch.device) -> Any:
    return CudaStreams(device) if device.type in ("cuda", "xpu") else NoStreams()
