"""The way to a device: order of copies and computation on a simulated accelerator, and the ring."""

from __future__ import annotations

import contextlib
import ctypes
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from effusion.core.errors import CheckpointError
from effusion.placement import engine, lane, machine, policies, streams
from effusion.placement.arena import ALIGN, Arena, host_pages, layout
from effusion.placement.offload_files import write_offload_file
from effusion.placement.sources import Mappings, OpenFile, changed_in_memory, is_dense

from . import toys
from .conftest import travel_always

CPU = torch.device("cpu")


class Event:
    """Knows everything that happened before it was recorded."""

    def __init__(self) -> None:
        self.knows: set[int] = set()

    def record(self, stream: Stream) -> None:
        self.knows = set(stream.knows)

    def synchronize(self) -> None:
        Api.host |= self.knows

    def query(self) -> bool:
        return False  # never known to be over: the strictest accelerator there is


class Stream:
    def __init__(self, device: Any = None) -> None:
        self.knows: set[int] = set()

    def wait_event(self, event: Event) -> None:
        self.knows |= event.knows

    def synchronize(self) -> None:
        Api.host |= self.knows


class Api:
    """Stands for ``torch.cuda``: streams that only know what they waited for."""

    Event, Stream = Event, Stream
    compute = Stream()
    host: set[int] = set()
    thread = threading.local()

    @staticmethod
    def current_stream(device: Any = None) -> Stream:
        return getattr(Api.thread, "now", Api.compute)

    @staticmethod
    def device(device: Any) -> Any:
        return contextlib.nullcontext()

    @staticmethod
    @contextlib.contextmanager
    def stream(stream: Stream) -> Iterator[None]:
        before, Api.thread.now = Api.current_stream(), stream
        try:
            yield
        finally:
            Api.thread.now = before


class Watch:
    """Numbers every copy into the ring and every use of it, and says when one may run into the other."""

    def __init__(self) -> None:
        self.count = 0
        self.uses: dict[int, set[int]] = {}  # byte (in blocks of 512) -> uses of it
        self.copies: dict[int, int] = {}  # block -> its last copy
        self.chunks: dict[int, set[int]] = {}  # address of a pinned chunk -> copies out of it
        self.direct = 0  # copies from pinned weights
        self.problems: list[str] = []

    def blocks(self, tensor: torch.Tensor, base: int) -> range:
        start = tensor.data_ptr() - base
        return range(start // 512, (start + max(tensor.nbytes, 1) - 1) // 512 + 1)

    def filled(self, chunk: int) -> None:
        """The host writes into a chunk, at once."""
        if self.chunks.get(chunk, set()) - Api.host:
            self.problems.append("a chunk is filled that may still be copied from")

    def copied(self, blocks: range, source: int) -> None:
        """A copy was queued."""
        self.count += 1
        for b in blocks:
            if self.uses.get(b, set()) - Api.current_stream().knows:
                self.problems.append(f"copy over block {b} that may still be computed with")
            self.copies[b] = self.count
        chunk = next((c for c in self.chunks if c <= source < c + streams.CHUNK), None)
        if chunk is not None:
            self.chunks[chunk].add(self.count)
        else:
            self.direct += 1
        Api.current_stream().knows.add(self.count)

    def used(self, blocks: range) -> None:
        self.count += 1
        for b in blocks:
            if self.copies.get(b) not in Api.compute.knows:
                self.problems.append(f"block {b} used before its copy was waited for")
            self.uses.setdefault(b, set()).add(self.count)
        Api.compute.knows.add(self.count)


def simulate(monkeypatch: pytest.MonkeyPatch, pinned: bool = False) -> tuple[lane.Lane, Watch]:
    """A lane to the CPU that behaves as one to an accelerator, which sees plain memory as ``pinned`` or not."""
    monkeypatch.setattr(lane, "SMALL", 0)
    monkeypatch.setattr(streams, "CHUNK", 1024)
    monkeypatch.setattr(streams, "is_pinned", lambda piece: pinned and isinstance(piece.source, torch.Tensor))
    Api.compute, Api.host = Stream(), set()
    Api.thread = threading.local()
    road = lane.Lane(CPU)
    road.streams = streams.CudaStreams(CPU)
    road.streams.api = Api
    watch = Watch()
    queue, pin = streams.CudaStreams.queue, streams.pinned_bytes

    def pinned_bytes(nbytes: int) -> torch.Tensor:
        chunk = pin(nbytes)
        watch.chunks[chunk.data_ptr()] = set()
        return chunk

    def queued(self: Any, target: torch.Tensor, source: torch.Tensor, waits: bool = False) -> None:
        base = road.arena.buffer.data_ptr() if road.arena is not None else 0
        watch.copied(watch.blocks(target, base), source.data_ptr())
        queue(self, target, source, waits)

    fill = lane.Lane._fill

    def filling(self: Any, target: memoryview, pieces: Any, start: int, stop: int) -> None:
        watch.filled(ctypes.addressof(ctypes.c_char.from_buffer(target)))
        fill(self, target, pieces, start, stop)

    monkeypatch.setattr(streams, "pinned_bytes", pinned_bytes)
    monkeypatch.setattr(streams.CudaStreams, "queue", queued)
    monkeypatch.setattr(lane.Lane, "_fill", filling)
    monkeypatch.setitem(lane._lanes, CPU, road)
    return road, watch


def observe(module: nn.Module, road: lane.Lane, watch: Watch) -> None:
    """Tell ``watch`` of every weight in the ring that ``module`` computes with."""

    def use(m: nn.Module, args: Any) -> None:
        for p in m._parameters.values():
            if p is not None and road.arena is not None and road.arena.holds(p):
                watch.used(watch.blocks(p, road.arena.buffer.data_ptr()))

    for m in module.modules():
        m.register_forward_pre_hook(use)


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("home", ["host", "pinned", "disk"])
def test_copies_and_computation_keep_their_order(
    kind: str, ahead: bool, home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    road, watch = simulate(monkeypatch, pinned=home == "pinned")
    module, x = toys.Fails(), torch.randn(2, 8)
    with torch.no_grad():
        resident = module(x)
    folder = tmp_path if home == "disk" else None
    policies.apply_group_offloading(module, "cpu", offload_type=kind, use_stream=ahead, offload_to_disk_path=folder)
    travel_always(module)
    observe(module, road, watch)
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(module(x), resident)
        module.fail_at = 1
        with pytest.raises(RuntimeError):
            module(x)
        module.fail_at = None
        assert torch.equal(module(x), resident)
    policies.remove(module)
    assert watch.uses and watch.copies
    assert bool(watch.direct) == (home == "pinned") and bool(watch.chunks) == (home != "pinned")
    assert not watch.problems, watch.problems[:3]


@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("forgotten", ["mark", "wait", "synchronize"])
def test_the_simulation_finds_a_forgotten_wait(forgotten: str, pinned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    road, watch = simulate(monkeypatch, pinned)
    target = Event if forgotten == "synchronize" else streams.CudaStreams
    monkeypatch.setattr(target, forgotten, lambda *args: None)
    module, x = toys.Fails(), torch.randn(2, 8)
    policies.apply_group_offloading(module, "cpu", offload_type="block_level", use_stream=True)
    travel_always(module)
    observe(module, road, watch)
    with torch.no_grad():
        module(x), module(x)
    policies.remove(module)
    assert bool(watch.problems) == (forgotten != "synchronize" or not pinned)  # what is pinned needs no chunk


def test_what_was_copied_before_a_fetch_failed_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file ends halfway: copies of its first half may still be under way when its room is given to others."""
    road, watch = simulate(monkeypatch)
    module, x = toys.Fails(), torch.randn(2, 8)
    policies.apply_group_offloading(module, "cpu", offload_type="block_level", offload_to_disk_path=tmp_path)
    travel_always(module)
    observe(module, road, watch)
    read, after = OpenFile.read, list[int]()

    def ends(self: OpenFile, target: memoryview, offset: int, once: bool = False) -> None:
        if after and watch.count > after[0]:
            raise CheckpointError("it ends here")
        read(self, target, offset, once)

    monkeypatch.setattr(OpenFile, "read", ends)
    with torch.no_grad():
        module(x)
        after.append(watch.count)
        with pytest.raises(CheckpointError, match="ends here"):
            module(x)
    begun = set(range(after[0] + 1, watch.count + 1))
    assert begun and begun <= Api.compute.knows, "the computation does not wait for what was begun"
    policies.remove(module)


# -- pinned memory -------------------------------------------------------------------------------------------


def test_pinned_memory_is_unregistered_while_it_is_still_there(monkeypatch: pytest.MonkeyPatch) -> None:
    registered: dict[int, int] = {}

    def mapped_at(address: int) -> bool:
        areas = (line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines())
        return any(int(a, 16) <= address < int(b, 16) for a, b in areas)

    class Runtime:
        @staticmethod
        def cudaHostRegister(address: int, nbytes: int, flags: int) -> int:
            registered[address] = nbytes
            return 0

        @staticmethod
        def cudaHostUnregister(address: int) -> int:
            assert mapped_at(address), "it is unmapped already: the address may be another one's"
            del registered[address]
            return 0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: Runtime)
    size = 64 << 20  # an area of its own
    buffer = streams.pinned_bytes(size)
    address, part = buffer.data_ptr(), buffer[100:200]
    assert registered == {address: size}
    del buffer
    assert registered, "a part of it is still in use"
    part.fill_(3)
    del part
    assert not registered and not mapped_at(address)
    monkeypatch.setattr(Runtime, "cudaHostRegister", staticmethod(lambda *args: 2))
    with pytest.raises(MemoryError, match="CUDA error 2"):
        streams.pinned_bytes(4096)


# -- the ring ------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 3000)), max_size=60))
def test_ring_never_hands_out_the_same_room_twice(steps: list[tuple[bool, int]]) -> None:
    arena = Arena(16 * 512, CPU)
    taken: list[Any] = []
    for take, size in steps:
        if take or not taken:
            room = arena.take(size)
            if room is not None:
                assert room.nbytes >= size and room.start + room.nbytes <= arena.capacity
                assert all(room.start + room.nbytes <= o.start or o.start + o.nbytes <= room.start for o in taken)
                taken.append(room)
        else:
            arena.give(taken.pop(size % len(taken)))
        assert arena.free == arena.capacity - sum(r.nbytes for r in taken)
    for room in taken:
        arena.give(room)
    assert arena.idle and arena.take(arena.capacity) is not None


def test_layout_keeps_alignment_and_file_neighbours() -> None:
    base = torch.empty(4096, dtype=torch.uint8)
    parts = [base[24:100].view(torch.float16), base[100:228].view(torch.float32), base[512:600]]
    offsets, size = layout(parts, on_cpu=True)
    assert all((at - part.data_ptr()) % ALIGN == 0 for at, part in zip(offsets, parts, strict=True))
    assert offsets[1] == offsets[0] + parts[0].nbytes, "what is adjacent in memory is adjacent in the ring"
    assert size >= offsets[-1] + parts[-1].nbytes


# -- sources ---------------------------------------------------------------------------------------------------


def test_offloaded_tensors_come_back_as_they_lie(tmp_path: Path) -> None:
    tensors = [
        torch.randn(3, 5),
        torch.randn(4, 2, 3, 3).to(memory_format=torch.channels_last),
        torch.randn(7, 3).t(),
        torch.randn(5).to(torch.float8_e4m3fn),
        torch.tensor(3.5),
        torch.empty(0, 4),
        torch.arange(9, dtype=torch.int8),
        torch.tensor([True, False]),
    ]
    back = write_offload_file(tmp_path / "effusion-1-x.safetensors", tensors)
    for a, b in zip(tensors, back, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride()
        assert torch.equal(a.view(torch.uint8) if a.dim() == 1 else a, b.view(torch.uint8) if b.dim() == 1 else b)
    mappings = Mappings()
    spans = [mappings.span(t) for t in back]
    assert all(s is not None for s, t in zip(spans, back, strict=True) if t.numel())
    from safetensors import safe_open

    with safe_open(tmp_path / "effusion-1-x.safetensors", "pt") as file:  # a valid file of the format
        assert "0" in set(file.keys())


def test_written_pages_are_no_slice_of_the_file(tmp_path: Path) -> None:
    (back,) = write_offload_file(tmp_path / "effusion-1-x.safetensors", [torch.zeros(4096)])
    assert not changed_in_memory(back)
    float(back.sum())
    assert not changed_in_memory(back)
    back.data[5] = 1.0
    assert changed_in_memory(back)
    assert Mappings().span(back) is None


def test_memory_of_this_process_is_no_file() -> None:
    assert Mappings().span(torch.zeros(1000)) is None
    assert Mappings().span(torch.zeros(1000).pin_memory() if torch.cuda.is_available() else torch.zeros(1)) is None


@pytest.mark.parametrize(
    ("tensor", "dense"),
    [
        (torch.zeros(2, 3), True),
        (torch.zeros(2, 3).t(), True),
        (torch.zeros(2, 3)[:, :2], False),
        (torch.zeros(3)[:, None].expand(3, 4), False),
        (torch.zeros(1, 3, 4, 5).to(memory_format=torch.channels_last), True),
        (torch.zeros(()), True),
    ],
)
def test_dense(tensor: torch.Tensor, dense: bool) -> None:
    assert is_dense(tensor) == dense


def test_odd_tensors_travel_too(tmp_path: Path) -> None:
    """Expanded, strided, empty and scalar weights."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("expanded", torch.randn(3)[:, None].expand(3, 4))
            self.register_buffer("strided", torch.randn(4, 6)[:, ::2])
            self.register_buffer("empty", torch.empty(0, 3))
            self.scalar = nn.Parameter(torch.tensor(2.0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x @ self.expanded + self.strided[0].sum()) * self.scalar + self.empty.sum()

    module, x = nn.Sequential(Odd()), torch.randn(2, 3)
    with torch.no_grad():
        resident = module(x)
        policies.cpu_offload(module, "cpu")
        travel_always(module)
        assert torch.equal(module(x), resident)
        policies.apply_group_offloading(module, "cpu", offload_type="leaf_level", offload_to_disk_path=tmp_path)
        assert torch.equal(module(x), resident)
    found = engine.engine_of(module)
    assert found is not None and len(found.units) == 1
    policies.remove(module)


# -- past the file cache ---------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [0, 1, 511, 512, 4097])
@pytest.mark.parametrize("nbytes", [1, 511, 700, 4096, 100_000])
@pytest.mark.parametrize("shift", [0, 8])
def test_reading_past_the_cache_gives_the_bytes_and_touches_no_others(
    start: int, nbytes: int, shift: int, tmp_path: Path
) -> None:
    data = random.Random(0).randbytes(start + nbytes)  # to the very end of the file
    (tmp_path / "file").write_bytes(data)
    file = OpenFile(tmp_path / "file")
    pages = memoryview(host_pages(nbytes + 8192)[0])
    at = 1024 + start % ALIGN + shift  # with a shift no whole sector fits into place
    file.read(pages[at : at + nbytes], start, once=True)
    assert bytes(pages) == bytes(at) + data[start:] + bytes(len(pages) - at - nbytes)


def test_a_file_that_ends_too_early_is_told_past_the_cache_too(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 5000)
    target = memoryview(host_pages(8192)[0])
    with pytest.raises(CheckpointError, match="ends at byte 5000"):
        OpenFile(tmp_path / "file").read(target, 0, once=True)


@pytest.mark.parametrize(("available", "past"), [(1 << 30, "none"), (0, "all"), (None, "some")])
def test_only_what_the_cache_can_hold_goes_through_it(
    available: int | None, past: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, x = toys.Fails(), torch.randn(2, 8)
    with torch.no_grad():
        resident = module(x)
    policies.apply_group_offloading(module, "cpu", use_stream=True, offload_to_disk_path=tmp_path)
    served = engine.engine_of(module)
    assert served is not None
    total = sum(unit.row.nbytes for unit in served.units)
    monkeypatch.setattr(machine, "available_ram", lambda: total // 2 * 4 // 3 if available is None else available)
    with torch.no_grad():
        assert torch.equal(module(x), resident)
    spans = [known[2] for unit in served.units for known in unit.known.values()]
    once = {span.once for span in spans if span is not None}
    assert once == {"none": {False}, "all": {True}, "some": {False, True}}[past]
    policies.remove(module)
