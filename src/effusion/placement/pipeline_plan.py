"""``plan``, ``apply`` and ``fit`` of a pipeline: a budget in, rows and a prediction out."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn

from ..core import log
from ..core.errors import BudgetError
from . import budgets, carrying, machine, planner
from .exhausted import is_out_of_memory
from .extent import OF_THE_RUN, asked
from .pipeline_choices import QUALITIES, Choices, switch
from .pipeline_run import RunsAsPlanned
from .plan import Plan
from .report import MemoryReport

logger = log.get_logger(__name__)
Self = TypeVar("Self", bound="PlanSwitches")
LOOSE = 1.5  # a budget this much above the peak needs no exact allocation
SIZES = ("height", "width", "num_frames", "batch_size", "num_inference_steps")


class PlanSwitches(RunsAsPlanned):
    """For pipelines: classes with ``components`` that can be called with a prompt and a size."""

    @property
    def components(self) -> dict[str, Any]:
        raise NotImplementedError

    def _networks(self) -> dict[str, nn.Module]:
        return {n: c for n, c in self.components.items() if isinstance(c, nn.Module)}

    def plan(
        self,
        memory: int | float | str | None = None,
        ram: int | float | str | None = None,
        quality: str = "exact",
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        batch_size: int = 1,
        num_inference_steps: int = 28,
        device: torch.device | str | None = None,
        offload_folder: str | None = None,
        **inputs: Any,
    ) -> Plan:
        """The fastest way to run within ``memory``, with its predicted peak per stage. Nothing is moved yet.

        A call of this size is rehearsed: networks get shapes instead of values, so no weights are read.

        Args:
            memory: budget on the compute device, like ``"6GB"``; all that is free if not given.
            ram: budget in host memory; all that is available if not given.
            quality: ``"exact"`` gives the bits of everything resident; ``"near"`` may decode in tiles and let weights
                of single precision rest in bfloat16; ``"lossy"`` may let weights rest in eight bits.
            height, width, num_frames, batch_size, num_inference_steps: the call to plan for.
            device: where to compute; the accelerator, else the CPU.
            offload_folder: for weights that are views of no file, if they have to rest on disk.
            inputs: what else the call will be given (``prompt_embeds``, ``image``, …), where that makes a difference.

        Raises:
            BudgetError: no plan fits; says the least that would, for each quality.
            ValueError: no size or number, an unknown quality or device.
            TypeError: an input that the call does not take.
        """
        taken = inspect.signature(type(self).__call__).parameters
        if unknown := sorted(set(inputs) - set(taken)):
            raise TypeError(f"neither `plan` nor a call of {type(self).__name__} takes {unknown}")
        if quality not in QUALITIES:
            raise ValueError(f"quality={quality!r}: it is one of {QUALITIES}")
        sizes = dict(zip(SIZES, (height, width, num_frames, batch_size, num_inference_steps), strict=True))
        wish = {name: value if value is None else budgets.whole(name, value) for name, value in sizes.items()}
        wish["batch_size"] = max(budgets.whole("batch_size", batch_size), asked(inputs)["batch_size"])
        where, networks = machine.default_device(device=device), self._networks()
        budget, host = budgets.on_device(memory, networks, where), budgets.on_host(ram, networks)
        choices = Choices(self, networks, {**inputs, **wish}, where, offload_folder)
        return self._choose(choices, budget, host, quality, wish, thorough=memory is not None)

    def _choose(
        self, choices: Choices, budget: int, ram: int, quality: str, wish: Mapping[str, Any], thorough: bool = True
    ) -> Plan:
        """The fastest of ``choices`` within the budgets; the first that needs no trick unless ``thorough``."""
        found: list[Plan] = []
        refused: BudgetError | None = None
        for switches, parts in choices.ways(quality):
            speed = choices.speed(parts, budget, ram)
            try:
                made = planner.plan(parts, budget, ram, str(choices.device), speed, quality)
            except BudgetError as error:
                refused = refused or error
                continue
            if choices.device.type == "cpu" and made.peak * LOOSE > budget:
                switches = {**switches, "exact_pages": True}
            call = {**wish, **choices.size}
            found.append(made.replace(switches={**made.switches, **switches}, notes=choices.notes, call=call))
            if not thorough or not any(row.travels for row in made.rows):
                break  # nothing is gained by leaving weights out, smaller forms or tiles
        if not found:
            raise BudgetError(f"{refused}{choices.advice()}") from None
        best = min(found, key=lambda p: p.seconds * (1 if p.exact else 1.05))
        self.__dict__["_kernels"] = (best.call, choices.kernels)
        return best

    def apply(self: Self, plan: Plan) -> Self:
        """Carry out ``plan``, instead of whatever policy there was.

        Raises:
            PlanConflict: it is for other components, or weights of the disk are in no file. Nothing has changed.
            ValueError: it is for a device that is not there.
            BudgetError: the device has no room for it. The plan before is in force again; if there was none,
                everything rests in host memory.
        """
        networks = self._networks()
        rows = tuple(replace(row, device=str(machine.check_device(row.device))) for row in plan.rows)
        plan = plan.replace(rows=rows)
        cuts = carrying.check(networks, plan)
        try:
            notes = carrying.carry_out(networks, plan, cuts)
        except BaseException as error:
            self._fall_back(networks)
            if is_out_of_memory(error):
                raise BudgetError(f"there is no room for what the plan keeps: {error}") from error
            raise
        self._end_plan()
        switch(self.components, plan.switches, True)
        applied = plan.replace(notes=tuple(dict.fromkeys([*plan.notes, *notes])))
        placed = {name: id(module) for name, module in networks.items()}
        self.__dict__.update(_plan=applied, _placed=placed, _device_map=None)
        return self

    def _fall_back(self, networks: Mapping[str, nn.Module]) -> None:
        """A plan could not be carried out: to the one before, or to no policy at all."""
        before: Plan | None = self.__dict__.get("_plan")
        try:
            carrying.to_host(networks)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if before is not None:
                carrying.carry_out(networks, before, carrying.check(networks, before))
        except Exception as error:
            logger.warning("the plan before can't be carried out either: %s", error)
            carrying.to_host(networks)
            self._end_plan()

    def fit(self, memory: int | float | str | None = None, **options: Any) -> Plan:
        """:meth:`plan` and :meth:`apply`; returns the plan, to print."""
        self.apply(self.plan(memory, **options))
        applied: Plan = self.__dict__["_plan"]
        return applied

    def memory_report(self) -> MemoryReport:
        """What the last run under a plan was predicted to hold, and what it held: per stage, and over time.

        Raises:
            ValueError: there was none.
        """
        found = self.__dict__.get("_memory_report")
        if found is None:
            raise ValueError("nothing was measured yet: call `fit(memory)`, then the pipeline, then this")
        return found  # type: ignore[no-any-return]

    # -- the plan in force ---------------------------------------------------------------------------

    def _unplan(self) -> None:
        """Another policy is set: no plan is in force any more."""
        carrying.release(self._networks())
        self._end_plan()

    def _end_plan(self) -> None:
        self.__dict__.pop("_placed", None)
        before = self.__dict__.pop("_plan", None)
        if before is not None:
            switch(self.components, before.switches, False)

    def _borrow_plan(self, other: PlanSwitches) -> None:
        """The plan of ``other``, whose components this pipeline shares, is the budget of this one too."""
        plan = other.__dict__.get("_plan")
        if plan is not None:
            self.__dict__["_plan"] = plan  # not placed by this one: made again for its task at the first call

    def _plan_in_force(self, inputs: Mapping[str, Any]) -> Plan | None:
        """The plan to run a call by: as it was made; made again for components or a task that it was not made for;
        carried out again where another pipeline has placed shared components; none where one has set a policy."""
        plan: Plan | None = self.__dict__.get("_plan")
        if plan is None:
            return None
        networks = self._networks()
        if self.__dict__.get("_placed") != {name: id(module) for name, module in networks.items()}:
            logger.info("the plan is for other components or another task; planning again within its budget")
            return self._plan_again(plan, inputs, {})
        found = [carrying.in_force(module) for module in networks.values()]
        if any(f is not None and f.ended for f in found):
            self._end_plan()
            return None
        wanted = [carrying.InForce(plan.of(name), plan.switches) for name in networks]
        return plan if found == wanted else self.apply(plan).__dict__["_plan"]

    def _plan_again(self, plan: Plan, inputs: Mapping[str, Any], size: Mapping[str, int], hoist: bool = True) -> Plan:
        """A plan within the budget of ``plan`` for a call with ``inputs``, of which ``size`` is known; carried out."""
        taken = inspect.signature(type(self).__call__).parameters
        given = {n: v for n, v in inputs.items() if n in taken and n not in OF_THE_RUN and v is not None}
        wish = {**{n: plan.call.get(n) for n in SIZES}, **{n: v for n, v in size.items() if n in SIZES}}
        wish["batch_size"] = size.get("batch_size") or max(wish["batch_size"] or 1, asked(given)["batch_size"])
        wish["num_inference_steps"] = wish["num_inference_steps"] or 28
        given = {n: v for n, v in given.items() if n not in SIZES}
        where = machine.default_device(device=plan.rows[0].device if plan.rows else None)
        networks = self._networks()
        budget, ram = budgets.on_device(plan.budget, networks, where), budgets.on_host(plan.ram, networks)
        folder = plan.switches.get("offload_folder")
        choices = Choices(self, networks, {**given, **wish}, where, folder, hoist)
        self.apply(self._choose(choices, budget, ram, plan.quality, wish))
        again: Plan = self.__dict__["_plan"]
        return again
