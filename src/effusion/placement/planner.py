"""Choosing a plan: a pure function from what components need and a budget to rows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ..core.errors import BudgetError
from .forecast import Option, Part, Speed, seconds, stage
from .plan import Plan, Row, size_text
from .sizes import Piece

MANY = 5  # components up to which every choice of those that stay for good is tried


@dataclass(frozen=True)
class Choice:
    """What to do with each part: which stay on the compute device for good, and how the others run."""

    stays: tuple[bool, ...]
    options: tuple[Option, ...]
    resident: int  # bytes of those that stay
    together: frozenset[int] = frozenset()  # which of those that alternate in the loop are there at once

    @property
    def seconds(self) -> float:
        return sum(o.seconds for o in self.options)

    def beside(self, index: int) -> int:
        """Bytes of other parts that are there while the one at ``index`` runs."""
        others = self.together - {index} if index in self.together else ()
        return self.resident + sum(self.options[i].weights for i in others)


def plan(
    parts: Sequence[Part], memory: int, ram: int | None, device: str, speed: Speed, quality: str = "exact"
) -> Plan:
    """The plan with the least predicted time whose peak is within ``memory``, and whose host memory is within ``ram``.

    Components that fit together stay for good; the others take turns; where one does not fit by itself, as many of
    its blocks (or layers) stay as do, and the rest is streamed through a ring for two (or one) of them.

    Raises:
        BudgetError: nothing fits; says the least that would, and which stage needs it.
    """
    limit = min(memory, ram) if device == "cpu" and ram is not None else memory
    host = ram if device != "cpu" else None
    best = min(choices(parts, limit, speed, host), key=lambda c: (c.seconds, c.resident), default=None)
    if best is None and host is not None and any(choices(parts, limit, speed)):
        raise BudgetError(_too_little_ram(parts, host))
    if best is None:
        raise BudgetError(_too_small(parts, limit))
    return build(parts, best, memory, ram, device, quality)


def least(parts: Sequence[Part]) -> int:
    """The smallest budget that some plan keeps."""
    bound = sum(p.cost for p in parts if p.bound)
    return bound + max((p.needed + (0 if p.bound else options(p, None)[0].need) for p in parts), default=0)


def choices(parts: Sequence[Part], memory: int, speed: Speed, ram: int | None = None) -> Iterator[Choice]:
    """For each set of components that stay for good, the fastest way to run the others within ``memory``, where the
    others rest in ``ram`` if they are in no file."""
    frontiers = [options(part, speed) for part in parts]
    for stays in _sets(parts):
        loose = sum(p.nbytes for p, s in zip(parts, stays, strict=True) if p.loose and not s)
        if ram is not None and loose > ram:
            continue
        resident = sum(p.cost for p, s in zip(parts, stays, strict=True) if s)
        found: list[Option] = []
        for part, stay, frontier in zip(parts, stays, frontiers, strict=True):
            room = memory - resident - part.needed
            option = staying(part, speed) if stay else _best(frontier, room)
            if room < 0 or option is None:
                break
            found.append(option)
        else:
            choice = Choice(stays, tuple(found), resident)
            yield choice
            yield from _together(parts, choice, memory, speed)


def _together(parts: Sequence[Part], choice: Choice, memory: int, speed: Speed) -> Iterator[Choice]:
    """``choice`` with the parts that alternate in the loop (a network and its ControlNet) all there throughout it."""
    turn = [i for i, part in enumerate(parts) if part.alternates]
    moving = [i for i in turn if not choice.stays[i]]
    if len(turn) < 2 or not moving:
        return
    weights, needed = sum(parts[i].cost for i in moving), max(parts[i].needed for i in turn)
    if choice.resident + weights + needed <= memory:
        options = list(choice.options)
        for i in moving:
            options[i] = whole(replace(parts[i], turns=1), speed)
        yield replace(choice, options=tuple(options), together=frozenset(turn))


def staying(part: Part, speed: Speed) -> Option:
    """All of ``part`` is there already, and counted with what is resident."""
    kept = frozenset(p.name for p in part.blocks)
    return Option("component", kept, 0, 0, 0, seconds(part, 0, 0, 0, 0, speed))


def _sets(parts: Sequence[Part]) -> Iterator[tuple[bool, ...]]:
    if len(parts) <= MANY:
        free = [(True,) if p.bound else (False,) if p.hoisted else (False, True) for p in parts]
        yield from itertools.product(*free)
        return
    order = sorted(range(len(parts)), key=lambda i: (not parts[i].bound, bool(parts[i].hoisted), parts[i].cost))
    for count in range(sum(p.bound for p in parts), len(parts) + 1 - sum(p.hoisted > 0 for p in parts)):
        inside = set(order[:count])
        yield tuple(i in inside for i in range(len(parts)))


def _best(frontier: Sequence[Option], room: int) -> Option | None:
    return next((option for option in reversed(frontier) if option.need <= room), None)


def options(part: Part, speed: Speed | None) -> list[Option]:
    """The ways to run ``part`` that nothing beats: by growing need and, with ``speed``, falling time."""
    speed = speed or Speed(1e12, 1e10)
    found = [whole(part, speed)]
    for level, pieces in (("block", part.blocks), ("leaf", part.leaves)):
        for ahead in (1, 0):
            found += partly(part, level, pieces, ahead, speed)
    found.sort(key=lambda o: (o.need, o.seconds))
    frontier: list[Option] = []
    for option in found:
        if not frontier or option.seconds < frontier[-1].seconds:
            frontier.append(option)
    return frontier


def whole(part: Part, speed: Speed) -> Option:
    """All of ``part`` comes when it is called, and stays until another component needs the room."""
    kept = frozenset(p.name for p in part.blocks)
    return Option("component", kept, 0, part.cost, 0, seconds(part, part.cost, 0, 0, 0, speed))


def partly(part: Part, level: str, pieces: Sequence[Piece], ahead: int, speed: Speed) -> Iterator[Option]:
    """Options that keep more and more of ``pieces``, in an order that spreads what is kept."""
    free = [p for p in pieces if not p.cost or p.outer]  # never called, or needed throughout: nothing to stream
    order = spread([p for p in pieces if p.cost and not p.outer])
    kept = {p.name for p in free}
    weights = sum(p.cost for p in free)
    rooms = [0] * (len(order) + 1)  # the largest room among the pieces from an index on
    for i in reversed(range(len(order))):
        rooms[i] = max(rooms[i + 1], order[i].room)
    streamed = sum(p.nbytes for p in order)
    for i, piece in enumerate(order):
        ring = rooms[i] * (1 + ahead if i < len(order) - 1 else 1)
        took = seconds(part, weights, streamed, len(order) - i, ahead, speed)
        yield Option(level, frozenset(kept), ahead, weights, ring, took)
        kept.add(piece.name)
        weights += piece.cost
        streamed -= piece.nbytes


def spread(pieces: Sequence[Piece]) -> list[Piece]:
    """``pieces`` in the order in which to keep them: those first that stay almost for nothing (a table of embeddings
    of which few rows are read), then spread evenly, so that computing what stays gives time to fetch the others."""
    cheap = [p for p in pieces if 4 * p.cost < p.nbytes]
    rest = [p for p in pieces if 4 * p.cost >= p.nbytes]
    bits = max(len(rest) - 1, 1).bit_length()
    order = sorted(range(len(rest)), key=lambda i: int(f"{i:0{bits}b}"[::-1], 2))
    return cheap + [rest[i] for i in order]


# -- rows and stages -------------------------------------------------------------------------------------


def build(
    parts: Sequence[Part], choice: Choice, memory: int | None, ram: int | None, device: str, quality: str = "exact"
) -> Plan:
    """``choice`` as a plan: its rows and the forecast of its stages."""
    homes = _homes(parts, choice, ram, device)
    host = sum(p.nbytes for p, home in zip(parts, homes, strict=True) if home == "host")
    rows, stages = [], []
    each = zip(parts, choice.stays, choice.options, homes, strict=True)
    for index, (part, stay, option, home) in enumerate(each):
        for piece in part.leaves if option.level == "leaf" else part.blocks:
            keep = piece.name in option.kept
            ahead = 0 if keep else option.ahead
            form = (part.form, part.compute_dtype, keep and not stay, ahead)
            filled = device == "cpu" and home == "device" and piece.cost == piece.nbytes
            rows.append(Row(f"{part.name}/{piece.name}", piece.nbytes, home, device, *form, filled))
        made = stage(part, option, choice.beside(index), host)
        stages.append(replace(made, host=made.peak) if device == "cpu" else made)
    together = [part.name for index, part in enumerate(parts) if index in choice.together]
    switches = {"together": together} if together else {}
    return Plan(tuple(rows), tuple(stages), switches, quality=quality, budget=memory, ram=ram)


def _homes(parts: Sequence[Part], choice: Choice, ram: int | None, device: str) -> list[str]:
    """Where each part rests: those of no file in host memory, the most needed others too while there is room, and the
    rest in their files."""
    left = ram if ram is not None else sum(p.nbytes for p in parts)
    homes = ["device"] * len(parts)
    moving = [i for i, stay in enumerate(choice.stays) if not stay]
    for i in sorted(moving, key=lambda i: (not parts[i].loose, -parts[i].passes * parts[i].nbytes)):
        fits = device != "cpu" and (parts[i].loose or parts[i].nbytes <= left)
        homes[i] = "host" if fits else "disk"
        left -= parts[i].nbytes if fits else 0
    return homes


def _too_small(parts: Sequence[Part], memory: int) -> str:
    worst = max(parts, key=lambda p: p.needed + (0 if p.bound else options(p, None)[0].need))
    bound = [p.name for p in parts if p.bound]
    text = (
        f"{size_text(memory)} are not enough: {worst.name} needs {size_text(worst.needed)} for activations and "
        f"workspaces, and weights beside them. The least for this call is {size_text(least(parts))}"
    )
    if bound:
        text += (
            f"; the weights of {bound} are in memory and views of no file, so they can't be streamed: load them as "
            f"stored (torch_dtype='auto'), or give a folder to write them to (offload_folder)"
        )
    return text


def _too_little_ram(parts: Sequence[Part], ram: int) -> str:
    loose = [p for p in parts if p.loose]
    return (
        f"{size_text(ram)} of host memory are not enough: the weights of {[p.name for p in loose]}, "
        f"{size_text(sum(p.nbytes for p in loose))}, are views of no file, so what is not on the device has to rest there; "
        f"load them as stored (torch_dtype='auto'), or give a folder to write them to (offload_folder)"
    )
