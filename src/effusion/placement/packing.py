"""Packed weights: they rest and travel as bytes, and are unpacked for the time of a layer's call."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..quant.codec import Codec
from .engine import engine_for, engine_of
from .transform import Transform


def unpack_in_calls(module: nn.Module, codecs: Mapping[str, tuple[Codec, torch.dtype]]) -> None:
    """Let the parameters of ``module`` named in ``codecs``, bytes as ``uint8``, be unpacked where they are used.

    They go with every way of offloading, and patches are added to what is unpacked.
    """
    engine = engine_for(module)
    engine.unhoist()
    for path, how in codecs.items():
        owner, _, leaf = path.rpartition(".")
        layer = module.get_submodule(owner)
        engine.transforms.setdefault(layer, Transform(layer)).codecs[leaf] = how
    engine.install()


def codec_of(module: nn.Module, path: str) -> Codec | None:
    """What unpacks the parameter ``path`` of ``module``; ``None`` if it rests as it is."""
    engine = engine_of(module)
    owner, _, leaf = path.rpartition(".")
    transform = engine.transforms.get(module.get_submodule(owner)) if engine is not None else None
    found = transform.codecs.get(leaf) if transform is not None else None
    return found[0] if found is not None else None


def compute_dtype(module: nn.Module) -> torch.dtype | None:
    """The dtype that packed weights of ``module`` are unpacked to; ``None`` if none rest packed."""
    engine = engine_of(module)
    transforms = engine.transforms.values() if engine is not None else ()
    return next((dtype for t in transforms for _, dtype in t.codecs.values()), None)


def unpack(module: nn.Module) -> None:
    """Unpack every weight of ``module`` for good, into the dtype that it computes in."""
    engine = engine_of(module)
    if engine is None:
        return
    engine.unhoist()
    done: dict[int, Tensor] = {}
    with torch.inference_mode(False), torch.no_grad():
        for layer, transform in list(engine.transforms.items()):
            for name, (codec, dtype) in transform.codecs.items():
                rest = layer._parameters[name]
                assert rest is not None
                if id(rest) not in done:  # tied weights stay one
                    done[id(rest)] = nn.Parameter(codec.decode(rest, dtype), requires_grad=False)
                layer._parameters[name] = done[id(rest)]  # type: ignore[assignment]
            transform.codecs = {}
            if transform.idle:
                del engine.transforms[layer]
    engine.rehome()
    engine.install()
    engine.close_if_idle()
