"""The way of weights to one compute device: fetched ahead on a thread, through a ring of fixed size.

On CUDA the bytes go through pinned memory and a copy stream; events order the copy after the
computation that used the room before, and the computation after the copy. On the CPU the thread
reads straight into the ring. Nothing is ever copied back.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .arena import Arena, Room, allocate, host_pages, layout
from .sources import Span, flat_bytes, is_dense

CHUNK = 16 << 20  # bytes per read, and per copy through pinned memory
READ = 4 << 20  # bytes that one of several readers reads at a time
SMALL = 1 << 20  # bytes that are fetched sooner than handed to a thread


@dataclass(frozen=True)
class Piece:
    """Bytes of a fetch: ``[start, start + nbytes)`` of the destination come from a file or from memory."""

    start: int
    nbytes: int
    source: Span | Tensor


@dataclass
class Cargo:
    """The weights of one unit on their way to the compute device, or there."""

    rests: list[Tensor]
    versions: list[int]
    tensors: list[Tensor]
    room: Room | None  # None: memory of its own
    nbytes: int
    fetched: Future[Any] | None = None
    ready: Any = None  # event on the copy stream
    lost: Any = None  # finalizer: what to do with the room if nobody gives it back

    def current(self, rests: Sequence[Tensor]) -> bool:
        """Whether it still is what rests in the modules (and not what was there when it set out)."""
        return len(rests) == len(self.rests) and all(
            a is b and version(a) == v for a, b, v in zip(rests, self.rests, self.versions, strict=True)
        )


def version(tensor: Tensor) -> int:
    """How often ``tensor`` was changed in place; tensors of inference mode don't count that."""
    return -1 if tensor.is_inference() else tensor._version


class Lane:
    """All that travels to ``device``; one per device, shared by everything that computes there."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.arena: Arena | None = None
        self.lock = threading.RLock()  # held by whoever changes the ring
        self._worker: ThreadPoolExecutor | None = None
        self._readers: ThreadPoolExecutor | None = None
        self.transferred = 0  # bytes, in total
        self.outside = 0  # bytes of cargo in memory of its own, now
        self.streams = streams_of(device)
        self._lost: list[tuple[Room | None, int]] = []  # of cargo whose component is gone

    # -- room --------------------------------------------------------------------------------------

    def reserve(self, capacity: int) -> None:
        """Make the ring ``capacity`` bytes at least, if nothing is in it."""
        with self.lock:
            self.sweep()
            if capacity and (self.arena is None or (self.arena.capacity < capacity and self.arena.idle)):
                self.arena = None
                self.arena = Arena(capacity, self.device)

    def release(self) -> None:
        """Give the ring back, unless it is in use."""
        with self.lock:
            self.sweep()
            if self.arena is not None and self.arena.idle:
                self.arena = None
            self.streams.release()

    def sweep(self) -> None:
        """Give back the room of cargo that was still on its way when its component was thrown away."""
        with self.lock:
            if self._lost:
                self.streams.drain()
            while self._lost:
                room, nbytes = self._lost.pop()
                if room is None:
                    self.outside -= nbytes
                elif self.arena is not None:
                    self.arena.give(room)

    @property
    def held(self) -> int:
        """Bytes on the compute device: the ring, and cargo beside it."""
        return (self.arena.capacity if self.arena else 0) + self.outside

    # -- the way -----------------------------------------------------------------------------------

    def start(
        self,
        rests: list[Tensor],
        spans: list[Span | None],
        own_memory: bool = False,
        must: bool = True,
        ahead: bool = False,
    ) -> Cargo | None:
        """Begin to fetch ``rests``; ``None`` if there is no room for it in the ring and it need not be.

        Args:
            own_memory: beside the ring.
            must: beside the ring if there is no room in it.
            ahead: nobody waits for it yet.
        """
        on_cpu = self.device.type == "cpu"
        order = sorted(range(len(rests)), key=lambda i: _place(spans[i], rests[i]))
        offsets, nbytes = layout([rests[i] for i in order], on_cpu)
        with self.lock:
            room = None if own_memory or self.arena is None else self.arena.take(nbytes)
            if room is None and not must and not own_memory:
                return None
            if room is None:
                buffer = allocate(max(nbytes, 1), self.device)
                self.outside += nbytes
            else:
                assert self.arena is not None
                buffer = self.arena.bytes(room)
        tensors: list[Tensor] = [buffer] * len(rests)
        pieces: list[Piece] = []
        strays: list[tuple[Tensor, Tensor]] = []
        with torch.inference_mode(False), torch.no_grad():
            for index, at in zip(order, offsets, strict=True):
                rest, span = rests[index], spans[index]
                size = rest.numel() * rest.element_size()
                tensors[index] = view(buffer, at, rest)
                if span is not None:
                    pieces.append(Piece(at, size, span))
                elif rest.device.type == "cpu" and is_dense(rest):
                    pieces.append(Piece(at, size, flat_bytes(rest)))
                else:
                    strays.append((tensors[index], rest.detach()))
        cargo = Cargo(rests, [version(r) for r in rests], tensors, room, nbytes)
        cargo.lost = weakref.finalize(cargo, self._lost.append, (room, nbytes))
        self.transferred += sum(r.nbytes for r in rests)
        at_once = nbytes < SMALL or not ahead or all(self._is_pinned(piece) for piece in pieces)
        try:
            self._dispatch(cargo, buffer, merge(pieces), strays, at_once)
        except BaseException:
            self.leave(cargo)
            raise
        return cargo

    def _is_pinned(self, piece: Piece) -> bool:
        return self.device.type != "cpu" and isinstance(piece.source, Tensor) and piece.source.is_pinned()

    def _dispatch(self, cargo: Cargo, buffer: Tensor, pieces: list[Piece], strays: list[Any], at_once: bool) -> None:
        """Fetch on the thread, or here where handing over would take longer than fetching, or nothing else waits."""
        before = list(cargo.room.events) if cargo.room is not None else []
        begun = self.streams.mark()  # memory of its own is ours once what was queued before is done

        def work() -> None:
            with torch.inference_mode(False), torch.no_grad():
                for piece in pieces:
                    if isinstance(piece.source, Span):
                        piece.source.file.check()
                cargo.ready = self.streams.copy(buffer, pieces, strays, [*before, begun], self._fill)

        if at_once:
            work()
            return
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, thread_name_prefix="effusion-fetch")
        cargo.fetched = self._worker.submit(work)

    def _fill(self, target: memoryview, pieces: list[Piece], start: int, stop: int) -> None:
        """Write bytes ``[start, stop)`` of a fetch into ``target`` (which begins at ``start``)."""
        jobs = []
        for piece in pieces:
            a, b = max(piece.start, start), min(piece.start + piece.nbytes, stop)
            while a < b:
                end = min(b, a + READ)
                jobs.append((piece, a, end))
                a = end
        several = len(jobs) > 1 and stop - start > SMALL
        if self._readers is None and several:
            self._readers = ThreadPoolExecutor(2, thread_name_prefix="effusion-read")

        def one(job: tuple[Piece, int, int]) -> None:
            piece, a, b = job
            part = target[a - start : b - start]
            if isinstance(piece.source, Span):
                piece.source.file.read(part, piece.source.offset + a - piece.start, piece.source.once)
            else:
                torch.frombuffer(part, dtype=torch.uint8).copy_(piece.source[a - piece.start : b - piece.start])

        if several and self._readers is not None:
            list(self._readers.map(one, jobs))
        else:
            for job in jobs:
                one(job)

    def arrive(self, cargo: Cargo) -> None:
        """Wait until ``cargo`` can be computed with (on CUDA: make the computation wait)."""
        if cargo.fetched is not None:
            cargo.fetched.result()
            cargo.fetched = None
        if cargo.ready is not None:
            self.streams.wait(cargo.ready)
            cargo.ready = None

    def leave(self, cargo: Cargo) -> None:
        """The computation with ``cargo`` is queued or done (or will never be): its room is free again."""
        if cargo.fetched is not None and not cargo.fetched.cancel():
            with contextlib.suppress(Exception):  # told to whoever needed it; here it is not needed any more
                cargo.fetched.result()
        cargo.fetched = None
        cargo.lost.detach()
        if cargo.ready is not None:
            self.streams.wait(cargo.ready)
        with self.lock:
            if cargo.room is None:
                self.outside -= cargo.nbytes
            elif self.arena is not None:
                event = self.streams.mark()
                cargo.room.events = [event] if event is not None else []
                self.arena.give(cargo.room)
        cargo.tensors, cargo.rests, cargo.room = [], [], None


def _place(span: Span | None, tensor: Tensor) -> tuple[int, str, int]:
    return (0, str(span.file.path), span.offset) if span is not None else (1, "", tensor.data_ptr())


def view(buffer: Tensor, at: int, rest: Tensor) -> Tensor:
    """The place of ``rest`` in ``buffer``: same shape, same strides where it is dense."""
    flat = buffer.narrow(0, at, rest.numel() * rest.element_size()).view(rest.dtype)
    return flat.as_strided(rest.shape, rest.stride()) if is_dense(rest) else flat.view(rest.shape)


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


# -- order of copies and computation ---------------------------------------------------------------------


class NoStreams:
    """Compute on the CPU (or on an accelerator that can't copy beside computing): done when the call returns."""

    def mark(self) -> Any:
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
            paged = []
            for piece in pieces:
                if isinstance(piece.source, Tensor) and piece.source.is_pinned():
                    target = buffer[piece.start : piece.start + piece.nbytes]
                    target.copy_(piece.source, non_blocking=True)
                else:
                    paged.append(piece)
            self._through_chunks(buffer, paged, fill)
            for target, source in strays:
                target.copy_(source)
            done = self.api.Event()
            done.record(self._copy)
        return done

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
        if event is not None:
            event.synchronize()
        try:
            fill(memoryview(chunk.numpy())[: stop - at], todo, at, stop)
        except BaseException:
            self._chunks.append((chunk, None))
            raise
        for p in todo:
            a, b = max(p.start, at), min(p.start + p.nbytes, stop)
            buffer[a:b].copy_(chunk[a - at : b - at], non_blocking=True)
        mark = self.api.Event()
        mark.record(self._copy)
        self._chunks.append((chunk, mark))


def pinned_bytes(nbytes: int) -> Tensor:
    """Page-locked memory of exactly ``nbytes``; torch's own allocator would round up to a power of two."""
    pages, buffer = host_pages(max(nbytes, 1))
    if torch.cuda.is_available():
        address = buffer.data_ptr()
        code = int(torch.cuda.cudart().cudaHostRegister(address, buffer.numel(), 0))
        if code != 0:
            raise MemoryError(
                f"the system would not pin {nbytes} bytes of host memory (CUDA error {code}); "
                f"use low_cpu_mem_usage=True, which pins a small buffer only"
            )
        weakref.finalize(pages, torch.cuda.cudart().cudaHostUnregister, address).atexit = False
    return buffer


def streams_of(device: torch.device) -> Any:
    return CudaStreams(device) if device.type in ("cuda", "xpu") else NoStreams()


_lanes: dict[torch.device, Lane] = {}


def lane_to(device: torch.device) -> Lane:
    """The lane to ``device``."""
    if device not in _lanes:
        _lanes[device] = Lane(device)
    return _lanes[device]
