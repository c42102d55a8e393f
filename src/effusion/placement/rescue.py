"""The safety net under a plan: when memory runs out all the same, the work is done again with a leaner plan.

A step of the loop (or another block of a run) changes little: fields of the state, the scheduler's memory, the state
of generators. That is noted before it begins. When the device has no memory for it, it is put back, less is kept on
the device, and the same step begins again; as weights that travel give the bits of weights that stay, the picture is
the one that it would have been.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn

from ..core import log
from ..core.errors import BudgetError, PlanConflict
from . import homes
from .exhausted import is_out_of_memory
from .lane import version
from .plan import Plan, Row
from .units import by_block, by_leaf

logger = log.get_logger(__name__)
Result = TypeVar("Result")
_CONTAINERS = (list, dict, set)


class Kept:
    """What objects and generators were at one moment: attributes, and the containers among them, not tensors' values."""

    def __init__(self, objects: tuple[Any, ...], device: torch.device) -> None:
        generators = [g for o in objects for g in (o if isinstance(o, (list, tuple)) else [o])]
        self._generators = [(g, g.get_state()) for g in generators if isinstance(g, torch.Generator)]
        self._objects = [
            (o, {k: v.copy() if type(v) in _CONTAINERS else v for k, v in vars(o).items()})
            for o in objects
            if hasattr(o, "__dict__") and not isinstance(o, torch.Generator)
        ]
        self._tensors = [(t, version(t)) for _, seen in self._objects for t in seen.values() if torch.is_tensor(t)]
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        self._device = device

    def restore(self) -> bool:
        """Put everything back; ``False`` if tensors were written to meanwhile, so that it can't be."""
        if any(version(t) != v for t, v in self._tensors):
            return False
        for generator, state in self._generators:
            generator.set_state(state)
        for target, seen in self._objects:
            vars(target).clear()
            vars(target).update({k: v.copy() if type(v) in _CONTAINERS else v for k, v in seen.items()})
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)
        return True


class Rescue:
    """Does the work of a run, again with leaner plans when memory runs out.

    Args:
        networks: the components by name.
        plan: the plan in force.
        apply: carries another one out.
        told: is told what happened.
    """

    def __init__(
        self,
        networks: Mapping[str, nn.Module],
        plan: Plan,
        apply: Callable[[Plan], Any],
        told: Callable[[str], Any] = lambda text: None,
    ) -> None:
        self._networks, self._apply, self._told = networks, apply, told
        self.renew(plan)

    def renew(self, plan: Plan) -> None:
        """Another plan is in force: leaner ones are made of that."""
        self.plan, self._leaner = plan, leaner(self._networks, plan)
        self._device = torch.device(plan.rows[0].device if plan.rows else "cpu")

    def __call__(self, what: str, work: Callable[[], Result], *objects: Any) -> Result:
        """``work()``, named ``what``, which changes nothing but ``objects`` and generators.

        Raises:
            torch.OutOfMemoryError, MemoryError, BudgetError, …: it does not fit with the leanest plan either.
        """
        kept = Kept(objects, self._device)
        while True:
            try:
                return work()
            except Exception as error:
                if not (isinstance(error, BudgetError) or is_out_of_memory(error)):
                    raise
                step = next(self._leaner, None) if kept.restore() else None
                if step is None:
                    raise
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            # outside of the handler: the frames of the failed call, and what they hold, are gone
            self._lean(what, reason, *step)

    def _lean(self, what: str, reason: str, plan: Plan, how: str) -> None:
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        text = f"memory ran out in {what} ({reason}); it begins again with a leaner plan: {how}"
        logger.warning("%s", text)
        self._told(text)
        self.plan = plan.replace(notes=(*self.plan.notes, text))
        self._apply(self.plan)


def leaner(networks: Mapping[str, nn.Module], plan: Plan) -> Iterator[tuple[Plan, str]]:
    """Plans that need less and less memory and give the same bits, each with what it does in words.

    Components take turns instead of staying; fewer and fewer blocks stay; nothing travels ahead; layers travel one by
    one. Where quality need not be exact, the VAE decodes a batch picture by picture at last.
    """
    tried = [plan.rows]

    def step(rows: tuple[Row, ...], how: str) -> Iterator[tuple[Plan, str]]:
        if rows != tried[-1]:
            tried.append(rows)
            yield plan.replace(rows=rows), how

    if "together" in plan.switches:
        plan = plan.replace(switches={n: v for n, v in plan.switches.items() if n != "together"})
        yield plan, "components that alternate take turns on the device"
    travels = tuple(_travelling(networks, plan))
    yield from step(travels, "components take turns on the device")
    part = 2
    while any(row.keep for row in tried[-1]):
        kept = [row for row in travels if row.keep]
        stay = {row.unit for row in kept[::part]} if len(kept) >= part else set()
        part *= 2
        text = f"{len(stay)} of {len(kept)} blocks stay" if stay else "no block stays"
        yield from step(tuple(replace(r, keep=r.keep and r.unit in stay) for r in travels), text)
    yield from step(tuple(replace(r, ahead=0) for r in tried[-1]), "nothing is fetched ahead")
    yield from step(tuple(_leaves(networks, tried[-1])), "layers travel one by one")
    slices = hasattr(networks.get("vae"), "enable_slicing") and not plan.switches.get("vae_slicing")
    if slices and plan.quality != "exact":  # a product of one row may round differently than one of several
        switches = {**plan.switches, "vae_slicing": True}
        yield plan.replace(rows=tried[-1], switches=switches), "pictures are decoded one by one"


def _travelling(networks: Mapping[str, nn.Module], plan: Plan) -> Iterator[Row]:
    """Rows in blocks for everything that can travel; what is kept stays until another component needs the room."""
    for name in dict.fromkeys(row.component for row in plan.rows):
        rows = plan.of(name)
        device = rows[0].device
        home = "disk" if torch.device(device).type == "cpu" else "host"
        if rows[0].home == "device" and home == "disk" and plan.switches.get("offload_folder") is None:
            try:
                homes.to_disk(by_block(networks[name]), None, name)
            except PlanConflict:  # views of no file: they can't leave
                yield from rows
                continue
        for row in rows:
            yield replace(row, home=home, keep=True) if row.home == "device" else row


def _leaves(networks: Mapping[str, nn.Module], rows: tuple[Row, ...]) -> Iterator[Row]:
    for name in dict.fromkeys(row.component for row in rows):
        same = [row for row in rows if row.component == name]
        if same[0].home == "device":
            yield from same
            continue
        for group in by_leaf(networks[name]):
            yield replace(same[0], unit=f"{name}/{group.name}", nbytes=homes.nbytes_of(group.slots), keep=False)
