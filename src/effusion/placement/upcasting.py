"""Computing in another dtype for a while: weights rest as they are, each is decoded for the time of its layer's call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from ..quant.codec import Codec
from .engine import Engine, engine_for, engine_of, neighbours
from .lender import is_rehearsed
from .transform import Transform
from .units import own_slots

Casts = dict[str, tuple[torch.dtype, torch.dtype]]
Codecs = dict[str, tuple[Codec, torch.dtype]]


@contextmanager
def computing_in(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Within it ``module`` computes in ``dtype``: a VAE that overflows in half precision, say.

    Nothing that rests is converted, so it goes with every policy; weights stay views of their file, and one layer at a
    time is there in ``dtype``.
    """
    if neighbours(module):  # parts of it are served by others
        with _converted(module, dtype):
            yield
        return
    engine = engine_for(module)
    if engine.hoisting is not None:
        engine.unhoist()
    before = {layer: (dict(t.casts), dict(t.codecs)) for layer, t in engine.transforms.items()}
    _decode_to(engine, dtype)
    _install(engine)
    try:
        yield
    finally:
        if engine_of(module) is engine:
            _restore(engine, before)
            _install(engine)
            engine.close_if_idle()


def _decode_to(engine: Engine, dtype: torch.dtype) -> None:
    for layer in engine.root.modules():
        for slot in own_slots(layer, ""):
            transform = engine.transforms.setdefault(layer, Transform(layer))
            rest = slot.tensor.dtype
            if slot.name in transform.codecs:
                transform.codecs[slot.name] = transform.codecs[slot.name][0], dtype
            elif rest.is_floating_point and rest != dtype:
                transform.casts[slot.name] = rest, dtype


def _restore(engine: Engine, before: Mapping[nn.Module, tuple[Casts, Codecs]]) -> None:
    for layer, transform in list(engine.transforms.items()):
        transform.casts, transform.codecs = before.get(layer, ({}, {}))
        if transform.idle:
            del engine.transforms[layer]


def _install(engine: Engine) -> None:
    if not is_rehearsed(engine.root):  # nothing is lent then, and something else stands in front of it
        engine.install()


@contextmanager
def _converted(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """``module`` with its weights converted, and back: what came from a smaller dtype is exactly representable in it."""
    before = next((p.dtype for p in module.parameters() if p.is_floating_point()), dtype)
    module.to(dtype=dtype)
    try:
        yield
    finally:
        module.to(dtype=before)
