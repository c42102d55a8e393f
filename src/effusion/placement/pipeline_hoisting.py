"""Hoisting as a switch of pipelines."""

from __future__ import annotations

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
