"""Key tables: rows of names, theirs and ours, read in both directions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from ...core.errors import CheckpointError
from ..entries import Checkpoint, Computed, Entry, Packed
from ..slices import TensorSlice


@dataclass(frozen=True)
class Row:
    """One line of a table: what ``theirs`` is called here.

    A name that ends in a dot stands for everything below it, translated by ``inside`` (or unchanged).
    ``{}`` stands for a number, the same on both sides. Several names in ``ours`` mean that theirs is
    their concatenation along the first axis. ``op`` names a change of the values, see :data:`OPS`.
    """

    theirs: str
    ours: str | tuple[str, ...]
    inside: tuple[Row, ...] | None = None
    op: str = ""
    parts: tuple[int, ...] = ()  # how large the parts of a fused tensor are to each other; equal if not given

    @cached_property
    def names(self) -> tuple[str, ...]:
        return (self.ours,) if isinstance(self.ours, str) else self.ours

    @cached_property
    def below(self) -> Table:
        return Table(self.inside or ())


def _pixel(x: Tensor) -> Tensor:
    return x.reshape(x.shape[:2])


def _unpixel(x: Tensor) -> Tensor:
    return x.reshape(*x.shape, 1, 1) if x.ndim == 2 else x


def _transpose(x: Tensor) -> Tensor:
    return x.t().contiguous()


def _swap_halves(x: Tensor) -> Tensor:
    return torch.cat(x.chunk(2)[::-1])


# op -> (theirs to ours, ours to theirs)
OPS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "pixel": (_pixel, _unpixel),  # 1x1 convolution <-> linear layer
    "transpose": (_transpose, _transpose),
    "swap halves": (_swap_halves, _swap_halves),
}


@dataclass(frozen=True)
class Hit:
    """What a name became: the other side's names, and the op."""

    names: tuple[str, ...]
    op: str = ""
    parts: tuple[int, ...] = ()
    fused: tuple[str, ...] = ()  # from ours to theirs: all our names that are one there


@dataclass
class _Node:
    """The rows whose names begin alike: a part of the name leads to the next node."""

    below: dict[str, _Node] = field(default_factory=dict)
    number: _Node | None = None  # where ``{}`` leads
    whole: list[int] = field(default_factory=list)  # the places in the table of rows that end here
    heads: list[int] = field(default_factory=list)  # and of those that end here with a dot

    def add(self, source: str, place: int) -> None:
        """Lead ``source`` to the row at ``place``."""
        node, head = self, source.endswith(".")
        for part in source.removesuffix(".").split("."):
            if part == "{}":
                node.number = node.number or _Node()
                node = node.number
            else:
                node = node.below.setdefault(part, _Node())
        (node.heads if head else node.whole).append(place)

    def find(self, parts: Sequence[str], at: int = 0, numbers: tuple[str, ...] = ()) -> Iterator[_Found]:
        """The rows that the name ``parts`` may mean: (place, numbers, how many parts they name)."""
        for place in self.whole if at == len(parts) else self.heads:
            yield place, numbers, at
        if at < len(parts):
            if (node := self.below.get(parts[at])) is not None:
                yield from node.find(parts, at + 1, numbers)
            if self.number is not None and parts[at].isdecimal():
                yield from self.number.find(parts, at + 1, (*numbers, parts[at]))


_Found = tuple[int, tuple[str, ...], int]


class Table(tuple[Row, ...]):
    """The rows of a layout, in which a name is found part by part: many rows cost no more than few."""

    @cached_property
    def _roots(self) -> tuple[_Node, _Node]:
        theirs, ours = _Node(), _Node()
        for place, row in enumerate(self):
            theirs.add(row.theirs, place)
            ours.add(row.names[0], place)
        return theirs, ours

    def find(self, name: str, reverse: bool) -> Iterator[tuple[Row, tuple[str, ...], str]]:
        """The rows that may mean ``name``, in order: the row, the numbers in the name, what follows in it."""
        parts = name.split(".")
        for place, numbers, at in sorted(self._roots[reverse].find(parts)):
            yield self[place], numbers, ".".join(parts[at:])


def translate(table: Sequence[Row], name: str, reverse: bool = False) -> Hit | None:
    """The other side's name(s) of ``name``; ``None`` if the table does not know it.

    With ``reverse`` from ours to theirs; only the first of several fused names is looked for then. Many names are
    found faster in a :class:`Table` than in another sequence.
    """
    table = table if isinstance(table, Table) else Table(table)
    for row, numbers, rest in table.find(name, reverse):
        source, targets = (row.names[0], (row.theirs,)) if reverse else (row.theirs, row.names)
        if row.inside == ():  # known, and left out
            return None
        heads = tuple(_fill(t, numbers) for t in targets)
        if not source.endswith("."):
            together = tuple(_fill(n, numbers) for n in row.names) if reverse and len(row.names) > 1 else ()
            return Hit(heads, row.op, row.parts, together)
        if row.inside is None:
            return Hit(tuple(h + rest for h in heads), row.op)
        inner = translate(row.below, rest, reverse)
        if inner is not None:
            before = name[: len(name) - len(rest)]
            names = tuple(heads[0] + n for n in inner.names)
            return Hit(names, inner.op or row.op, inner.parts, tuple(before + n for n in inner.fused))
    return None


def _fill(target: str, numbers: Iterable[str]) -> str:
    return target.format(*numbers) if "{}" in target else target


def to_ours(checkpoint: Checkpoint, table: Sequence[Row], prefix: str = "") -> Checkpoint:
    """The tensors of ``checkpoint`` below ``prefix`` that ``table`` knows, under our names.

    Parts of fused tensors and reshaped ones stay slices of the mapped file; others are computed
    when they are read.
    """
    entries: dict[str, Entry] = {}
    table = Table(table)
    for name, entry in checkpoint.items():
        hit = translate(table, name[len(prefix) :]) if name.startswith(prefix) else None
        if hit is None:  # other components, and what training left behind
            continue
        for new, part in zip(hit.names, _pieces(entry, hit, f"{checkpoint.label}: {name}"), strict=True):
            if new in entries:
                raise CheckpointError(f"{checkpoint.label}: two tensors, one of them {name!r}, are both our {new!r}")
            entries[new] = part
    return checkpoint.replaced(entries)


def _pieces(entry: Entry, hit: Hit, what: str) -> list[Entry]:
    parts = split(entry, hit.parts or (1,) * len(hit.names), what)
    try:
        return [change(part, hit.op) if hit.op else part for part in parts]
    except (RuntimeError, IndexError) as error:  # it has other axes than the op is for
        raise CheckpointError(f"{what}: shape {list(entry.shape)} is not what it should be ({hit.op})") from error


def split(entry: Entry, parts: Sequence[int], what: str = "a tensor") -> list[Entry]:
    """``entry`` cut along the first axis into pieces whose sizes are to each other as ``parts``."""
    if len(parts) == 1:
        return [entry]
    if not entry.shape or not entry.shape[0] or entry.shape[0] % sum(parts):
        raise CheckpointError(f"{what}: shape {list(entry.shape)} does not divide into parts {list(parts)}")
    unit = entry.shape[0] // sum(parts)
    starts = [sum(parts[:i]) * unit for i in range(len(parts))]
    return [narrow(entry, start, n * unit) for start, n in zip(starts, parts, strict=True)]


def narrow(entry: Entry, start: int, rows: int) -> Entry:
    """``rows`` rows of ``entry`` from ``start``: still a slice of the file if it is one."""
    if isinstance(entry, Tensor):
        return entry[start : start + rows]
    if isinstance(entry, TensorSlice):
        row = entry.nbytes // entry.shape[0]
        shape = (rows, *entry.shape[1:])
        return replace(entry, offset=entry.offset + start * row, nbytes=rows * row, shape=shape)
    if isinstance(entry, Packed) and (codec := entry.codec.rows(start, rows)) is not None:
        return Packed(narrow(entry.part, start, rows), codec)
    return Computed.of(lambda x: x[start : start + rows], entry)


def reshape(entry: Entry, shape: Sequence[int]) -> Entry:
    """``entry`` in another shape of as many elements."""
    assert prod(entry.shape) == prod(shape)
    if isinstance(entry, Tensor):
        return entry.reshape(tuple(shape))
    if isinstance(entry, TensorSlice):
        return replace(entry, shape=tuple(shape))
    if isinstance(entry, Packed):
        return Packed(entry.part, entry.codec.reshaped(shape))
    return Computed.of(lambda x: x.reshape(tuple(shape)), entry)


def change(entry: Entry, op: str, reverse: bool = False) -> Entry:
    """``entry`` after the op of a row."""
    if op == "pixel" and not reverse:
        return reshape(entry, entry.shape[:2]) if tuple(entry.shape[2:]) == (1, 1) else entry
    if op == "swap halves" and isinstance(entry, Packed) and entry.codec.uniform:
        return Packed(change(entry.part, op, reverse), entry.codec)
    return Computed.of(OPS[op][reverse], entry)


def to_theirs(state: Mapping[str, Tensor], table: Sequence[Row], prefix: str = "") -> dict[str, Tensor]:
    """Our tensors under their names, fused where theirs are.

    Raises:
        ValueError: a tensor that the layout has no name for.
    """
    table = Table(table)
    hits = {name: translate(table, name, reverse=True) for name in state}
    joined = {other for hit in hits.values() if hit is not None for other in hit.fused[1:]}
    out: dict[str, Tensor] = {}
    for name, hit in hits.items():
        if hit is None and name not in joined:
            raise ValueError(f"{name} has no name in the original layout, so it can't be saved in it")
        if hit is not None and name not in joined:
            value = torch.cat([state[n] for n in hit.fused]) if hit.fused else state[name]
            out[prefix + hit.names[0]] = OPS[hit.op][1](value) if hit.op else value
    return out
