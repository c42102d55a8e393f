"""Copies and pickles of networks whose weights rest in another form: what decodes them comes along.

Nothing else does: where the weights of a copy are, there they stay, and nobody serves it by units of a plan.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from . import lender as lending
from .transform import Transform
from .units import peeking_owners

if TYPE_CHECKING:
    from .engine import Engine

Decoded = tuple[nn.Module, nn.Module, dict[str, Any], dict[str, Any]]  # layer, who reads its weights, casts, codecs


def twin(engine: Engine, memo: dict[int, Any]) -> Engine | None:
    """An engine that decodes for the copy of the component that ``copy.deepcopy`` is making; ``None`` if none need be."""
    root, decoded = memo.get(id(engine.root)), _decoded(engine)
    if root is None or not decoded:
        return None

    def ours(layer: nn.Module) -> nn.Module:
        return copy.deepcopy(layer, memo)

    rows = [(ours(layer), ours(reader), dict(casts), dict(codecs)) for layer, reader, casts, codecs in decoded]
    made = rebuilt(type(engine), root, engine.name, rows)
    made.originals = {(ours(layer), name): original for (layer, name), original in engine.originals.items()}
    made.planned = engine.planned
    return made


def reduced(engine: Engine) -> tuple[Any, ...]:
    """What a pickle of the component keeps of ``engine``."""
    decoded = _decoded(engine)
    return (rebuilt, (type(engine), engine.root, engine.name, decoded)) if decoded else (type(None), ())


def rebuilt(cls: type[Engine], root: nn.Module, name: str, decoded: Sequence[Decoded]) -> Engine:
    """An engine of ``root``, which may not have all of its attributes yet, that decodes weights of layers in it."""
    made = cls(root)
    made.name = name
    lenders: dict[nn.Module, lending.Lender] = {}
    for layer, reader, casts, codecs in decoded:
        transform = made.transforms[layer] = Transform(layer)
        transform.casts, transform.codecs = casts, codecs
        for place in {layer, reader}:
            if place not in lenders:
                lenders[place] = lending.Lender(made, place, place._call_impl)
            lenders[place].transforms.append(transform)
    made.stand(lenders)
    return made


def _decoded(engine: Engine) -> list[Decoded]:
    found: Mapping[nn.Module, Transform] = {m: t for m, t in engine.transforms.items() if t.casts or t.codecs}
    readers = peeking_owners(engine.root) if found else {}
    return [(m, readers.get(id(m), ("", m))[1], t.casts, t.codecs) for m, t in found.items()]
