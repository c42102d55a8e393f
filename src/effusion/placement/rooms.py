"""The room on a compute device that components share: one makes room for the next."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .engine import Engine


class Shared:
    """The room on one compute device that components kept until another needs it share."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._inside: weakref.WeakSet[Engine] = weakref.WeakSet()
        self._evictions: set[tuple[int, int]] = set()  # (who had to go, for whom) since the last `forget`
        self.told: Callable[[Engine], None] | None = None  # whoever wants to know who enters
        self.together: frozenset[str] | None = None  # those that the plan in force has there at once; None without one

    def enter(self, engine: Engine) -> None:
        """Make room for ``engine``. Two that take turns (a network and its ControlNet) stay both if they fit; under
        a plan, if it says so."""
        for other in list(self._inside):
            if other is engine or any(u.depth for u in other.units) or self._beside(engine.name, other):
                continue
            take_turns = (id(engine), id(other)) in self._evictions
            if take_turns and self.together is None and self._fits(engine):
                continue
            self._evictions.add((id(other), id(engine)))
            other.settle()
            self._inside.discard(other)
        self._inside.add(engine)
        if self.told is not None:
            self.told(engine)

    def _fits(self, engine: Engine) -> bool:
        if self.device.type != "cuda":
            return False
        free, _ = torch.cuda.mem_get_info(self.device)  # memory that activations took stays out of this
        return bool(free > sum(u.row.nbytes for u in engine.units))

    def _beside(self, name: str, other: Engine) -> bool:
        return self.together is not None and {name, other.name} <= self.together

    def clear(self, but: object = None, name: str = "") -> None:
        """Take back what no call needs at the moment, for the component ``name`` that stays for good."""
        for other in list(self._inside):
            if other is not but and not any(u.depth for u in other.units) and not self._beside(name, other):
                other.settle()
                self._inside.discard(other)

    def forget(self) -> None:
        self._evictions.clear()


_rooms: dict[torch.device, Shared] = {}


def room_on(device: torch.device) -> Shared:
    """The room on ``device``."""
    if device not in _rooms:
        _rooms[device] = Shared(device)
    return _rooms[device]
