"""What a run under a plan holds: stage by stage, and over time, above what was there before the call.

Stages follow one another as components are called. What else the device holds, another pipeline's weights say, does not
count; what a run inside of this one (in a callback) holds counts for the stage that it is in.
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
from .meter import meter_of
from .plan import Plan
from .report import Measured, MemoryReport, Sample
from .rooms import room_on
from .units import all_slots, called_children

INTERVAL = 0.01  # seconds between samples; doubled whenever there are too many
MANY = 4000
_running: list[Recorder] = []  # one inside of the other


class Recorder:
    """Measures one run of the components in ``networks`` under ``plan``."""

    def __init__(self, networks: Mapping[str, nn.Module], plan: Plan) -> None:
        self.networks = dict(networks)
        self.plan = plan
        self.device = torch.device(plan.rows[0].device if plan.rows else "cpu")
        self.samples: list[Sample] = []
        self.steps: list[float] = []  # seconds since the start at which steps ended
        self.notes: list[str] = []
        self._meter = meter_of(self.device)
        self._measured: dict[str, Measured] = {}
        self._now: tuple[str, float] | None = None  # the stage that runs, and since when
        self._start = self._transferred = 0.0
        self._base = 0  # bytes that were held before and are not of this pipeline
        self._over = threading.Event()

    def note(self, text: str) -> None:
        """Something that happened, for the report."""
        self.notes.append(text)

    def step(self) -> None:
        """A step of the loop has ended."""
        self._meter.synchronize()
        self.steps.append(time.perf_counter() - self._start)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within it everything is measured."""
        self._meter.synchronize()
        self._base = max(self._meter.level() - self._there_already(), 0)
        self._transferred = lane_to(self.device).transferred
        self._start = time.perf_counter()
        hooks = [h for name, module in self.networks.items() for h in self._hooks(name, module)]
        room = room_on(self.device)
        told, room.told = room.told, self._enters
        sampler = threading.Thread(target=self._sample, name="effusion-memory", daemon=True)
        sampler.start()
        _running.append(self)
        try:
            yield
        except BaseException as error:
            self.note(f"the run ended early: {type(error).__name__}")
            raise
        finally:
            room.told = told
            self._enter(None)
            _running.remove(self)
            self._over.set()
            sampler.join()
            for hook in hooks:
                hook.remove()
            pages.warmed()
            if self._meter.flaw is not None:
                self.note(self._meter.flaw)

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
        own = any(engine.root is module for module in self.networks.values())
        if own and (self._now is None or self._now[0] != engine.name):
            self._enter(engine.name)

    def _enter(self, name: str | None) -> None:
        self._meter.synchronize()
        now = time.perf_counter()
        together = [r for r in _running if r.device == self.device]
        for recorder in together:  # the peak will be forgotten for all of them
            recorder._absorb()
        if self._now is not None:
            stage, since = self._now
            known = self._measured[stage]
            self._measured[stage] = Measured(known.peak, known.seconds + now - since)
        self._now = (name, now) if name is not None else None
        if self.plan.switches.get("exact_pages"):
            pages.trim()
        for recorder in together:
            recorder._meter.forget()

    def _absorb(self) -> None:
        """Take the peak so far over into what is known of the stage that runs."""
        if self._now is not None:
            known = self._measured.get(self._now[0], Measured())
            peak = max(self._meter.peak() - self._base, known.peak, 0)
            self._measured[self._now[0]] = Measured(peak, known.seconds)

    # -- readings ------------------------------------------------------------------------------------

    def _there_already(self) -> int:
        """Bytes of weights that the plan counts and that are in memory before the call."""
        tensors = {id(s.tensor): s.tensor for m in self.networks.values() for s in all_slots(m)}
        return sum(map(self._meter.there, tensors.values()))

    def _sample(self) -> None:
        interval = INTERVAL
        while not self._over.wait(interval):
            stage = self._now[0] if self._now is not None else ""
            level = max(self._meter.level() - self._base, 0)
            moved = int(lane_to(self.device).transferred - self._transferred)
            self.samples.append(Sample(time.perf_counter() - self._start, level, stage, moved))
            if len(self.samples) >= MANY:
                self.samples, interval = self.samples[::2], interval * 2
