"""``plan``, ``apply`` and ``fit`` of a pipeline: a budget in, rows and a prediction out."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..core import log
from ..core.errors import BudgetError, PlanConflict
from . import casting, homes, machine, pages, planner, policies, workspaces
from .engine import Unit, engine_for
from .expectation import asked
from .pipeline_choices import QUALITIES, Choices, switch
from .plan import Plan, parse_size
from .recorder import Recorder
from .report import MemoryReport
from .rescue import Rescue
from .sources import Mappings, give_back_pages, join, set_apart
from .units import Group, all_slots, by_block, by_leaf

logger = log.get_logger(__name__)
Self = TypeVar("Self", bound="PlanSwitches")
LOOSE = 1.5  # a budget this much above the peak needs no exact allocation


class PlanSwitches:
    """For pipelines: classes with ``components`` that can be called with a prompt and a size."""

    @property
    def components(self) -> dict[str, Any]:
        raise NotImplementedError

    def _networks(self) -> dict[str, nn.Module]:
        return {n: c for n, c in self.components.items() if isinstance(c, nn.Module)}

    def _unplan(self) -> None:
        """Another policy is set: no plan is in force any more."""
        self._rejoin()
        self._cast(None)
        self._end_plan()

    def _rejoin(self) -> None:
        """Areas of mapped files that the plan in force has set apart are read as ever again."""
        if "_plan" in self.__dict__:
            mappings = Mappings()
            slots = [slot for module in self._networks().values() for slot in all_slots(module)]
            join(slot.tensor for slot in slots if mappings.span(slot.tensor) is not None)

    def _end_plan(self) -> None:
        before = self.__dict__.pop("_plan", None)
        if before is not None:
            switch(self.components, before.switches, False)

    def _cast(self, plan: Plan | None) -> tuple[str, ...]:
        """Let networks rest in the forms that ``plan`` gives them, those of the plan in force in theirs from before.

        Returns:
            How far that takes their weights from what they were.
        """
        before: Plan | None = self.__dict__.get("_plan")
        old, new = (_cast_by(p) if p is not None else {} for p in (before, plan))
        networks = self._networks()
        for name in old.keys() - new.keys():
            casting.uncast(networks[name])
        notes = []
        for name, (storage, compute) in new.items():
            if name not in old:
                module = networks[name]
                away = casting.apply_layerwise_casting(module, storage, compute, casting.usual_patterns(module))
                notes.append(f"{name}: its weights in {str(storage)[6:]} are {away:.2%} from what they were")
        return tuple(notes)

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
            ValueError: no size, an unknown quality or device.
            TypeError: an input that the call does not take.
        """
        taken = inspect.signature(type(self).__call__).parameters
        if unknown := sorted(set(inputs) - set(taken)):
            raise TypeError(f"neither `plan` nor a call of {type(self).__name__} takes {unknown}")
        if quality not in QUALITIES:
            raise ValueError(f"quality={quality!r}: it is one of {QUALITIES}")
        where = machine.default_device(device=device)
        budget = parse_size(memory) if memory is not None else machine.free_device_memory(where) * 9 // 10
        host = parse_size(ram, "ram") if ram is not None else machine.available_ram() * 9 // 10
        batch_size = max(batch_size, asked(inputs)["batch_size"])
        wish = {"height": height, "width": width, "num_frames": num_frames, "batch_size": batch_size}
        wish["num_inference_steps"] = num_inference_steps
        call = {**inputs, **wish}
        choices = Choices(self, self._networks(), call, where, offload_folder)
        found: list[Plan] = []
        refused: BudgetError | None = None
        for switches, parts in choices.ways(quality):
            speed = choices.speed(parts, budget, host)
            try:
                made = planner.plan(parts, budget, host, str(where), speed, quality)
            except BudgetError as error:
                refused = refused or error
                continue
            if where.type == "cpu" and made.peak * LOOSE > budget:
                switches = {**switches, "exact_pages": True}
            notes, size = choices.notes, choices.size
            found.append(made.replace(switches=switches, notes=notes, call={**wish, **size}))
            if memory is None or not any(row.travels for row in made.rows):
                break  # nothing is gained by leaving weights out, smaller forms or tiles
        if not found:
            raise BudgetError(f"{refused}{choices.advice()}") from None
        best = min(found, key=lambda p: p.seconds * (1 if p.exact else 1.05))
        self.__dict__["_kernels"] = (best.call, choices.kernels)
        return best

    def apply(self: Self, plan: Plan) -> Self:
        """Carry out ``plan``, instead of whatever policy there was.

        Raises:
            PlanConflict: it is for other components, or weights of the disk are in no file.
            ValueError: it is for a device that is not there.
        """
        networks = self._networks()
        unknown = sorted({row.component for row in plan.rows} - set(networks))
        if unknown:
            raise PlanConflict(f"the plan has rows for {unknown}; this pipeline's networks are {sorted(networks)}")
        rows = tuple(replace(row, device=str(machine.check_device(row.device))) for row in plan.rows)
        plan = plan.replace(rows=rows)
        self._rejoin()
        notes = self._cast(plan)
        for name in networks:
            if plan.of(name):
                _carry_out(name, networks[name], plan)
        self._end_plan()
        switch(self.components, plan.switches, True)
        self.__dict__["_plan"] = plan.replace(notes=tuple(dict.fromkeys([*plan.notes, *notes])))
        return self

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

    # -- runs under a plan ---------------------------------------------------------------------------

    @contextmanager
    def _as_planned(self, inputs: Mapping[str, Any]) -> Iterator[Recorder | None]:
        """A call under the plan in force: planned again if it is larger, measured, with exact allocation if need be."""
        plan: Plan | None = self.__dict__.get("_plan")
        if plan is None or "_rehearsing" in self.__dict__:
            yield None
            return
        plan = self._follow(plan, inputs)
        recorder = Recorder(self._networks(), plan)
        try:
            with pages.exact() if plan.switches.get("exact_pages") else _nothing(), recorder.running():
                yield recorder
        finally:
            self.__dict__["_memory_report"] = recorder.report()
        call, kernels = self.__dict__.get("_kernels", (None, ()))
        if call == plan.call:
            workspaces.compiled(kernels)

    def _rescuer(self, recorder: Recorder | None) -> Rescue | None:
        """What makes leaner plans during a run under a plan."""
        if recorder is None:
            return None
        return Rescue(self._networks(), self.__dict__["_plan"], self.apply, recorder.note)

    def _follow(self, plan: Plan, inputs: Mapping[str, Any]) -> Plan:
        """``plan``, or another one within the same budget if the call is larger than it."""
        wanted = asked(inputs)
        names = ("height", "width", "num_frames", "batch_size")
        planned = {n: plan.call.get(n) for n in names}
        larger = [n for n in names if wanted.get(n, 0) > (planned[n] or 0)]
        if not larger or not plan.call or plan.budget is None:
            return plan
        wish = {n: wanted.get(n) or planned[n] for n in names}
        steps, folder = plan.call["num_inference_steps"], plan.switches.get("offload_folder")
        device = plan.rows[0].device if plan.rows else None
        logger.warning("the call is larger than planned (%s); planning again", ", ".join(larger))
        return self.fit(
            plan.budget, ram=plan.ram, quality=plan.quality, device=device, offload_folder=folder,
            num_inference_steps=steps, **wish, **{n: v for n, v in inputs.items() if isinstance(v, Tensor)},
        )  # fmt: skip


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _cast_by(plan: Plan) -> dict[str, tuple[torch.dtype, torch.dtype]]:
    """The components that ``plan`` itself brings into another form: dtypes at rest, and of computing."""
    storage = plan.switches.get("storage_dtype")
    cast = {row.component: row.compute_dtype for row in plan.rows if storage and row.form == storage}
    return {name: (getattr(torch, str(storage)), getattr(torch, str(compute))) for name, compute in cast.items()}


def _carry_out(name: str, module: nn.Module, plan: Plan) -> None:
    rows = {row.unit.partition("/")[2]: row for row in plan.of(name)}
    groups = next((g for g in (by_block(module), by_leaf(module)) if {x.name for x in g} == set(rows)), None)
    if groups is None:
        raise PlanConflict(f"the plan's units of {name!r} are not those of this {type(module).__name__}; plan again")
    policies.check_free(module)
    engine = engine_for(module, name)
    engine.unhoist()
    device = machine.check_device(next(iter(rows.values())).device)
    folder = plan.switches.get("offload_folder")
    files = []
    for home in dict.fromkeys(row.home for row in rows.values()):
        part = [g for g in groups if rows[g.name].home == home]
        if home == "device":
            homes.to_device([s for g in part for s in g.slots], device)
        elif home != "disk" or folder is not None:  # what small buffers hold that are in no file stays in memory
            files += policies.go_home(engine, part, home, folder)
        if home == "disk":
            _clear_pages([g for g in part if rows[g.name].keep], [g for g in part if not rows[g.name].keep])
    units = [Unit(rows[g.name], list(g.slots), list(g.triggers), device) for g in groups]
    if not any(row.travels for row in rows.values()) and device.type == "cpu":
        units = []
    engine.exclude, engine.give_back = frozenset(), False
    engine.set_units(units, {"kind": "plan"})
    engine.replace_files(files)
    engine.close_if_idle()


def _clear_pages(kept: Sequence[Group], streamed: Sequence[Group]) -> None:
    """Pages of mapped files that an earlier plan brought in go; what is computed with in place is set apart."""
    mappings = Mappings()

    def mapped(groups: Sequence[Group]) -> list[Tensor]:
        tensors = {id(s.tensor): s.tensor for g in groups for s in g.slots}.values()
        return [t for t in tensors if mappings.span(t) is not None]

    inside, outside = mapped(kept), mapped(streamed)
    give_back_pages([*inside, *outside])
    set_apart(inside, outside)
