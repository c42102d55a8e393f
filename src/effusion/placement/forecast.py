"""The forecast: what a stage will hold and how long it will take, before weights are read.

The numbers come from a rehearsal (:mod:`.rehearsal`), from the sizes of weights, and from the rates of
the machine; which of a component's weights stay and which travel is an :class:`Option`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from . import pages
from .casting import compute_dtype
from .engine import engine_of
from .machine import Rates
from .plan import STORED, Stage
from .rehearsal import Rehearsed
from .sources import Mappings
from .units import Group, by_block, by_leaf, outer
from .workspaces import KERNEL

EFFICIENCY = 0.6  # of the rate of large matrices that networks reach
HANDOVER = 1e-4  # seconds that lending one unit takes by itself


@dataclass(frozen=True)
class Piece:
    """One unit: what travels when it is streamed, and what it takes when it stays."""

    name: str
    nbytes: int
    cost: int  # bytes on the compute device if it stays: on the CPU only what is read of the mapped file
    outer: bool = False  # modules of other units are called within its own call: it is there for all of them

    @property
    def room(self) -> int:
        """Bytes of the ring that it passes through."""
        return -(-(self.nbytes + 4096) // 512) * 512


@dataclass(frozen=True)
class Part:
    """One component as the planner sees it: how it can be cut, and what its stage needs besides weights.

    Attributes:
        blocks, leaves: its units, by block and by layer, in the order of definition.
        activations, workspaces: bytes at the worst moment.
        flops, moved: of all calls of the run.
        passes: how often all of its weights are needed.
        decoded: bytes of the largest layer once decoded, if it rests in a smaller form.
        bound: its weights are in memory already and views of no file, so they can't leave it.
    """

    name: str
    blocks: tuple[Piece, ...]
    leaves: tuple[Piece, ...]
    activations: int
    workspaces: int = 0
    flops: float = 0.0
    moved: float = 0.0
    passes: int = 1
    form: str = STORED
    compute_dtype: str | None = None
    decoded: int = 0
    bound: bool = False

    @property
    def nbytes(self) -> int:
        return sum(p.nbytes for p in self.blocks)

    @property
    def cost(self) -> int:
        """Bytes on the compute device with all of it there."""
        return sum(p.cost for p in self.blocks)

    @property
    def needed(self) -> int:
        """Bytes of its stage that no placement of weights changes."""
        return self.activations + self.workspaces + self.decoded


@dataclass(frozen=True)
class Speed:
    """Rates of the machine: flop/s, bytes/s in memory, and bytes/s from where weights rest."""

    flops: float
    stream: float
    memory: float = 1e10
    shares_cores: bool = False  # fetching weights takes time of the cores that compute

    @classmethod
    def of(cls, rates: Rates, dtype: str, stream: float) -> Speed:
        """From measured rates, for computing in ``dtype``."""
        flops = rates.matmul.get(dtype, max(rates.matmul.values()))
        return cls(flops * EFFICIENCY, stream, rates.memory, rates.device == "cpu")


@dataclass(frozen=True)
class Option:
    """One way to run a part: what stays, what travels through the ring, and what that costs."""

    level: str
    kept: frozenset[str]
    ahead: int
    weights: int  # bytes that stay while it runs
    ring: int
    seconds: float

    @property
    def need(self) -> int:
        return self.weights + self.ring


def seconds(part: Part, loaded: int, streamed: int, pieces: int, ahead: int, speed: Speed) -> float:
    """Time of all calls of ``part``.

    Args:
        loaded: bytes that are fetched once in the run.
        streamed: bytes that are fetched in every pass, in ``pieces`` units.
        ahead: whether they are fetched while others compute.
    """
    compute = part.flops / speed.flops + part.moved / speed.memory
    fetched = streamed * part.passes
    fetch = fetched / speed.stream
    lending = pieces * part.passes * HANDOVER
    if speed.shares_cores:
        compute += fetched / speed.memory
    return loaded / speed.stream + lending + (max(compute, fetch) if ahead else compute + fetch)


def stage(part: Part, option: Option, beside: int = 0, host: int = 0) -> Stage:
    """The forecast of one stage, with ``beside`` bytes of other components on the compute device."""
    return Stage(
        part.name,
        beside + option.weights,
        option.ring,
        part.activations + part.decoded,
        host,
        option.seconds,
        part.workspaces,
    )


def rounding(kernels: int) -> int:
    """Bytes on the CPU for small objects, whole pages and the libraries' buffers, which grow with the threads."""
    return (4 << 20) + pages.libraries() + torch.get_num_threads() * (1 << 19) + kernels * KERNEL


# -- from a component to a part --------------------------------------------------------------------------


def part_of(
    name: str, module: nn.Module, needs: Rehearsed, steps: int, device: torch.device,
    mappings: Mappings | None = None, kernels: int = 0,
) -> Part:  # fmt: skip
    """What the planner has to know of ``module``.

    Args:
        mappings: the file mappings of this process, to find weights that are views of none; not asked if ``None``.
        kernels: how many are compiled by the time that it runs, for stages before it too.
    """
    compute = compute_dtype(module)
    engine = engine_of(module)
    cast = {id(t.module): t for t in engine.transforms.values() if t.casts} if engine is not None else {}
    leaves = by_leaf(module)
    decoded = 0
    if compute is not None:
        for group in leaves:
            if any(id(s.module) in cast for s in group.slots):
                decoded = max(decoded, sum(s.tensor.numel() * compute.itemsize for s in group.slots))
    work = needs.work(steps)
    stored = next((str(s).removeprefix("torch.") for t in cast.values() for s, _ in t.casts.values()), STORED)
    used = needs.touched if not needs.failure else None
    return Part(
        name,
        _pieces(by_block(module), used, device),
        _pieces(leaves, used, device),
        needs.activations,
        needs.workspaces + (rounding(kernels) if device.type == "cpu" else 0),
        work.flops,
        work.moved,
        max(work.calls, 1),
        stored,
        str(compute).removeprefix("torch.") if compute is not None else None,
        decoded,
        mappings is not None and _bound(leaves, mappings),
    )


def _pieces(groups: Sequence[Group], used: dict[str, int] | None, device: torch.device) -> tuple[Piece, ...]:
    """The units of ``groups``; a weight that several share is counted with the first."""
    seen: set[int] = set()
    pieces = []
    for group, is_outer in zip(groups, outer(groups), strict=True):
        total = cost = 0
        for slot in group.slots:
            size = slot.tensor.nbytes
            reads = used.get(slot.path, 0) if used is not None else size
            fresh = id(slot.tensor) not in seen
            seen.add(id(slot.tensor))
            total += size * fresh
            cost += reads if device.type == "cpu" else size * fresh * bool(reads)
        pieces.append(Piece(group.name, total, min(cost, total), is_outer))
    return tuple(pieces)


def _bound(groups: Sequence[Group], mappings: Mappings) -> bool:
    """Whether weights of any size are views of no file."""
    tensors = {id(s.tensor): s.tensor for g in groups for s in g.slots}
    loose = sum(t.nbytes for t in tensors.values() if not t.is_meta and mappings.span(t) is None)
    return loose > max(sum(t.nbytes for t in tensors.values()) // 100, 1 << 20)  # small buffers may stay
