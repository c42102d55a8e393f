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
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .arena import Arena, Room, allocate, layout
from .sources import Span, flat_bytes, is_dense
from .streams import Piece, is_pinned, merge, streams_of

READ = 4 << 20  # bytes that one of several readers reads at a time
SMALL = 1 << 20  # bytes that are fetched sooner than handed to a thread


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
        order = sorted(range(len(rests)), key=lambda i: _place(spans[i], rests[i]))
        offsets, nbytes = layout([rests[i] for i in order], self.device.type == "cpu")
        found = self._room(nbytes, own_memory, must)
        if found is None:
            return None
        room, buffer = found
        starts = [at for _, at in sorted(zip(order, offsets, strict=True))]
        with torch.inference_mode(False), torch.no_grad():
            tensors = [view(buffer, at, rest) for at, rest in zip(starts, rests, strict=True)]
            pieces, strays = _sources(rests, spans, starts, tensors)
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

    def _room(self, nbytes: int, own_memory: bool, must: bool) -> tuple[Room | None, Tensor] | None:
        """Room in the ring and its bytes, or memory beside it; ``None`` if there is no room and there need be none."""
        with self.lock:
            room = None if own_memory or self.arena is None else self.arena.take(nbytes)
            if room is not None:
                assert self.arena is not None
                return room, self.arena.bytes(room)
            if not must and not own_memory:
                return None
            buffer = allocate(max(nbytes, 1), self.device)
            self.outside += nbytes
            return None, buffer

    def _is_pinned(self, piece: Piece) -> bool:
        return self.device.type != "cpu" and is_pinned(piece)

    def _dispatch(self, cargo: Cargo, buffer: Tensor, pieces: list[Piece], strays: list[Any], at_once: bool) -> None:
        """Fetch on the thread, or here where handing over would take longer than fetching, or nothing else waits."""
        before = list(cargo.room.events) if cargo.room is not None else []
        begun = self.streams.mark()  # memory of its own is ours once what was queued before is done

        def work() -> None:
            with torch.inference_mode(False), torch.no_grad():
                for piece in pieces:
                    if isinstance(piece.source, Span):
                        piece.source.file.check()
                try:
                    cargo.ready = self.streams.copy(buffer, pieces, strays, [*before, begun], self._fill)
                except BaseException:
                    cargo.ready = self.streams.queued()  # what was copied so far must not meet what comes next
                    raise

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


def _sources(
    rests: list[Tensor], spans: list[Span | None], starts: list[int], places: list[Tensor]
) -> tuple[list[Piece], list[tuple[Tensor, Tensor]]]:
    """Where the bytes of ``rests`` for ``places`` come from; and (to, from) where they are no piece of memory."""
    pieces: list[Piece] = []
    strays: list[tuple[Tensor, Tensor]] = []
    for rest, span, at, place in zip(rests, spans, starts, places, strict=True):
        size = rest.numel() * rest.element_size()
        if span is not None:
            pieces.append(Piece(at, size, span))
        elif rest.device.type == "cpu" and is_dense(rest):
            pieces.append(Piece(at, size, flat_bytes(rest)))
        else:
            strays.append((place, rest.detach()))
    return pieces, strays


def view(buffer: Tensor, at: int, rest: Tensor) -> Tensor:
    """The place of ``rest`` in ``buffer``: same shape, same strides where it is dense."""
    flat = buffer.narrow(0, at, rest.numel() * rest.element_size()).view(rest.dtype)
    return flat.as_strided(rest.shape, rest.stride()) if is_dense(rest) else flat.view(rest.shape)


_lanes: dict[torch.device, Lane] = {}


def lane_to(device: torch.device) -> Lane:
    """The lane to ``device``."""
    if device not in _lanes:
        _lanes[device] = Lane(device)
    return _lanes[device]
