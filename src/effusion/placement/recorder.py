"""What a run under a plan holds: stage by stage, and over time.

On CUDA the allocator is asked; on the CPU the process: memory of its own and pages of mapped files, above what it
held before the call. Stages follow one another as components are called.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from . import pages
from .engine import Engine, engine_of
from .lane import lane_to
from .lender import compiled_call
from .plan import Plan
from .report import Measured, MemoryReport, Sample
from .rooms import room_on
from .sources import present_bytes
from .units import all_slots, called_children

INTERVAL = 0.01  # seconds between samples; doubled whenever there are too many
MANY = 4000


class Recorder:
    """Measures one run of the components in ``networks`` under ``plan``."""

    def __init__(self, networks: Mapping[str, nn.Module], plan: Plan) -> None:
        self.networks = dict(networks)
        self.plan = plan
        self.device = torch.device(plan.rows[0].device if plan.rows else "cpu")
        self.samples: list[Sample] = []
        self.steps: list[float] = []  # seconds since the start at which steps ended
        self.notes: list[str] = []
        self._measured: dict[str, Measured] = {}
        self._now: tuple[str, float] | None = None  # the stage that runs, and since when
        self._start = self._base = self._transferred = 0.0
        self._over = threading.Event()

    def note(self, text: str) -> None:
        """Something that happened, for the report."""
        self.notes.append(text)

    def step(self) -> None:
        """A step of the loop has ended."""
        self.steps.append(time.perf_counter() - self._start)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within it everything is measured."""
        self._base = self._level() - self._there_already()
        self._transferred = lane_to(self.device).transferred
        self._start = time.perf_counter()
        hooks = [h for name, module in self.networks.items() for h in self._hooks(name, module)]
        room = room_on(self.device)
        room.told = self._enters
        sampler = threading.Thread(target=self._sample, name="effusion-memory", daemon=True)
        sampler.start()
        try:
            yield
        finally:
            room.told = None
            self._enter(None)
            self._over.set()
            sampler.join()
            for hook in hooks:
                hook.remove()
            pages.warmed()

    def report(self) -> MemoryReport:
        """What was measured, beside what was predicted."""
        transferred = int(lane_to(self.device).transferred - self._transferred)
        return MemoryReport(
            self.plan, str(self.device), dict(self._measured), list(self.samples), list(self.steps), transferred,
            tuple(self.notes),
        )  # fmt: skip

    # -- stages --------------------------------------------------------------------------------------

    def _hooks(self, name: str, module: nn.Module) -> list[Any]:
        """A component begins when it, or (``vae.decode``) a child of it, is called; one whose weights travel, when
        it has been made room for."""

        def begin(*_: Any) -> None:
            if self._now is None or self._now[0] != name:
                room_on(self.device).clear(
                    name=name
                )  # it stays for good and makes no room for itself; the plan counts on it
                self._enter(name)

        engine = engine_of(module)
        if engine is not None and engine.units:
            return []
        begin.only_looks = True  # type: ignore[attr-defined]
        places = [module, *called_children(module)]
        return [m.register_forward_pre_hook(begin) for m in places if compiled_call(m) is None]

    def _enters(self, engine: Engine) -> None:
        if self._now is None or self._now[0] != engine.name:
            self._enter(engine.name)

    def _enter(self, name: str | None) -> None:
        now = time.perf_counter()
        if self._now is not None:
            stage, since = self._now
            known = self._measured.get(stage, Measured())
            self._measured[stage] = Measured(max(known.peak, self._peak()), known.seconds + now - since)
        self._now = (name, now) if name is not None else None
        if self.plan.switches.get("exact_pages"):
            pages.trim()
        self._forget()

    # -- readings ------------------------------------------------------------------------------------

    def _level(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else pages.held()

    def _peak(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return max(pages.peak() - int(self._base), 0)

    def _forget(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            pages.forget_peak()

    def _there_already(self) -> int:
        """Bytes of weights that the plan counts and that are in memory before the call."""
        if self.device.type == "cuda":
            return self._level()
        tensors = {id(s.tensor): s.tensor for m in self.networks.values() for s in all_slots(m)}
        return sum(present_bytes(t) for t in tensors.values())

    def _sample(self) -> None:
        interval = INTERVAL
        while not self._over.wait(interval):
            stage = self._now[0] if self._now is not None else ""
            level = max(self._level() - int(self._base), 0)
            moved = int(lane_to(self.device).transferred - self._transferred)
            self.samples.append(Sample(time.perf_counter() - self._start, level, stage, moved))
            if len(self.samples) >= MANY:
                self.samples, interval = self.samples[::2], interval * 2
