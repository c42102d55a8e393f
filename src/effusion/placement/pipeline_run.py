"""A call of a pipeline under a plan: measured, compared with what was planned, planned again or rescued if need be."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from ..core import log
from . import hoisting, pages, workspaces
from .engine import engine_of
from .extent import extent, larger
from .plan import Plan
from .recorder import Recorder
from .rescue import Rescue
from .rooms import room_on

logger = log.get_logger(__name__)


class Run:
    """One call of ``pipe`` with ``inputs`` under the plan that is in force."""

    def __init__(self, pipe: Any, inputs: Mapping[str, Any]) -> None:
        self.pipe, self.inputs = pipe, inputs
        self.notes: list[str] = []  # from before the call was planned again
        self.rescue = Rescue(pipe._networks(), self.plan, self._lean, lambda text: self.recorder.note(text))
        self._begin()

    @property
    def plan(self) -> Plan:
        """The one in force now."""
        found: Plan = self.pipe.__dict__["_plan"]
        return found

    def _begin(self) -> None:
        self.recorder = Recorder(self.pipe._networks(), self.plan)
        for note in self.notes:
            self.recorder.note(note)
        self._within = ExitStack()
        if self.plan.switches.get("exact_pages"):
            self._within.enter_context(pages.exact())
        room = room_on(self.recorder.device)
        self._within.callback(setattr, room, "together", None)
        room.together = _together(self.plan)
        self._within.enter_context(self.recorder.running())

    def end(self, error: BaseException | None = None) -> None:
        """The call is over, or ended by ``error``: what it held is the pipeline's report."""
        self._within.__exit__(None if error is None else type(error), error, None)
        report = self.recorder.report()
        if report.stages:  # else it was refused before it began
            self.pipe.__dict__["_memory_report"] = report
        call, kernels = self.pipe.__dict__.get("_kernels", (None, ()))
        if call == self.recorder.plan.call:
            workspaces.compiled(kernels)

    def step(self) -> None:
        """A step of the loop has ended."""
        self.recorder.step()

    def meets(self, state: Any) -> None:
        """A block begins with ``state``: a call that turns out to be larger than planned is planned again.

        Raises:
            BudgetError: it does not fit into the budget.
        """
        plan = self.plan
        if plan.call and plan.budget is not None:
            found = larger(state, plan.call, bool(plan.switches.get("hoist")))
            if found:
                self._again(f"the call is larger than planned ({', '.join(found)})", extent(state))

    def hoist(self, loop: Callable[[], Any]) -> None:
        """The loop begins: leave out of it what the plan leaves out, or plan again if that can't be done."""
        networks, wanted = self.pipe._networks(), self.plan.switches.get("hoist")
        if not wanted and not self.pipe.__dict__.get("_hoists"):
            return
        reasons = self.rescue("looking ahead", partial(hoisting.foresee, networks, loop, strict=bool(wanted)))
        names = wanted if isinstance(wanted, (list, tuple)) else list(reasons) if wanted else []
        missed = [n for n in names if (engine := engine_of(networks[n])) is None or engine.hoisting is None]
        if missed:
            why = "; ".join(f"{n}: {reasons.get(n, 'nothing to leave out')}" for n in missed)
            self._again(f"weights that the plan leaves out of the loop have to be in it ({why})", {}, hoist=False)

    def _again(self, why: str, size: Mapping[str, int], hoist: bool = True) -> None:
        logger.warning("%s; planning again", why)
        self._within.close()
        self.notes = [*self.recorder.notes, f"{why}; planned again"]
        try:
            self.pipe._plan_again(self.plan, self.inputs, size, hoist)
        finally:
            self._begin()
        self.rescue.renew(self.plan)

    def _lean(self, plan: Plan) -> None:
        self.pipe.apply(plan)
        room_on(self.recorder.device).together = _together(plan)


def _together(plan: Plan) -> frozenset[str]:
    return frozenset(plan.switches.get("together", ()))


class RunsAsPlanned:
    """For pipelines with plans: their calls."""

    def _networks(self) -> dict[str, Any]:
        raise NotImplementedError

    def _plan_in_force(self, inputs: Mapping[str, Any]) -> Plan | None:
        raise NotImplementedError

    @contextmanager
    def _as_planned(self, inputs: Mapping[str, Any]) -> Iterator[Run | None]:
        """A call with ``inputs``, under the plan in force if there is one."""
        if "_rehearsing" in self.__dict__ or self._plan_in_force(inputs) is None:
            yield None
            return
        run = Run(self, inputs)
        try:
            yield run
        except BaseException as error:
            run.end(error)
            raise
        run.end()

    def _meets(self, run: Run | None, state: Any) -> None:
        """A block of a call begins with ``state``."""
        rehearsing = self.__dict__.get("_rehearsing")
        if rehearsing is not None:
            rehearsing.meets(state)
        elif run is not None:
            run.meets(state)

    def _guards(self, run: Run | None) -> dict[str, Any]:
        """What the loop is shown to before it begins, and what makes leaner plans during it."""
        rehearsing = self.__dict__.get("_rehearsing")
        if rehearsing is not None:
            return {"hoist": rehearsing.loops.append}
        if run is not None:
            return {"hoist": run.hoist, "rescue": run.rescue}
        if self.__dict__.get("_hoists"):
            return {"hoist": lambda loop: hoisting.foresee(self._networks(), loop)}
        return {}
