"""Where lenders stand: before the modules that need a unit or a transform, outside of whatever is compiled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

from torch import nn

from . import lender as lending
from .lender import Lender
from .transform import Transform
from .unit import Unit
from .units import is_called, peeking_owners

if TYPE_CHECKING:
    from .engine import Engine
    from .table import Hoisting


class Standing:
    """For the engine: its lenders."""

    units: list[Unit]
    transforms: dict[nn.Module, Transform]
    hoisting: Hoisting | None
    exclude: frozenset[str]
    give_back: bool
    always_travel: bool
    _hooked: list[nn.Module]

    @property
    def root(self) -> nn.Module:
        raise NotImplementedError

    def _measure(self) -> None:
        raise NotImplementedError

    def install(self) -> None:
        """Put lenders in front of the modules that need one."""
        self.uninstall()
        lenders: dict[nn.Module, Lender] = {}
        above = _above(self.root)

        def lender_for(module: nn.Module) -> Lender:
            top = self._outermost_compiled(module, above)
            if top not in lenders:
                run = lending.compiled_call(top)
                lenders[top] = Lender(cast("Engine", self), top, run if run is not None else top._call_impl)
            return lenders[top]

        for unit in self.units:
            if not self._must_travel(unit):
                continue
            for trigger in unit.triggers:
                lender = lender_for(trigger)
                if unit not in lender.units:
                    lender.units.append(unit)
                if unit.device.type != "cpu":
                    lender.device, lender.exclude = unit.device, self.exclude
        peeked = peeking_owners(self.root) if self.transforms else {}
        for module, transform in self.transforms.items():
            if transform.idle:
                continue
            for place in {module, peeked.get(id(module), ("", module))[1]}:
                if transform not in lender_for(place).transforms:
                    lender_for(place).transforms.append(transform)
        if self.hoisting is not None:
            for module in (self.root, *self.hoisting.modules):
                lender_for(module)
        if self.give_back and self.root not in lenders and lenders:
            lender_for(self.root)
        for module, lender in lenders.items():
            lender.give_back = self.give_back and module is self.root
        self.stand(lenders)
        self._guard_compile(lenders, above)
        self._measure()

    def stand(self, lenders: Mapping[nn.Module, Lender]) -> None:
        """Put ``lenders`` before their modules."""
        for lender in lenders.values():
            lending.install(lender)
        self._hooked = list(lenders)

    def _must_travel(self, unit: Unit) -> bool:
        return unit.row.travels or self.always_travel or (unit.row.home == "device" and unit.device.type != "cpu")

    def _outermost_compiled(self, module: nn.Module, above: dict[nn.Module, nn.Module]) -> nn.Module:
        top, at = module, module
        while True:
            if lending.compiled_call(at) is not None or lending.has_compiled_forward(at):
                top = at
            if at not in above:
                return top
            at = above[at]

    def inside_compiled(self) -> set[int]:
        """The ids of modules that nothing can stand before: they are compiled as a part of another one."""
        return {
            id(inner)
            for module in self.root.modules()
            if lending.compiled_call(module) is not None or lending.has_compiled_forward(module)
            for inner in module.modules()
            if inner is not module
        }

    def _guard_compile(self, lenders: dict[nn.Module, Lender], above: dict[nn.Module, nn.Module]) -> None:
        guarded: dict[nn.Module, None] = {}
        for module in lenders:
            at: nn.Module | None = module
            while at is not None and at not in guarded:
                guarded[at] = None
                at = above.get(at)
        for module in guarded:
            if "compile" not in module.__dict__ and is_called(module):
                module.__dict__["compile"] = lending.CompileLater(cast("Engine", self), module)
        self._hooked = list({**dict.fromkeys(lenders), **guarded})

    def uninstall(self) -> None:
        for module in self._hooked:
            lending.uninstall(module)
        self._hooked = []


def _above(root: nn.Module) -> dict[nn.Module, nn.Module]:
    return {child: module for module in root.modules() for child in module.children()}
