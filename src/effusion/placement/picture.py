"""A report as a picture: memory over time, by component, with the budget, transfers and steps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.optional import require

if TYPE_CHECKING:
    from .report import MemoryReport

COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#e45756", "#72b7b2", "#9d755d", "#eeca3b")


def colours(report: MemoryReport) -> dict[str, str]:
    """A colour for each component that ran."""
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(report.stages)}


def draw(report: MemoryReport, path: Path) -> None:
    """Draw ``report`` into ``path``."""
    require("matplotlib", "drawing a memory report")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    top, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    _memory(top, report)
    _transfers(below, report)
    figure.savefig(path)


def _memory(axes: Any, report: MemoryReport) -> None:
    samples, unit = report.samples, 1e6
    for name, colour in colours(report).items():
        inside = [s.stage == name for s in samples]
        axes.fill_between(
            [s.time for s in samples], [s.held / unit for s in samples], where=inside, step="pre", color=colour,
            alpha=0.75, linewidth=0, label=name,
        )  # fmt: skip
    predicted = {s.name: s.peak / unit for s in report.plan.stages}
    for name, (start, stop) in spans(report).items():
        if name in predicted:
            axes.hlines(predicted[name], start, stop, color="black", linestyle=":", linewidth=1.5)
    axes.plot([], [], color="black", linestyle=":", label="predicted peak")
    if report.plan.budget:
        axes.axhline(report.plan.budget / unit, color="#c00000", linestyle="--", label="budget")
    for at in report.steps:
        axes.axvline(at, ymax=0.03, color="black", linewidth=1)
    axes.set_ylabel(f"MB on {report.device}")
    most = max([s.held for s in samples] + [report.plan.budget or 0, report.plan.peak, 1]) / unit
    axes.set_ylim(0, 1.08 * most)
    axes.set_title("Memory over time; ticks at the bottom are steps", fontsize=10)
    axes.figure.legend(loc="outside lower center", ncols=8, fontsize=8, frameon=False)
    axes.margins(x=0)


def _transfers(axes: Any, report: MemoryReport) -> None:
    axes.plot([s.time for s in report.samples], [s.transferred / 1e6 for s in report.samples], color="#555555")
    axes.set_ylabel("MB fetched")
    axes.set_xlabel("seconds")
    axes.set_ylim(bottom=0)


def spans(report: MemoryReport) -> dict[str, tuple[float, float]]:
    """When each component ran: from its first sample to its last."""
    found: dict[str, tuple[float, float]] = {}
    for sample in report.samples:
        if sample.stage:
            start, _ = found.get(sample.stage, (sample.time, 0.0))
            found[sample.stage] = (start, sample.time)
    return found
