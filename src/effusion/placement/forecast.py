"""The forecast: what a stage will hold and how long it will take, before weights are read.

The numbers come from a rehearsal (:mod:`.rehearsal`), from the sizes of weights, and from the rates of
the machine; which of a component's weights stay and which travel is an :class:`Option`.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from . import allocator, pages
from .casting import layers_to_cast, usual_patterns
from .engine import engine_of
from .hoisting import Hoistable
from .plan import STORED, Stage
from .rates import Rates
from .rehearsal import Rehearsed
from .sizes import Forms, Piece, Sizes
from .sources import Mappings
from .units import Group, by_block, by_leaf, own_slots
from .workspaces import KERNEL

EFFICIENCY = 0.6  # of the rate of large matrices that networks reach
HANDOVER = 1e-4  # seconds that lending one unit takes by itself
FORESEEING = 2e-3  # seconds per layer of a network to find out what can be hoisted


@dataclass(frozen=True)
class Part:
    """One component as the planner sees it: how it can be cut, and what its stage needs besides weights.

    Attributes:
        blocks, leaves: its units, by block and by layer, in the order of definition.
        activations, workspaces: bytes at the worst moment.
        flops, moved: of all calls of the run.
        passes: how often all of its weights are needed.
        decoded: bytes for decoding and patching, of the layer that takes most; and of deltas.
        bound: its weights are in memory already and views of no file, so they can't leave it.
        loose: its weights are views of no file: what does not compute with them has to keep them in host memory.
        turns: how often it is called after another component, so that it has to come again.
        alternates: it and another one take turns in every step of the loop.
        hoisted: bytes that are fetched once, before the loop, and left out of it.
        foreseen: seconds that finding out takes.
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
    hoisted: int = 0
    foreseen: float = 0.0
    loose: bool = False
    turns: int = 1
    alternates: bool = False

    @property
    def nbytes(self) -> int:
        return sum(p.nbytes for p in self.blocks)

    @property
    def cost(self) -> int:
        """Bytes on the compute device with all of it there."""
        return sum(p.cost + p.unused for p in self.blocks)

    @property
    def needed(self) -> int:
        """Bytes of its stage that no placement of weights changes."""
        return self.activations + self.workspaces + self.decoded


@dataclass(frozen=True)
class Speed:
    """Rates of the machine: flop/s, bytes/s in memory, and bytes/s from where weights rest."""

    flops: float
    stream: float  # through the ring
    memory: float = 1e10
    copying: float | None = None  # bytes/s at which fetching takes time of the cores that compute; None: it takes none
    staying: float | None = None  # of what comes to stay; None: as through the ring

    @classmethod
    def of(cls, rates: Rates, dtype: str, cached: bool) -> Speed:
        """From measured rates, for computing in ``dtype``; ``cached``: weights rest in memory, or in the system's cache."""
        flops = rates.matmul.get(dtype, max(rates.matmul.values())) * EFFICIENCY
        stream = rates.host_to_device if cached else min(rates.host_to_device, rates.disk)
        if rates.device != "cpu":
            return cls(flops, stream, rates.memory)
        busy = torch.get_num_threads() >= (os.cpu_count() or 1)
        staying = rates.mapped if cached else min(rates.mapped, rates.disk)
        return cls(flops, stream, rates.memory, rates.host_to_device if busy else None, staying)


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
        loaded: bytes that are fetched whenever another component was there before.
        streamed: bytes that are fetched in every pass, in ``pieces`` units.
        ahead: whether they are fetched while others compute.
    """
    compute = part.flops / speed.flops + part.moved / speed.memory
    fetched = streamed * part.passes
    fetch = fetched / speed.stream
    once = loaded * part.turns / (speed.staying or speed.stream) + part.hoisted / speed.stream
    lending = pieces * part.passes * HANDOVER
    if speed.copying and ahead:
        compute += fetched / speed.copying
    return once + part.foreseen + lending + (max(compute, fetch) if ahead else compute + fetch)


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


def rounding(kernels: int, device: torch.device) -> int:
    """Bytes for small objects, whole pages and the libraries' buffers, which on the CPU grow with the threads."""
    if device.type != "cpu":
        return allocator.libraries(device)
    return (1 << 20) + pages.libraries() + torch.get_num_threads() * (1 << 19) + kernels * KERNEL


# -- from a component to a part --------------------------------------------------------------------------


def part_of(
    name: str, module: nn.Module, needs: Rehearsed, steps: int, device: torch.device,
    mappings: Mappings | None = None, kernels: int = 0, left_out: Hoistable | None = None,
    storage: torch.dtype | None = None, uncast: bool = False,
) -> Part:  # fmt: skip
    """What the planner has to know of ``module``.

    Args:
        mappings: the file mappings of this process, to find weights that are views of none; not asked if ``None``.
        kernels: how many are compiled by the time that it runs, for stages before it too.
        left_out: what is hoisted out of the loop.
        storage: the dtype that it would be cast to for rest.
        uncast: casts that are there now will have been undone.
    """
    leaves, blocks = by_leaf(module), by_block(module)
    forms = _forms(module, storage, uncast)
    engine = engine_of(module)
    originals = engine.originals if engine is not None and uncast else {}
    restored = {place for place, original in originals.items() if original.wanted == original.dtype}
    loose = mappings is not None and (storage is not None or _bound(leaves, mappings, restored))
    bound = loose and device.type == "cpu"
    left_out = None if bound else left_out  # what can't leave memory costs as much left out
    sizes = Sizes(module, needs, device, forms)
    work = needs.work(steps)
    part = Part(
        name,
        sizes.pieces(blocks, left_out),
        sizes.pieces(leaves, left_out),
        needs.activations,
        needs.workspaces + rounding(kernels, device),
        work.flops,
        work.moved,
        max(work.calls, 1),
        *_form(forms),
        max((sizes.decoded(group) for group in leaves), default=0) + sizes.deltas,
        bound,
        loose=loose,
        turns=max(work.turns, 1),
        alternates=needs.each.turns > 0,
    )
    # every use reads what is stored, and writes and reads what is computed with
    part = replace(part, moved=part.moved + part.passes * sum(sizes.unpacking(group) for group in leaves))
    if left_out is None:
        return part
    hoisted = sum(p.nbytes for p in sizes.pieces(leaves)) - sum(p.nbytes for p in part.leaves)
    held = part.activations + left_out.table
    return replace(part, activations=held, hoisted=hoisted, foreseen=FORESEEING * len(leaves))


def _forms(module: nn.Module, storage: torch.dtype | None, uncast: bool) -> Forms:
    """The weights that rest in another dtype than now, or than they are computed with."""
    engine = engine_of(module)
    transforms = engine.transforms.values() if engine is not None else ()
    forms = {(id(t.module), name): dtypes for t in transforms for name, dtypes in t.casts.items()}
    if uncast:
        forms = {key: (compute, compute) for key, (_, compute) in forms.items()}
    if storage is None:
        return forms
    for layer in layers_to_cast(module, usual_patterns(module)):
        for slot in own_slots(layer, ""):
            _, compute = forms.get((id(layer), slot.name), (None, slot.tensor.dtype))
            if compute.is_floating_point and compute.itemsize > storage.itemsize:
                forms[id(layer), slot.name] = (storage, compute)
    return forms


def _form(forms: Forms) -> tuple[str, str | None]:
    """How a row says it."""
    for stored, compute in (dtypes for dtypes in forms.values() if dtypes[0] != dtypes[1]):
        return str(stored).removeprefix("torch."), str(compute).removeprefix("torch.")
    return STORED, None


def _bound(groups: Sequence[Group], mappings: Mappings, restored: Collection[tuple[nn.Module, str]] = ()) -> bool:
    """Whether weights of any size are views of no file, and not ``restored`` to such either."""
    slots = {id(s.tensor): s for g in groups for s in g.slots}.values()
    if any(s.tensor.is_meta for s in slots):
        return False  # nothing was loaded yet; what is there all the same was computed
    loose = [s for s in slots if mappings.span(s.tensor) is None and (s.module, s.name) not in restored]
    total = sum(s.tensor.nbytes for s in slots)
    return sum(s.tensor.nbytes for s in loose) > max(total // 100, 1 << 20)  # small buffers may stay
