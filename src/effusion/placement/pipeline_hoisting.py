"""Hoisting as a switch of pipelines."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from . import hoisting


class HoistingSwitches:
    """For pipelines whose loop can be foreseen."""

    def _networks(self) -> dict[str, nn.Module]:
        raise NotImplementedError

    def enable_hoisting(self) -> None:
        """Compute what depends on timestep and prompt alone before the loop, and leave its weights out of the loop.

        The pictures are the same, bit for bit. It goes with every policy: what is left out is not fetched, and what
        was resident on an accelerator rests in host memory. Kept for the next call with the same prompt and schedule.
        """
        self.__dict__["_hoists"] = True

    def disable_hoisting(self) -> None:
        """Undo :meth:`enable_hoisting`: all weights are where the policy has them."""
        self.__dict__["_hoists"] = False
        for module in self._networks().values():
            hoisting.unhoist(module)

    def _hoister(self) -> Callable[[Callable[[], Any]], Any] | None:
        """What the loop is shown to before it begins; ``None`` if nobody wants to know."""
        rehearsing: list[Any] | None = self.__dict__.get("_rehearsing")
        if rehearsing is not None:
            return rehearsing.append
        plan = self.__dict__.get("_plan")
        wanted = self.__dict__.get("_hoists", False) or (plan is not None and plan.switches.get("hoist", False))
        return partial(hoisting.foresee, self._networks()) if wanted else None
