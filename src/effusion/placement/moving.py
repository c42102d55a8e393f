"""``to``, ``half`` and their like on modules that an engine serves: at any time, and nothing is lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from . import machine, policies
from .casting import recast
from .engine import engine_of


def to(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """``module.to(device, dtype, …)``. A device replaces the policy of ``module``: all of it is there from now on.

    A dtype changes what is computed with; weights that rest in a smaller form (layerwise casting) keep that.
    """
    device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
    if dtype is not None and not (dtype.is_floating_point or dtype.is_complex):
        raise ValueError(f"dtype={dtype}: weights are floating-point numbers")
    if device is not None:
        machine.check_device(device)
        policies.remove(module)
    with rearranging(module, dtype):
        nn.Module.to(module, *args, **kwargs)
    return module


@contextmanager
def rearranging(module: nn.Module, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Within it the resting weights of ``module`` may be moved, or converted to ``dtype``; the engine then carries on
    with these."""
    engine = engine_of(module)
    if engine is None:
        yield
        return
    engine.unhoist()
    try:
        yield
    finally:
        recast(engine, dtype)
        engine.rehome()
        engine.install()


def apply(module: nn.Module, super_apply: Callable[..., Any], fn: Callable[..., Any], *args: Any) -> Any:
    """``nn.Module._apply`` of a network: what ``half()``, ``cuda()`` and the rest do in the end."""
    engine = engine_of(module)
    with rearranging(module, _converts_to(fn) if engine is not None and engine.transforms else None):
        return super_apply(fn, *args)


def _converts_to(fn: Callable[..., Any]) -> torch.dtype | None:
    """The dtype that ``fn`` gives floating-point weights; ``None`` if it leaves them theirs."""
    with torch.inference_mode(False), torch.no_grad():
        found = [fn(torch.zeros(0, dtype=dtype)).dtype for dtype in (torch.float16, torch.float32)]
    return found[0] if found[0] == found[1] else None
