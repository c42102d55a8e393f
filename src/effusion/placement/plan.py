"""A plan is data: where each unit of weights rests, in which form, and where it computes.

Nothing here touches a device. A plan can be printed, compared, written to JSON and read back; the
engine (:mod:`.engine`) carries it out.
"""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..core.errors import PlanConflict

HOMES = ("device", "pinned", "host", "disk")
STORED = "as stored"
_SAME_BITS = ("offload_folder", "exact_pages", "hoist", "together")  # switches that change no bit of the result


@dataclass(frozen=True)
class Row:
    """One unit: a set of tensors that travel together.

    Attributes:
        unit: name of the unit, ``component/module.path``.
        nbytes: its size in the form it rests in.
        home: where it rests: ``device``, ``pinned``, ``host``, or ``disk`` (slices of a file).
        device: where it computes.
        form: ``as stored``, or the dtype that its weights were cast to for storage.
        compute_dtype: the dtype that weights of a smaller form are decoded to; ``None`` as they are.
        keep: stays on the compute device after its first use, until another needs the room.
        ahead: how many units after it are fetched while it computes; 0 for none.
        filled: it rests where it computes as a view of a file, and the call reads all of it: it is read when the plan is
            carried out, not in the middle of the first call.
    """

    unit: str
    nbytes: int
    home: str
    device: str
    form: str = STORED
    compute_dtype: str | None = None
    keep: bool = False
    ahead: int = 0
    filled: bool = False

    def __post_init__(self) -> None:
        if self.home not in HOMES:
            raise ValueError(f"home of {self.unit!r} is {self.home!r}; it must be one of {HOMES}")
        if self.ahead < 0 or self.nbytes < 0:
            raise ValueError(f"{self.unit!r}: `ahead` ({self.ahead}) and `nbytes` ({self.nbytes}) can't be negative")
        if self.home == "pinned" and self.device == "cpu":
            raise PlanConflict(
                f"{self.unit!r}: pinned memory serves copies to an accelerator, but it computes on the CPU; "
                f"the nearest legal plan is home='host'"
            )

    @property
    def component(self) -> str:
        return self.unit.partition("/")[0]

    @property
    def travels(self) -> bool:
        """Whether the unit has to be fetched before it can compute."""
        if self.home == "device":
            return False
        return self.home == "disk" or self.device != "cpu"


@dataclass(frozen=True)
class Stage:
    """What is predicted (and later measured) for one stage of a run: an encoder, denoising, decoding."""

    name: str
    weights: int = 0  # bytes resident on the compute device while it runs
    ring: int = 0  # bytes of the ring that streamed units pass through
    activations: int = 0
    host: int = 0  # bytes of plain and pinned host memory
    seconds: float = 0.0
    workspaces: int = 0  # bytes that operators take for the time of a call

    @property
    def peak(self) -> int:
        return self.weights + self.ring + self.activations + self.workspaces


@dataclass(frozen=True)
class Plan:
    """Rows, what they are predicted to cost, and the switches for activations that go with them."""

    rows: tuple[Row, ...]
    stages: tuple[Stage, ...] = ()
    switches: Mapping[str, Any] = field(default_factory=dict)  # vae_tiling, vae_slicing, hoist, …
    quality: str = "exact"
    budget: int | None = None
    ram: int | None = None
    notes: tuple[str, ...] = ()
    call: Mapping[str, Any] = field(default_factory=dict)  # height, width, …: the call it was made for

    @property
    def peak(self) -> int:
        """Bytes on the compute device at the worst moment, as predicted."""
        return max((stage.peak for stage in self.stages), default=sum(r.nbytes for r in self.rows if not r.travels))

    @property
    def peak_ram(self) -> int:
        """Bytes of host memory at the worst moment, as predicted."""
        return max((stage.host for stage in self.stages), default=0)

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    @property
    def exact(self) -> bool:
        """Whether the result is bit-identical to that of everything resident, as stored."""
        if any(value for name, value in self.switches.items() if name not in _SAME_BITS):
            return False
        return all(row.form == STORED for row in self.rows)

    def of(self, component: str) -> tuple[Row, ...]:
        """The rows of one component."""
        return tuple(row for row in self.rows if row.component == component)

    def replace(self, **changes: Any) -> Plan:
        return replace(self, **changes)

    # -- data ------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        body = asdict(self)
        body["switches"], body["call"] = dict(self.switches), dict(self.call)
        return body

    @classmethod
    def from_dict(cls, body: Mapping[str, Any]) -> Plan:
        rest = {k: v for k, v in body.items() if k not in ("rows", "stages", "notes")}
        unknown = set(rest) - {"switches", "quality", "budget", "ram", "call"}
        if unknown:
            raise ValueError(f"a plan has no fields {sorted(unknown)}")
        return cls(
            rows=tuple(Row(**row) for row in body["rows"]),
            stages=tuple(Stage(**stage) for stage in body.get("stages", ())),
            notes=tuple(body.get("notes", ())),
            **rest,
        )

    def __str__(self) -> str:
        return "\n".join([*_stage_table(self), *_row_table(self), *self.notes])


def size_text(nbytes: float) -> str:
    """``1536`` -> ``1.5 KB``: decimal below, in the units that budgets are given in."""
    for unit in ("B", "KB", "MB", "GB"):
        if abs(nbytes) < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.2f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} TB"


def parse_size(text: int | float | str, what: str = "memory") -> int:
    """``"6GB"``, ``"5.5 GiB"``, ``"800MB"`` or a number of bytes, as bytes.

    Raises:
        ValueError: no size, an unknown unit, or nothing left (zero or less).
    """
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    units |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
    if isinstance(text, bool) or not isinstance(text, (numbers.Real, str)):  # numpy's numbers are real ones too
        raise ValueError(f"{what}={text!r}: give bytes as a number, or text like '6GB' or '5.5GiB'")
    number, unit = str(text).strip(), ""
    while number and not (number[-1].isdigit() or number[-1] == "."):
        number, unit = number[:-1], number[-1] + unit
    unit = unit.strip().upper()
    try:
        value = float(number) * units[unit]
    except (ValueError, KeyError):
        raise ValueError(f"{what}={text!r} is no size: give text like '6GB', '5.5GiB', '800MB', or bytes") from None
    if not 0 < value < 2**63:
        raise ValueError(f"{what}={text!r} leaves nothing to work with; give a positive size like '6GB'")
    return int(value)


def _stage_table(plan: Plan) -> list[str]:
    if not plan.stages:
        return []
    head = f"{'stage':<18}{'weights':>11}{'ring':>11}{'activations':>13}{'peak':>11}{'host':>11}{'seconds':>10}"
    lines = [head]
    for s in plan.stages:
        sizes = [size_text(n) for n in (s.weights, s.ring, s.activations, s.peak, s.host)]
        widths = (11, 11, 13, 11, 11)
        cells = "".join(f"{t:>{w}}" for t, w in zip(sizes, widths, strict=True))
        lines.append(f"{s.name:<18}{cells}{s.seconds:>10.1f}")
    kind = "exact" if plan.exact else plan.quality
    lines.append(f"peak {size_text(plan.peak)}, host {size_text(plan.peak_ram)}, {plan.seconds:.1f} s, {kind}")
    return lines


def _row_table(plan: Plan) -> list[str]:
    """Rows alike are one line: what is kept, what is streamed, from where."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in plan.rows:
        key = (row.component, row.home, row.device, row.form, row.compute_dtype, row.keep, row.ahead)
        groups.setdefault(key, []).append(row)
    lines = []
    for (component, home, device, form, dtype, keep, ahead), rows in groups.items():
        way = "resident" if not rows[0].travels else ("kept once there" if keep else f"streamed, {ahead} ahead")
        text = f"{component:<18}{len(rows):>4} units {size_text(sum(r.nbytes for r in rows)):>11}  {home} -> {device}"
        lines.append(f"{text}  {way}, {form}{f' -> {dtype}' if dtype else ''}")
    return lines
