"""Building a network without its weights: the parameters stay on ``meta``, everything else is real."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_FILLS = {
    getattr(Tensor, name)
    for name in ("uniform_", "normal_", "zero_", "fill_", "erfinv_", "trunc_normal_", "clamp_", "mul_", "add_", "copy_")
    if hasattr(Tensor, name)
}
_INITS = {getattr(nn.init, name) for name in dir(nn.init) if name.endswith("_") and not name.startswith("_")}


class Skeleton(TorchFunctionMode):
    """Context in which layers get ``meta`` parameters and no initialisation.

    Layers allocate what they are going to fill with ``torch.empty``, and only that goes to ``meta``. What a
    constructor *computes* (rotary tables, position indices, and other buffers that no checkpoint
    carries) comes from other functions and is computed for real, so that it is right afterwards.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.get("device") is None:
            return func(*args, **{**kwargs, "device": "meta"})
        if func in _FILLS or func in _INITS:
            target = args[0] if args else kwargs.get("tensor")
            if isinstance(target, Tensor) and target.is_meta:
                return target
        return func(*args, **kwargs)
