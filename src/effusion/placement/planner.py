"""Choosing a plan: a pure function from what components need and a budget to rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..core.errors import BudgetError
from .plan import STORED, Plan, Row, Stage, size_text


@dataclass(frozen=True)
class Part:
    """One component as the planner sees it: units by size, and what its stage needs besides."""

    name: str
    units: tuple[tuple[str, int], ...]  # (name, bytes), block by block
    leaves: tuple[tuple[str, int], ...]  # the same, layer by layer
    activations: int
    flops: float = 0.0  # of all its calls
    passes: int = 1  # how often all of its weights are needed
    form: str = STORED
    compute_dtype: str | None = None
    decoded: int = 0  # bytes of the largest layer once decoded, if it rests in a smaller form

    @property
    def nbytes(self) -> int:
        return sum(n for _, n in self.units)


@dataclass(frozen=True)
class Speed:
    """Rates of the machine: flop/s, and bytes/s from where streamed weights rest."""

    flops: float
    stream: float


@dataclass
class _Choice:
    level: str = "component"
    kept: set[str] = field(default_factory=set)
    ring: int = 0
    ahead: int = 0


def plan(
    parts: Sequence[Part], memory: int, ram: int | None, device: str, speed: Speed, quality: str = "exact"
) -> Plan:
    """The plan with the least predicted time whose peak is within ``memory``.

    Everything resident if that fits; else one component at a time; and where a component does not
    fit, as many of its blocks as do, the rest streamed through a ring for two (or one) of them.

    Raises:
        BudgetError: nothing fits; says the least that would, and which stage needs it.
    """
    on_cpu = device == "cpu"
    together = sum(p.nbytes for p in parts)
    if together + max((p.activations + p.decoded for p in parts), default=0) <= memory:
        rows = [_row(p, n, size, device, "device", False, 0) for p in parts for n, size in p.units]
        stages = [Stage(p.name, together, 0, p.activations + p.decoded, together, _seconds(p, 0, speed)) for p in parts]
        return Plan(tuple(rows), tuple(stages), quality=quality, budget=memory, ram=ram)
    _check(parts, memory)
    rows, stages = [], []
    for part in parts:
        choice = _choose(part, memory)
        units = part.leaves if choice.level == "leaf" else part.units
        total = part.nbytes
        streamed = total - sum(size for n, size in units if n in choice.kept)
        home = "disk" if on_cpu else "host" if ram is None or ram >= together else "disk"
        for n, size in units:
            kept = n in choice.kept
            where = "device" if kept and on_cpu else home
            rows.append(_row(part, n, size, device, where, kept and not on_cpu, 0 if kept else choice.ahead))
        stages.append(
            Stage(
                part.name,
                total - streamed,
                choice.ring if streamed else 0,
                part.activations + part.decoded,
                together if home == "host" else 0,
                _seconds(part, streamed, speed),
            )
        )
    return Plan(tuple(rows), tuple(stages), quality=quality, budget=memory, ram=ram)


def least(part: Part) -> int:
    """The smallest budget that ``part`` can run in: its activations and one layer at a time."""
    return part.activations + part.decoded + max((n for _, n in part.leaves), default=0)


def _check(parts: Sequence[Part], memory: int) -> None:
    short = [p for p in parts if least(p) > memory]
    if not short:
        return
    worst = max(short, key=least)
    raise BudgetError(
        f"{size_text(memory)} are not enough: {worst.name} alone needs {size_text(least(worst))} "
        f"({size_text(worst.activations + worst.decoded)} of activations, the rest for its largest layer). "
        f"The least for this call is {size_text(least(worst))}; a smaller height, width or batch lowers it, "
        f"and so does vae tiling where decoding is the worst"
    )


def _choose(part: Part, memory: int) -> _Choice:
    """How one component runs in ``memory``: whole, partly kept, or streamed; by blocks before by layers."""
    room = memory - part.activations - part.decoded
    if part.nbytes <= room:
        return _Choice(kept={n for n, _ in part.units})
    for level, units in (("block", part.units), ("leaf", part.leaves)):
        for ahead in (1, 0):
            ring = (1 + ahead) * _padded(max(size for _, size in units))
            if ring <= room:
                return _Choice(level, _keep(units, room - ring), ring, ahead)
    return _Choice("leaf", set(), max(size for _, size in part.leaves), 0)


def _keep(units: Sequence[tuple[str, int]], room: int) -> set[str]:
    """Spread what is kept evenly over the units, so that computing them gives time to fetch the others."""
    total = sum(size for _, size in units)
    kept, filled, seen = set(), 0, 0
    for name, size in units:
        seen += size
        if filled + size <= room and filled + size <= room * seen / total + size:
            kept.add(name)
            filled += size
    return kept


def _padded(nbytes: int) -> int:
    return -(-(nbytes + 4096) // 512) * 512


def _row(part: Part, unit: str, nbytes: int, device: str, home: str, keep: bool, ahead: int) -> Row:
    return Row(f"{part.name}/{unit}", nbytes, home, device, part.form, part.compute_dtype, keep, ahead)


def _seconds(part: Part, streamed: int, speed: Speed) -> float:
    return max(part.flops / speed.flops, streamed * part.passes / speed.stream)
