"""A report as a page that needs nothing else: the timeline as an SVG drawing, tables, the plan."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from typing import TYPE_CHECKING, Any

from .picture import colours, spans
from .plan import size_text

if TYPE_CHECKING:
    from .report import MemoryReport

WIDTH, HEIGHT, LEFT, BELOW = 960, 320, 80, 60
STYLE = (
    "body{font:15px/1.45 system-ui,sans-serif;max-width:1060px;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse;margin:1em 0}td,th{padding:.25em .8em;text-align:right;border-bottom:1px solid #ddd}"
    "td:first-child,th:first-child{text-align:left}svg{width:100%;height:auto;background:#fafafa}"
    "pre{overflow:auto;background:#f4f4f4;padding:1em;font-size:12px}.key{display:inline-block;margin-right:1.2em}"
    ".key i{display:inline-block;width:.9em;height:.9em;margin-right:.4em;vertical-align:-.1em}"
)


def render(report: MemoryReport) -> str:
    """The whole page."""
    budget = f" of {size_text(report.plan.budget)}" if report.plan.budget else ""
    notes = "".join(f"<li>{escape(note)}</li>" for note in (*report.plan.notes, *report.notes))
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>Memory report</title><style>{STYLE}</style>"
        f"<h1>Memory report</h1><p>Peak <b>{size_text(report.peak)}</b>{budget} on {escape(report.device)}, predicted "
        f"{size_text(report.plan.peak)}. {size_text(report.transferred)} of weights were fetched.</p>"
        f"{_key(report)}{_timeline(report)}<h2>Stages</h2>{_table(report)}"
        f"{f'<h2>Notes</h2><ul>{notes}</ul>' if notes else ''}<h2>Plan</h2><pre>{escape(str(report.plan))}</pre></html>\n"
    )


def _key(report: MemoryReport) -> str:
    entries = [*colours(report).items(), ("budget", "#c00000"), ("predicted peak", "#000"), ("fetched", "#555")]
    cells = (f"<span class=key><i style='background:{colour}'></i>{escape(name)}</span>" for name, colour in entries)
    return f"<p>{''.join(cells)}</p>"


def _table(report: MemoryReport) -> str:
    head = ("stage", "predicted peak", "measured peak", "predicted / measured", "predicted time", "measured time")
    lines = ["".join(f"<th>{name}</th>" for name in head)]
    for row in report.rows():
        peak, measured = row["predicted_peak"], row["measured_peak"]
        cells = (
            escape(row["stage"]),
            size_text(peak) if peak is not None else "–",
            size_text(measured),
            f"{peak / measured:.2f}" if peak and measured else "–",
            f"{row['predicted_seconds']:.1f} s" if row["predicted_seconds"] is not None else "–",
            f"{row['measured_seconds']:.1f} s",
        )
        lines.append("".join(f"<td>{cell}</td>" for cell in cells))
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _timeline(report: MemoryReport) -> str:
    end = max([s.time for s in report.samples] + report.steps, default=1.0) or 1.0
    top = 1.08 * max([s.held for s in report.samples] + [report.plan.budget or 0, report.peak, report.plan.peak, 1])

    def x(seconds: float) -> float:
        return LEFT + seconds / end * (WIDTH - LEFT)

    def y(nbytes: float) -> float:
        return HEIGHT * (1 - nbytes / top)

    parts = [_areas(report, x, y)]
    predicted = {s.name: s.peak for s in report.plan.stages}
    for name, (start, stop) in spans(report).items():
        if name in predicted:
            parts.append(_line(x(start), y(predicted[name]), x(stop), y(predicted[name]), "#000", "2 3"))
    if report.plan.budget:
        parts.append(_line(LEFT, y(report.plan.budget), WIDTH, y(report.plan.budget), "#c00000", "7 4"))
    parts += [_line(x(at), HEIGHT, x(at), HEIGHT - 8, "#000") for at in report.steps]
    parts += [_transfers(report, x), *_axes(end, top, x, y)]
    return f"<svg viewBox='-6 0 {WIDTH + 36} {HEIGHT + BELOW + 30}' font-size='12'>{''.join(parts)}</svg>"


def _areas(report: MemoryReport, x: Callable[[float], float], y: Callable[[float], float]) -> str:
    """A filled area for each stretch of samples of one component."""
    found, stretch = [], list[Any]()
    table = colours(report)
    for sample in [*report.samples, None]:
        if stretch and (sample is None or sample.stage != stretch[-1].stage):
            edge = [f"{x(s.time):.1f},{y(s.held):.1f}" for s in stretch]
            if sample is not None:
                edge.append(f"{x(sample.time):.1f},{y(stretch[-1].held):.1f}")
            last = x(sample.time if sample is not None else stretch[-1].time)
            corners = f"{x(stretch[0].time):.1f},{HEIGHT} {' '.join(edge)} {last:.1f},{HEIGHT}"
            found.append(f"<polygon points='{corners}' fill='{table.get(stretch[0].stage, '#bbb')}' opacity='.8'/>")
            stretch = []
        if sample is not None:
            stretch.append(sample)
    return "".join(found)


def _transfers(report: MemoryReport, x: Callable[[float], float]) -> str:
    most = max((s.transferred for s in report.samples), default=0) or 1
    bottom = HEIGHT + BELOW
    points = " ".join(f"{x(s.time):.1f},{bottom - s.transferred / most * (BELOW - 15):.1f}" for s in report.samples)
    text = f"<text x='{LEFT + 6}' y='{HEIGHT + 24}' fill='#555'>weights fetched: {size_text(report.transferred)}</text>"
    return f"<polyline points='{points}' fill='none' stroke='#555'/>{text}"


def _axes(end: float, top: float, x: Callable[[float], float], y: Callable[[float], float]) -> list[str]:
    parts = [_line(LEFT, 0, LEFT, HEIGHT, "#888"), _line(LEFT, HEIGHT, WIDTH, HEIGHT, "#888")]
    for i in range(5):
        nbytes, seconds = top * i / 4, end * i / 4
        parts.append(
            f"<text x='{LEFT - 6}' y='{max(y(nbytes) + 4, 11):.0f}' text-anchor='end'>{size_text(nbytes)}</text>"
        )
        parts.append(
            f"<text x='{x(seconds):.0f}' y='{HEIGHT + BELOW + 18}' text-anchor='middle'>{seconds:.1f} s</text>"
        )
    return parts


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, dashes: str = "") -> str:
    style = f" stroke-dasharray='{dashes}'" if dashes else ""
    return f"<line x1='{x1:.1f}' y1='{y1:.1f}' x2='{x2:.1f}' y2='{y2:.1f}' stroke='{colour}'{style}/>"
