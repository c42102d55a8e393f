"""``plan``, ``apply`` and ``fit`` of a pipeline: a budget in, rows and a prediction out."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from ..core import log
from ..core.errors import BudgetError, PlanConflict
from . import homes, machine, pages, planner, policies
from .engine import Unit, engine_for
from .forecast import Part, Speed, part_of
from .plan import Plan, parse_size, size_text
from .recorder import Recorder
from .rehearsal import Rehearsed, rehearse
from .report import MemoryReport
from .rescue import Rescue
from .sources import Mappings, give_back_pages
from .units import by_block, by_leaf

logger = log.get_logger(__name__)
Self = TypeVar("Self", bound="PlanSwitches")
QUALITIES = ("exact", "near", "lossy")
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
        before = self.__dict__.pop("_plan", None)
        if before is not None:
            self._switch(before.switches, False)

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
    ) -> Plan:
        """The fastest way to run within ``memory``, with its predicted peak per stage. Nothing is moved yet.

        A call of this size is rehearsed: networks get shapes instead of values, so no weights are read.

        Args:
            memory: budget on the compute device, like ``"6GB"``; all that is free if not given.
            ram: budget in host memory; all that is available if not given.
            quality: ``"exact"`` gives the bits of everything resident; ``"near"`` may decode in tiles.
            height, width, num_frames, batch_size, num_inference_steps: the call to plan for.
            device: where to compute; the accelerator, else the CPU.
            offload_folder: for weights that are views of no file, if they have to rest on disk.

        Raises:
            BudgetError: no plan fits; says the least that would, for each quality.
            ValueError: no size, an unknown quality or device.
        """
        if quality not in QUALITIES:
            raise ValueError(f"quality={quality!r}: it is one of {QUALITIES}")
        where = machine.default_device(device=device)
        budget = parse_size(memory) if memory is not None else machine.free_device_memory(where) * 9 // 10
        host = parse_size(ram, "ram") if ram is not None else machine.available_ram() * 9 // 10
        call = {"height": height, "width": width, "num_frames": num_frames, "batch_size": batch_size}
        call["num_inference_steps"] = num_inference_steps
        found: list[Plan] = []
        least: dict[str, int] = {}
        refused: BudgetError | None = None
        for switches in self._variants(quality, batch_size):
            with self._switched(switches):
                parts, needs, size = self._parts(call, where, offload_folder)
            name = "near" if "vae_tiling" in switches else "exact"
            least[name] = min(least.get(name, 1 << 62), planner.least(parts))
            try:
                made = planner.plan(parts, budget, host, str(where), self._speed(parts, where, budget), quality)
            except BudgetError as error:
                refused = refused or error
                continue
            if offload_folder:
                switches = {**switches, "offload_folder": offload_folder}
            if where.type == "cpu" and made.peak * LOOSE > budget:
                switches = {**switches, "exact_pages": True}
            found.append(made.replace(switches=switches, notes=_notes(needs), call={**call, **size}))
            if memory is None or not any(row.travels for row in made.rows):
                break  # nothing is gained by giving up exactness
        if not found:
            raise BudgetError(f"{refused}{self._advice(call, where, least)}") from None
        return min(found, key=lambda p: p.seconds * (1 if p.exact else 1.05))

    def apply(self: Self, plan: Plan) -> Self:
        """Carry out ``plan``, instead of whatever policy there was.

        Raises:
            PlanConflict: it is for other components, or weights of the disk are in no file.
        """
        networks = self._networks()
        unknown = sorted({row.component for row in plan.rows} - set(networks))
        if unknown:
            raise PlanConflict(f"the plan has rows for {unknown}; this pipeline's networks are {sorted(networks)}")
        for name in networks:
            if plan.of(name):
                _carry_out(name, networks[name], plan)
        self._unplan()
        self._switch(plan.switches, True)
        self.__dict__["_plan"] = plan
        return self

    def fit(self, memory: int | float | str | None = None, **options: Any) -> Plan:
        """:meth:`plan` and :meth:`apply`; returns the plan, to print."""
        made = self.plan(memory, **options)
        self.apply(made)
        return made

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
        if plan is None or self.__dict__.get("_rehearsing"):
            yield None
            return
        plan = self._follow(plan, inputs)
        recorder = Recorder(self._networks(), plan)
        with pages.exact() if plan.switches.get("exact_pages") else _nothing(), recorder.running():
            yield recorder
        self.__dict__["_memory_report"] = recorder.report()

    def _rescuer(self, recorder: Recorder | None) -> Rescue | None:
        """What makes leaner plans during a run under a plan."""
        if recorder is None:
            return None
        return Rescue(self._networks(), self.__dict__["_plan"], self.apply, recorder.note)

    def _follow(self, plan: Plan, inputs: Mapping[str, Any]) -> Plan:
        """``plan``, or another one within the same budget if the call is larger than it."""
        asked = _asked(inputs)
        names = ("height", "width", "num_frames", "batch_size")
        planned = {n: plan.call.get(n) for n in names}
        larger = [n for n in names if asked.get(n, 0) > (planned[n] or 0)]
        if not larger or not plan.call or plan.budget is None:
            return plan
        wish = {n: asked.get(n) or planned[n] for n in names}
        steps, folder = plan.call["num_inference_steps"], plan.switches.get("offload_folder")
        device = plan.rows[0].device if plan.rows else None
        logger.warning("the call is larger than planned (%s); planning again", ", ".join(larger))
        return self.fit(
            plan.budget, ram=plan.ram, quality=plan.quality, device=device, offload_folder=folder,
            num_inference_steps=steps, **wish,
        )  # fmt: skip

    # -- what plans are made of ----------------------------------------------------------------------

    def _variants(self, quality: str, batch: int = 1) -> list[dict[str, Any]]:
        """Switches to try: none; where more than bits may change, a batch decoded in turn, and in tiles."""
        if quality == "exact":
            return [{}]
        vae = self.components.get("vae")
        slices = batch > 1 and hasattr(vae, "enable_slicing") and not getattr(vae, "use_slicing", False)
        tiles = hasattr(vae, "enable_tiling") and not getattr(vae, "use_tiling", False)
        found: list[dict[str, Any]] = [{}, {"vae_slicing": True}] if slices else [{}]
        return found + [{**f, "vae_tiling": True} for f in found if tiles]

    @contextmanager
    def _switched(self, switches: Mapping[str, Any]) -> Iterator[None]:
        self._switch(switches, True)
        try:
            yield
        finally:
            self._switch(switches, False)

    def _switch(self, switches: Mapping[str, Any], on: bool) -> None:
        for name in ("slicing", "tiling"):
            if switches.get(f"vae_{name}"):
                getattr(self.components["vae"], f"{'enable' if on else 'disable'}_{name}")()

    def _parts(
        self, call: Mapping[str, Any], device: torch.device, folder: str | None
    ) -> tuple[list[Part], dict[str, Rehearsed], dict[str, int]]:
        """The parts in the order that they run in; and the size of the call, where it was left open."""
        networks = self._networks()
        needs, size = self._rehearse(networks, call, device)
        order = [*needs, *(n for n in networks if n not in needs)]
        mappings = Mappings() if device.type == "cpu" and folder is None else None
        steps = int(call["num_inference_steps"])
        parts, kernels = [], set[Any]()
        for name in order:
            found = needs.get(name) or Rehearsed()
            kernels |= found.kernels  # those of earlier stages stay
            parts.append(part_of(name, networks[name], found, steps, device, mappings, len(kernels)))
        return parts, needs, size

    def _speed(self, parts: list[Part], device: torch.device, memory: int) -> Speed:
        """Rates for the dtype of the largest network; weights come out of the system's cache if that can hold them."""
        rates = machine.rates(device)
        largest = max(self._networks().values(), key=lambda m: sum(p.nbytes for p in m.parameters()), default=None)
        dtype = next((p.dtype for p in largest.parameters()), torch.float32) if largest is not None else torch.float32
        if device.type != "cpu":
            stream = rates.host_to_device
        else:
            cached = sum(p.nbytes for p in parts) < machine.available_ram() - memory
            stream = rates.host_to_device if cached else rates.disk
        return Speed.of(rates, str(dtype).removeprefix("torch."), stream)

    def _rehearse(
        self, networks: Mapping[str, nn.Module], call: Mapping[str, Any], device: torch.device
    ) -> tuple[dict[str, Rehearsed], dict[str, int]]:
        taken = inspect.signature(type(self).__call__).parameters
        arguments = {k: v for k, v in call.items() if k in taken and v is not None}
        if "num_inference_steps" in taken:
            arguments["num_inference_steps"] = 3 if "strength" in taken else 2
        if "prompt" in taken:
            arguments["prompt"] = [""] * int(call["batch_size"])
        arguments |= _pictures(taken, call)
        config = dict(getattr(self, "_progress_bar_config", {}))
        self.__dict__["_progress_bar_config"] = {"disable": True}
        self.__dict__["_rehearsing"] = True
        try:
            out: list[Any] = []

            def run() -> None:
                out.append(self(**arguments, output_type="pt", return_dict=False)[0])  # type: ignore[operator]

            needs = rehearse(networks, run, device, self.components.get("scheduler"))
        finally:
            self.__dict__["_progress_bar_config"] = config
            del self.__dict__["_rehearsing"]
        shape = tuple(getattr(out[0], "shape", ()))
        return needs, {"height": shape[-2], "width": shape[-1]} if len(shape) >= 4 else {}

    def _advice(self, call: Mapping[str, Any], device: torch.device, least: dict[str, int]) -> str:
        """The least budget for the qualities that were not asked for, and for a smaller picture."""
        if "near" not in least and self._variants("near")[1:]:
            with self._switched({"vae_tiling": True}):
                least["near"] = planner.least(self._parts(call, device, None)[0])
        text = ""
        if "near" in least and least["near"] < least.get("exact", 0):
            text = f"; with quality='near' (tiling) it is {size_text(least['near'])}"
        if call["height"] and call["width"]:
            half = {**call, "height": call["height"] // 32 * 16, "width": call["width"] // 32 * 16}
            try:
                smaller = planner.least(self._parts(half, device, None)[0])
            except ValueError:  # not a size that this family has
                return text
            text += f"; at {half['width']}x{half['height']} pixels it is {size_text(smaller)}"
        return text


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _notes(needs: Mapping[str, Rehearsed]) -> tuple[str, ...]:
    return tuple(
        f"{n}: not rehearsed ({r.failure}); its activations are a guess" for n, r in needs.items() if r.failure
    )


def _pictures(taken: Mapping[str, Any], call: Mapping[str, Any]) -> dict[str, Any]:
    """Blank pictures for the tasks that start from one."""
    from PIL import Image

    size = (int(call["width"] or 512), int(call["height"] or 512))
    names = [n for n in ("image", "mask_image", "control_image") if n in taken]
    if "image" not in names and "control_image" not in names:
        return {}
    return {n: Image.new("L" if n == "mask_image" else "RGB", size) for n in names}


def _asked(inputs: Mapping[str, Any]) -> dict[str, int]:
    """The size of a call, as far as its arguments say it."""
    asked = {n: int(inputs[n]) for n in ("height", "width", "num_frames") if inputs.get(n) is not None}
    prompt, embeds = inputs.get("prompt"), inputs.get("prompt_embeds")
    batch = len(prompt) if isinstance(prompt, (list, tuple)) else 1
    batch = int(embeds.shape[0]) if embeds is not None else batch
    asked["batch_size"] = int(inputs.get("batch_size") or batch) * int(inputs.get("num_images_per_prompt") or 1)
    return asked


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
        if home == "disk":  # pages that an earlier plan brought in
            mappings = Mappings()
            tensors = {id(s.tensor): s.tensor for g in part for s in g.slots}.values()
            give_back_pages([t for t in tensors if mappings.span(t) is not None])
    units = [Unit(rows[g.name], list(g.slots), list(g.triggers), device) for g in groups]
    if not any(row.travels for row in rows.values()) and device.type == "cpu":
        units = []
    engine.exclude, engine.give_back = frozenset(), False
    engine.set_units(units, {"kind": "plan"})
    engine.replace_files(files)
    engine.close_if_idle()
