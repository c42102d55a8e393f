"""What comes next: the order in which units were needed the last time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .unit import Unit


class Order:
    """Learns the order of units from the calls that need them; blocks may be called several times, in any pattern."""

    def __init__(self) -> None:
        self.next: dict[Any, Unit] = {}  # what came after (a unit before, a unit) the last time
        self.recent: tuple[Unit | None, Unit | None] = (None, None)
        self.frontier: tuple[Unit | None, Unit] | None = None  # the last that was fetched ahead, and the one before

    def restart(self) -> None:
        """Nothing is on its way; a call may begin anywhere."""
        self.recent, self.frontier = (None, None), None

    def remember(self, unit: Unit) -> None:
        """A call needs ``unit`` now."""
        before, last = self.recent
        if last is not None and last is not unit:
            self.next[(id(before), id(last))] = unit
            self.next[id(last)] = unit
        if last is not unit:
            self.recent = (last, unit)

    def start(self, unit: Unit) -> tuple[Unit | None, Unit]:
        """From where to fetch ahead while ``unit`` is needed: everything up to there is on its way already."""
        if self.frontier is not None and self.frontier[1].coming is not None:
            return self.frontier
        return self.recent[0], unit

    def after(self, before: Unit | None, unit: Unit, units: Sequence[Unit]) -> Unit | None:
        """What will be needed after ``unit``, with ``before`` before it."""
        found = self.next.get((id(before), id(unit))) or self.next.get(id(unit))
        if found is None:  # never came this far: the order of definition is the best guess
            index = unit.index + 1
            found = units[index] if index < len(units) else None
        return found
