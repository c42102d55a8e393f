"""``plan``, ``apply`` and ``fit`` of a pipeline: a budget in, rows and a prediction out."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from ..core import log
from ..core.errors import PlanConflict
from . import homes, machine, planner, policies
from .casting import compute_dtype
from .engine import Unit, engine_for, engine_of
from .plan import STORED, Plan, parse_size
from .rehearsal import Rehearsed, rehearse
from .units import Group, by_block, by_leaf

logger = log.get_logger(__name__)
Self = TypeVar("Self", bound="PlanSwitches")
QUALITIES = ("exact", "near", "lossy")
_ORDER = ("text", "image_encoder", "prior", "unet", "transformer", "vae", "safety")


class PlanSwitches:
    """For pipelines: classes with ``components`` that can be called with a prompt and a size."""

    @property
    def components(self) -> dict[str, Any]:
        raise NotImplementedError

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

        Raises:
            BudgetError: no plan fits; says the least that would.
            ValueError: no size, an unknown quality or device.
        """
        if quality not in QUALITIES:
            raise ValueError(f"quality={quality!r}: it is one of {QUALITIES}")
        where = machine.default_device(device=device)
        budget = parse_size(memory) if memory is not None else machine.free_device_memory(where) * 9 // 10
        host = parse_size(ram, "ram") if ram is not None else machine.available_ram() * 9 // 10
        networks = {n: c for n, c in self.components.items() if isinstance(c, nn.Module)}
        call = {"height": height, "width": width, "num_frames": num_frames, "num_inference_steps": num_inference_steps}
        rates = machine.rates(where)
        speed = planner.Speed(
            max(rates.matmul.values()) / 2, rates.disk if where.type == "cpu" else rates.host_to_device
        )
        tiling: dict[str, Any] = {}
        while True:
            needs = self._rehearse(networks, call, batch_size, where)
            parts = [_part(n, networks[n], needs.get(n), num_inference_steps) for n in _sorted(networks)]
            try:
                made = planner.plan(parts, budget, host, str(where), speed, quality)
                break
            except ValueError:  # BudgetError: decoding in tiles may help, where that is allowed
                vae = networks.get("vae")
                if (
                    quality == "exact"
                    or tiling
                    or not hasattr(vae, "enable_tiling")
                    or getattr(vae, "use_tiling", False)
                ):
                    raise
                tiling = {"vae_tiling": True}
                vae.enable_tiling()  # type: ignore[union-attr, operator]
        if tiling:
            networks["vae"].disable_tiling()  # type: ignore[operator]
        notes = [
            f"{n}: not rehearsed ({r.failure}); its activations are a guess" for n, r in needs.items() if r.failure
        ]
        folder = {"offload_folder": offload_folder} if offload_folder else {}
        return made.replace(switches={**tiling, **folder}, notes=tuple(notes))

    def apply(self: Self, plan: Plan) -> Self:
        """Carry out ``plan``, instead of whatever policy there was.

        Raises:
            PlanConflict: it is for other components, or weights of the disk are in no file.
        """
        networks = {n: c for n, c in self.components.items() if isinstance(c, nn.Module)}
        unknown = sorted({row.component for row in plan.rows} - set(networks))
        if unknown:
            raise PlanConflict(f"the plan has rows for {unknown}; this pipeline's networks are {sorted(networks)}")
        for name in networks:
            if plan.of(name):
                _carry_out(name, networks[name], plan)
        if plan.switches.get("vae_tiling"):
            networks["vae"].enable_tiling()  # type: ignore[operator]
        return self

    def fit(self, memory: int | float | str | None = None, **options: Any) -> Plan:
        """:meth:`plan` and :meth:`apply`; returns the plan, to print."""
        made = self.plan(memory, **options)
        self.apply(made)
        return made

    def _rehearse(
        self, networks: Mapping[str, nn.Module], call: Mapping[str, Any], batch: int, device: torch.device
    ) -> dict[str, Rehearsed]:
        taken = inspect.signature(type(self).__call__).parameters
        arguments: dict[str, Any] = {k: v for k, v in call.items() if k in taken and v is not None}
        if "num_inference_steps" in taken:
            arguments["num_inference_steps"] = 2
        if "prompt" in taken:
            arguments["prompt"] = [""] * batch
        elif "batch_size" in taken:
            arguments["batch_size"] = batch
        config = dict(getattr(self, "_progress_bar_config", {}))
        self.__dict__["_progress_bar_config"] = {"disable": True}
        try:
            return rehearse(networks, lambda: self(**arguments, output_type="pt"), device)  # type: ignore[operator]
        finally:
            self.__dict__["_progress_bar_config"] = config


def _sorted(networks: Mapping[str, nn.Module]) -> list[str]:
    """Components in the order that stages run in."""

    def place(name: str) -> int:
        return next((i for i, part in enumerate(_ORDER) if name.startswith(part)), len(_ORDER) - 2)

    return sorted(networks, key=place)


def _part(name: str, module: nn.Module, needs: Rehearsed | None, steps: int) -> planner.Part:
    needs = needs or Rehearsed()
    compute = compute_dtype(module)
    engine = engine_of(module)
    cast = {id(t.module): t for t in engine.transforms.values() if t.casts} if engine is not None else {}
    leaves = by_leaf(module)
    decoded = 0
    if compute is not None:
        for group in leaves:
            if any(id(s.module) in cast for s in group.slots):
                decoded = max(decoded, sum(s.tensor.numel() * compute.itemsize for s in group.slots))
    passes = needs.calls if needs.calls < 2 else steps * needs.calls // 2
    stored = next((str(s).removeprefix("torch.") for t in cast.values() for s, _ in t.casts.values()), STORED)
    return planner.Part(
        name,
        _sizes(by_block(module)),
        _sizes(leaves),
        needs.activations,
        needs.flops * passes,
        max(passes, 1),
        stored,
        str(compute).removeprefix("torch.") if compute is not None else None,
        decoded,
    )


def _sizes(groups: list[Group]) -> tuple[tuple[str, int], ...]:
    seen: set[int] = set()
    out = []
    for group in groups:
        fresh = [s for s in group.slots if id(s.tensor) not in seen]
        seen |= {id(s.tensor) for s in fresh}
        out.append((group.name, homes.nbytes_of(fresh)))
    return tuple(out)


def _carry_out(name: str, module: nn.Module, plan: Plan) -> None:
    rows = {row.unit.partition("/")[2]: row for row in plan.of(name)}
    groups = next((g for g in (by_block(module), by_leaf(module)) if {x.name for x in g} == set(rows)), None)
    if groups is None:
        raise PlanConflict(f"the plan's units of {name!r} are not those of this {type(module).__name__}; plan again")
    policies.check_free(module)
    engine = engine_for(module, name)
    engine.settle()
    device = machine.check_device(next(iter(rows.values())).device)
    files = []
    for home in dict.fromkeys(row.home for row in rows.values()):
        part = [g for g in groups if rows[g.name].home == home]
        slots = [s for g in part for s in g.slots]
        if home == "device":
            homes.to_device(slots, device)
        else:
            files += policies.go_home(engine, part, home, plan.switches.get("offload_folder"))
    units = [Unit(rows[g.name], list(g.slots), list(g.triggers), device) for g in groups]
    if not any(row.travels for row in rows.values()) and device.type == "cpu":
        units = []
    engine.exclude, engine.give_back = frozenset(), False
    engine.set_units(units, {"kind": "plan"})
    engine.replace_files(files)
    engine.close_if_idle()
