"""A unit at work: a row of the plan, and what of it is lent, kept or on its way."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .lane import Cargo, version
from .plan import Row
from .sources import Span
from .units import Slot


@dataclass(eq=False)
class Unit:
    """One row of the plan with the slots and triggers it stands for, and the state it is in."""

    row: Row
    slots: list[Slot]
    triggers: list[nn.Module]
    device: torch.device
    index: int = 0  # in the order of definition
    depth: int = 0  # calls that need it now
    cargo: Cargo | None = None  # lent, or kept
    coming: Cargo | None = None  # fetched ahead
    put: list[tuple[Slot, Tensor, Tensor]] = field(default_factory=list)  # (slot, resting, lent)
    in_place: bool = False  # computes from the mapped file; its pages go back when it is dropped
    outer: bool = False  # modules of other units are called while it is lent
    known: dict[int, tuple[Tensor, int, Span | None]] = field(default_factory=dict)  # slices found, by slot

    @property
    def lent(self) -> bool:
        return bool(self.put) or self.in_place

    @property
    def maps(self) -> bool:
        """Whether it computes from the mapped file itself: what is kept on the CPU needs no copy."""
        return self.row.keep and self.row.home == "disk" and self.device.type == "cpu"

    def knows(self, rest: Tensor) -> bool:
        """Whether it was asked which file ``rest`` is a slice of, and nothing was written into it since."""
        known = self.known.get(id(rest))
        return known is not None and known[0] is rest and known[1] == version(rest)
