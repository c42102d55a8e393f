"""What a call of a pipeline will need, found by rehearsing it: the parts that plans are made of."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..core import log
from . import hoisting
from .asides import undrawn
from .extent import OF_THE_RUN, extent, prompts
from .forecast import Part, part_of
from .hoisting import Hoistable
from .rehearsal import Rehearsed, rehearse
from .sources import Mappings
from .workspaces import fresh

logger = log.get_logger(__name__)


@dataclass
class Expectation:
    """The networks of a pipeline, and what a call of one size needs of each.

    Attributes:
        networks: by name.
        needs: of the networks that the call runs, in that order.
        size: of the call as it was rehearsed, see :mod:`.extent`.
        steps: of the loop.
        device: where it computes.
        mappings: the mapped files of this process; ``None`` where weights that are views of none may move all the same.
        uncast: casts that are there now will have been undone.
        loop: makes the calls of the loop with latents that have no values; ``None`` if it was not met.
    """

    networks: Mapping[str, nn.Module]
    needs: dict[str, Rehearsed]
    size: dict[str, int]
    steps: int
    device: torch.device
    mappings: Mappings | None = None
    uncast: bool = False
    loop: Callable[[], Any] | None = None
    _found: dict[str, Hoistable] | None = field(default=None, repr=False)

    def parts(self, hoisted: bool = False, storage: Mapping[str, torch.dtype] | None = None) -> list[Part]:
        """The networks as the planner sees them, in the order that they run in.

        Args:
            hoisted: what can be hoisted is left out of the loop.
            storage: the smaller dtypes that networks rest in, by name.
        """
        left_out = self.hoistable() if hoisted else {}
        order = [*self.needs, *(n for n in self.networks if n not in self.needs)]
        parts, kernels = [], set[Any]()
        for name in order:
            needs = self.needs.get(name) or Rehearsed()
            kernels |= fresh(needs.kernels)  # those of earlier stages stay
            out, dtype = left_out.get(name), (storage or {}).get(name)
            more = (self.mappings, len(kernels), out, dtype, self.uncast)
            parts.append(part_of(name, self.networks[name], needs, self.steps, self.device, *more))
        return parts

    def hoistable(self) -> dict[str, Hoistable]:
        """What can be left out of the loop, for the networks of which anything can."""
        if self._found is None:
            self._found = dict(self._foreseen())
        return self._found

    def _foreseen(self) -> Mapping[str, Hoistable]:
        if self.loop is None:
            return {}
        found = {}
        try:
            with torch.no_grad(), undrawn(self.networks.values()):
                outlines = {name: needs.outline for name, needs in self.needs.items()}
                calls = hoisting.collect(self.networks, self.loop, outlines=outlines)
            for name, made in calls.items():
                known = hoisting.hoistable(self.networks[name], made, self.needs[name].passes(self.steps))
                if known.weights:
                    found[name] = known
        except Exception as error:  # code of the loop that looks at latents: it is planned without
            logger.info("the plan hoists nothing: %s: %s", type(error).__name__, error)
        return found

    @property
    def kernels(self) -> frozenset[Any]:
        """All that are compiled for the call on the CPU."""
        return frozenset(kernel for needs in self.needs.values() for kernel in needs.kernels)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the forecast had to guess."""
        failed = {n: r.failure for n, r in self.needs.items() if r.failure}
        return tuple(f"{n}: not rehearsed ({why}); its activations are a guess" for n, why in failed.items())


class Rehearsing:
    """What is found out about a call while it is rehearsed: its size, and its loop."""

    def __init__(self) -> None:
        self.loops: list[Callable[[], Any]] = []
        self.size: dict[str, int] = {}

    def meets(self, state: Any) -> None:
        """A block begins with ``state``."""
        for name, value in extent(state).items():
            self.size[name] = max(value, self.size.get(name, 0))


def expect(
    pipe: Any,
    networks: Mapping[str, nn.Module],
    call: Mapping[str, Any],
    device: torch.device,
    mappings: Mappings | None = None,
    uncast: bool = False,
) -> Expectation:
    """Rehearse ``call`` (``height``, ``width``, …, with ``None`` for what is left open) of ``pipe``."""
    arguments = _arguments(pipe, inspect.signature(type(pipe).__call__).parameters, call)
    found = Rehearsing()
    out: list[Any] = []

    def run() -> None:
        out.append(pipe(**arguments, output_type="pt", return_dict=False)[0])

    with _undisturbed(pipe):
        pipe.__dict__["_progress_bar_config"] = {"disable": True}
        pipe.__dict__["_rehearsing"] = found
        needs = rehearse(networks, run, device, pipe.components.get("scheduler"))
    found.size.pop("num_inference_steps", None)  # the rehearsal's own few
    shape = tuple(getattr(out[0], "shape", ()))
    size = {**({"height": shape[-2], "width": shape[-1]} if len(shape) >= 4 else {}), **found.size}
    steps, loop = int(call["num_inference_steps"]), found.loops[0] if found.loops else None
    return Expectation(networks, needs, size, steps, device, mappings, uncast, loop)


def _arguments(pipe: Any, taken: Mapping[str, Any], call: Mapping[str, Any]) -> dict[str, Any]:
    """What to rehearse ``call`` with: few steps, a prompt and pictures where it leaves them open."""
    left = OF_THE_RUN - {"strength"}
    arguments = {k: v for k, v in call.items() if k in taken and k not in left and v is not None}
    if "num_inference_steps" in taken:  # so many that two are left
        strength = call.get("strength") or getattr(taken.get("strength"), "default", None) or 1.0
        arguments["num_inference_steps"] = math.ceil(2 / strength) if 0 < strength <= 1 else 2
    batch = int(call["batch_size"])
    if "prompt" in taken and not {"prompt", "prompt_embeds"} & set(arguments):
        arguments["prompt"] = [""] * batch
        arguments.pop("num_images_per_prompt", None)  # counted with the batch
    elif "num_images_per_prompt" in taken:
        arguments["num_images_per_prompt"] = -(-batch // prompts(arguments))
    return {**_pictures(pipe, taken, call), **arguments}


@contextmanager
def _undisturbed(pipe: Any) -> Iterator[None]:
    """Within it ``pipe`` may be called: its scheduler, and what it knows of the call that it is in, stay what they were."""
    kept = {name: value for name, value in vars(pipe).items() if name.startswith("_") and name != "_pending"}
    scheduler = {"scheduler": vars(pipe)["scheduler"]} if "scheduler" in vars(pipe) else {}
    vars(pipe).update(copy.deepcopy(scheduler))
    try:
        yield
    finally:
        for name in [n for n in vars(pipe) if n.startswith("_") and n != "_pending" and n not in kept]:
            del vars(pipe)[name]
        vars(pipe).update(kept, **scheduler)


def _pictures(pipe: Any, taken: Mapping[str, Any], call: Mapping[str, Any]) -> dict[str, Any]:
    """Blank pictures for the tasks that start from one; several control networks look at one each."""
    from PIL import Image

    size = (int(call["width"] or 512), int(call["height"] or 512))
    names = [n for n in ("image", "mask_image", "control_image", "control_mask") if n in taken]
    if "image" not in names and "control_image" not in names:
        return {}
    found: dict[str, Any] = {n: Image.new("L" if "mask" in n else "RGB", size) for n in names}
    nets = getattr(pipe.components.get("controlnet"), "nets", None)
    if nets is not None:
        control = "control_image" if "control_image" in names else "image"
        found[control] = [found[control]] * len(nets)
    return found
