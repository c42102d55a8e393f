"""What was predicted and what was measured: as a table, as data, as a picture, as a page."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..core.files import write_atomically
from .plan import Plan, size_text


@dataclass(frozen=True)
class Measured:
    """One stage: the most bytes it held on the compute device, and how long it took."""

    peak: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Sample:
    """One moment: seconds since the start, bytes held, the component that ran, bytes transferred so far."""

    time: float
    held: int
    stage: str
    transferred: int


@dataclass(frozen=True)
class MemoryReport:
    """A run under a plan. Print it, or see :meth:`to_dict`, :meth:`plot`, :meth:`save`.

    Attributes:
        plan: what was predicted.
        device: where it computed.
        stages: what was measured, by component, in the order that they ran in.
        samples: memory over time.
        steps: seconds at which the steps of the loop ended.
        transferred: bytes of weights that were fetched.
        notes: what happened besides.
    """

    plan: Plan
    device: str
    stages: Mapping[str, Measured]
    samples: list[Sample]
    steps: list[float]
    transferred: int = 0
    notes: tuple[str, ...] = ()

    @property
    def peak(self) -> int:
        """Bytes on the compute device at the worst moment, as measured."""
        return max((s.peak for s in self.stages.values()), default=0)

    @property
    def seconds(self) -> float:
        """Seconds of all stages, as measured."""
        return sum(s.seconds for s in self.stages.values())

    def rows(self) -> list[dict[str, Any]]:
        """Predicted beside measured, a row per stage that ran."""
        predicted = {s.name: s for s in self.plan.stages}
        return [
            {
                "stage": name,
                "predicted_peak": predicted[name].peak if name in predicted else None,
                "measured_peak": measured.peak,
                "predicted_seconds": predicted[name].seconds if name in predicted else None,
                "measured_seconds": measured.seconds,
            }
            for name, measured in self.stages.items()
        ]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        return {
            "device": self.device,
            "budget": self.plan.budget,
            "predicted_peak": self.plan.peak,
            "measured_peak": self.peak,
            "predicted_seconds": self.plan.seconds,
            "measured_seconds": self.seconds,
            "transferred": self.transferred,
            "stages": self.rows(),
            "steps": list(self.steps),
            "samples": [asdict(s) for s in self.samples],
            "notes": [*self.plan.notes, *self.notes],
            "plan": self.plan.to_dict(),
        }

    def __str__(self) -> str:
        lines = [f"{'stage':<18}{'predicted':>12}{'measured':>12}{'ratio':>8}{'predicted':>12}{'measured':>10}"]
        for row in self.rows():
            peak, seconds = row["predicted_peak"], row["predicted_seconds"]
            share = f"{peak / row['measured_peak']:.2f}" if peak and row["measured_peak"] else "–"
            wish = size_text(peak) if peak is not None else "–"
            took = f"{seconds:.1f} s" if seconds is not None else "–"
            lines.append(
                f"{row['stage']:<18}{wish:>12}{size_text(row['measured_peak']):>12}{share:>8}{took:>12}"
                f"{row['measured_seconds']:>8.1f} s"
            )
        budget = f" of {size_text(self.plan.budget)}" if self.plan.budget else ""
        lines.append(
            f"peak {size_text(self.peak)}{budget}, predicted {size_text(self.plan.peak)}; "
            f"{size_text(self.transferred)} of weights fetched"
        )
        return "\n".join([*lines, *self.plan.notes, *self.notes])

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw memory over time into a PNG (or whatever the suffix says).

        Raises:
            MissingExtra: matplotlib is not installed.
        """
        from .picture import draw

        draw(self, Path(path))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a page that needs nothing else: the timeline as a drawing, the tables, the plan."""
        from .page import render

        write_atomically(Path(path), render(self).encode())
