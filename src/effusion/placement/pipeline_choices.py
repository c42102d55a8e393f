"""The ways in which one call of a pipeline can be run: as it is, hoisted, in smaller forms, in tiles and slices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from . import carrying, casting, machine, planner
from .expectation import Expectation, expect
from .forecast import Part, Speed
from .plan import STORED, size_text
from .rates import rates as rates_of
from .sources import Mappings

QUALITIES = ("exact", "near", "lossy")
FORMS = {
    "near": torch.bfloat16,
    "lossy": torch.float8_e4m3fn,
}  # that weights may rest in, of networks other than the VAE
HOW = {"near": "tiling, weights that rest in bfloat16", "lossy": "weights that rest in eight bits"}
Switches = dict[str, Any]


class Choices:
    """What there is to choose from for ``call`` of ``pipe``, whose networks compute on ``device``.

    Args:
        call: ``height``, ``width``, ``num_frames``, ``batch_size``, ``num_inference_steps``.
        folder: where weights that are views of no file may be written to.
        hoist: whether something may be left out of the loop.
    """

    def __init__(
        self, pipe: Any, networks: Mapping[str, nn.Module], call: Mapping[str, Any], device: torch.device,
        folder: str | None = None, hoist: bool = True,
    ) -> None:  # fmt: skip
        self.pipe, self.networks, self.call = pipe, networks, call
        self.device, self.folder, self.hoist = device, folder, hoist
        plan = pipe.__dict__.get("_plan")
        self._active: Mapping[str, Any] = plan.switches if plan is not None else {}  # a new plan undoes them
        self._expected: dict[tuple[str, ...], Expectation] = {}  # by the switches that were on

    # -- ways ----------------------------------------------------------------------------------------

    def ways(self, quality: str) -> Iterator[tuple[Switches, list[Part]]]:
        """The parts for each set of switches that ``quality`` admits, the simplest first."""
        fixed = {"offload_folder": self.folder} if self.folder else {}
        for tiles in self._tiles(quality):
            expected = self.expected(tiles)
            for storage in (None, *(FORMS[q] for q in QUALITIES[1 : QUALITIES.index(quality) + 1])):
                cast = self._castable(expected, storage)
                if storage is not None and not cast:
                    continue
                form = {"storage_dtype": str(storage).removeprefix("torch.")} if cast else {}
                yield {**fixed, **tiles, **form}, expected.parts(storage=cast)
                parts = expected.parts(hoisted=True, storage=cast) if self.hoist else []
                if hoisted := [part.name for part in parts if part.hoisted]:
                    yield {**fixed, **tiles, **form, "hoist": hoisted}, parts

    def _tiles(self, quality: str) -> list[Switches]:
        """None; where more than bits may change, a batch decoded in turn, and in tiles."""
        if quality == "exact":
            return [{}]
        vae = self.pipe.components.get("vae")
        slices = self._free(vae, "slicing") and int(self.call["batch_size"]) > 1
        tiles = self._free(vae, "tiling")
        found: list[Switches] = [{}, {"vae_slicing": True}] if slices else [{}]
        return found + [{**f, "vae_tiling": True} for f in found if tiles]

    def _free(self, vae: Any, name: str) -> bool:
        """Whether ``vae`` has a switch that nobody but a plan has switched on."""
        on = getattr(vae, f"use_{name}", False) and not self._active.get(f"vae_{name}")
        return hasattr(vae, f"enable_{name}") and not on

    def _castable(self, expected: Expectation, storage: torch.dtype | None) -> dict[str, torch.dtype]:
        """The networks that would become smaller, each with ``storage``."""
        if storage is None:
            return {}
        names = [n for n in expected.needs if n != "vae" and (expected.uncast or not _is_cast(self.networks[n]))]
        parts = expected.parts(storage=dict.fromkeys(names, storage))
        return {p.name: storage for p in parts if p.name in names and p.form != STORED}

    def expected(self, tiles: Switches) -> Expectation:
        """What the call needs with ``tiles`` on."""
        key = tuple(sorted(tiles))
        if key not in self._expected:
            mappings = Mappings() if self.folder is None else None
            uncast = any(carrying.is_cast(module) for module in self.networks.values())  # and will be no more
            switch(self.pipe.components, self._active, False)
            switch(self.pipe.components, tiles, True)
            try:
                self._expected[key] = expect(self.pipe, self.networks, self.call, self.device, mappings, uncast)
            finally:
                switch(self.pipe.components, tiles, False)
                switch(self.pipe.components, self._active, True)
        return self._expected[key]

    # -- about all of them -----------------------------------------------------------------------------

    @property
    def size(self) -> dict[str, int]:
        """The size of the call as it was rehearsed, where it was left open too."""
        return next((e.size for e in self._expected.values()), {})

    @property
    def notes(self) -> tuple[str, ...]:
        """What the forecast had to guess."""
        return tuple(dict.fromkeys(note for e in self._expected.values() for note in e.notes))

    @property
    def kernels(self) -> frozenset[Any]:
        """All that are compiled for the call on the CPU."""
        return frozenset(kernel for e in self._expected.values() for kernel in e.kernels)

    def least(self, quality: str) -> int:
        """The smallest budget that some way within ``quality`` keeps."""
        return min(planner.least(parts) for _, parts in self.ways(quality))

    def advice(self) -> str:
        """The least budget for each quality that gives something, and for a smaller picture."""
        least, text = self.least("exact"), ""
        if least < planner.least(self.expected({}).parts()):
            text = f"; with hoisting it is {size_text(least)}"
        for quality in QUALITIES[1:]:
            need = self.least(quality)
            if need < least:
                text += f"; with quality={quality!r} ({HOW[quality]}) it is {size_text(need)}"
                least = need
        return text + self._smaller()

    def _smaller(self) -> str:
        if not (self.call["height"] and self.call["width"]):
            return ""
        half = {n: self.call[n] // 32 * 16 for n in ("height", "width")}
        try:
            call = {**self.call, **half}
            need = Choices(self.pipe, self.networks, call, self.device, self.folder, self.hoist).least("exact")
        except ValueError:  # not a size that this family has
            return ""
        return f"; at {half['width']}x{half['height']} pixels it is {size_text(need)}"

    def speed(self, parts: Sequence[Part], memory: int, ram: int) -> Speed:
        """Rates for the dtype of the largest network; weights come out of the system's cache if that can hold them, or,
        on their way to an accelerator, out of ``ram`` if that does."""
        rates = rates_of(self.device)
        largest = max(self.networks.values(), key=lambda m: sum(p.nbytes for p in m.parameters()), default=None)
        dtype = casting.compute_dtype(largest) if largest is not None else None
        if dtype is None and largest is not None:
            dtype = next((p.dtype for p in largest.parameters()), None)
        room = machine.available_ram() - memory if self.device.type == "cpu" else ram
        cached = sum(p.nbytes for p in parts) < room
        return Speed.of(rates, str(dtype or torch.float32).removeprefix("torch."), cached)


def _is_cast(module: nn.Module) -> bool:
    return casting.compute_dtype(module) is not None


def switch(components: Mapping[str, Any], switches: Mapping[str, Any], on: bool) -> None:
    """Slicing and tiling as ``switches`` say, or not."""
    for name in ("slicing", "tiling"):
        if switches.get(f"vae_{name}"):
            getattr(components["vae"], f"{'enable' if on else 'disable'}_{name}")()
