"""The table of a network whose modules were hoisted: it answers instead of them in the calls that it knows."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import homes
from .calls import Call, Keys, Opaque, Path, unknown_paths
from .engine import Engine
from .lane import version
from .lender import MISS
from .unit import Unit
from .units import Slot
from .watch import Answer, Node, acting_hooks, form_of


class Hoisting:
    """The table of one network: what its hoisted modules give in each call that was foreseen."""

    def __init__(self, engine: Engine, nodes: Sequence[Node], used: Sequence[Slot]) -> None:
        self.engine = engine
        self.names = tuple(n.path for n in nodes)
        self.modules = [n.module for n in nodes]
        self.slots = [s for n in nodes for s in n.slots]
        self.weights = sum(n.nbytes for n in nodes)
        self.units_before: list[Unit] = []
        self.moved: list[tuple[list[Tensor], torch.device]] = []
        self.keys = Keys()
        self._run = threading.local()
        self.renew(nodes, used, {}, frozenset())

    def renew(
        self, nodes: Sequence[Node], used: Sequence[Slot], places: Mapping[Any, Any], unknown: frozenset[Path]
    ) -> None:
        """Take over the answers in ``nodes``, the same modules as before, for the calls ``places``."""
        self._answers: dict[int, list[list[Answer]]] = {id(n.module): n.answers for n in nodes}
        self.table = sum(n.held for n in nodes)
        self.places, self.unknown = dict(places), unknown
        self.used = list(used)
        self._processors = [m for m in self.engine.root.modules() if hasattr(m, "processor")]
        self._state, self._weights = self._now(), self._contents()

    def knows(self, calls: Sequence[Call]) -> bool:
        """Whether the table answers all of ``calls``; only if weights and all else are what they were."""
        if unknown_paths(calls) - self.unknown or self._state != self._now() or self._weights != self._contents():
            return False
        return all(self.keys.of(call, self.unknown) in self.places for call in calls)

    # -- in the loop -------------------------------------------------------------------------------

    def begin(self, args: Any, kwargs: Any) -> Any:
        """A call of the network begins: find it in the table."""
        run, before = self._run, getattr(self._run, "at", None)
        run.at = None
        if not torch.is_grad_enabled() and self._state == self._now():
            try:
                place = self.places.get(self.keys.of((args, kwargs), self.unknown))
            except Opaque:
                place = None
            run.at = (*place, {}) if place is not None else None
        return before

    def end(self, before: Any) -> None:
        """The call is over."""
        self._run.at = before

    def answer(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """What ``module`` gives in this call, or :data:`~.lender.MISS`."""
        at = getattr(self._run, "at", None)
        answers = self._answers.get(id(module)) if at is not None else None
        if at is None or answers is None:
            return MISS
        form, index, counts = at
        turn = counts[id(module)] = counts.get(id(module), -1) + 1
        if turn >= len(answers[form]) or answers[form][turn].form != form_of(args, kwargs):
            return MISS
        return answers[form][turn].of(index)

    # -- what the table was made with ----------------------------------------------------------------

    def _now(self) -> tuple[Any, ...]:
        """What else the answers depend on: cheap, asked in every call."""
        root, patches = self.engine.root, self.engine.patches
        kind = root.__dict__.get("training"), torch.get_num_threads(), torch.get_float32_matmul_precision()
        modes = torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")
        dtypes = torch.get_autocast_dtype("cpu"), torch.get_autocast_dtype("cuda")
        deltas = tuple((name, id(patch), patch.scale) for name, patch in patches.items())
        weights = tuple((id(t), version(t)) for t in (s.store.get(s.name) for s in self.slots) if t is not None)
        return kind, modes, dtypes, deltas, weights, tuple(id(m.processor) for m in self._processors)

    def _contents(self) -> tuple[Any, ...]:
        """A sample of the weights, and code that was put in place of the modules': asked once per run."""
        forwards = tuple(id(m.__dict__.get("forward")) for m in self.engine.root.modules())
        hooks = sum(len(m._forward_hooks) + len(acting_hooks(m)) for m in self.engine.root.modules())
        tensors = [s.tensor for s in self.used]
        return forwards, hooks, tuple((id(t), version(t), _sample(t)) for t in tensors)

    def restore(self) -> None:
        """Bring what was moved off the compute device back there."""
        for same, device in self.moved:
            homes.set_data(same, same[0].detach().to(device))


def _sample(tensor: Tensor) -> Any:
    """A few values: weights that were written to behind everyone's back differ in them."""
    flat = tensor.detach().as_strided((tensor.numel(),), (1,), tensor.storage_offset())
    return tuple(flat[:: max(1, tensor.numel() // 8)].tolist())
