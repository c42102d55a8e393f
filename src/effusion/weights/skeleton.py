"""Building a network without its weights: the parameters stay on ``meta``, everything else is real."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..core.errors import CheckpointError

_TABLE, _SIDE = 1 << 30, 1 << 24  # numbers in a table, and on a side of it
# by name: transformers puts functions of its own in the place of those of nn.init
_FILLS = {"zero_", "fill_", "erfinv_", "clamp_", "mul_", "add_", "copy_"}
_FILLS |= {name for name in dir(nn.init) if name.endswith("_") and not name.startswith("_")}


class Skeleton(TorchFunctionMode):
    """Context in which layers get ``meta`` parameters and no initialisation.

    Layers allocate what they are going to fill with ``torch.empty``, and only that goes to ``meta``. What a
    constructor *computes* (rotary tables, position indices, and other buffers that no checkpoint
    carries) comes from other functions and is computed for real, so that it is right afterwards.

    Raises:
        CheckpointError: more layers than ``limit``, or a table larger than any network has: a configuration
            is a stranger's, and building must end.
    """

    def __init__(self, limit: int = 100_000) -> None:
        super().__init__()
        self.limit, self.made = limit, 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.get("device") is None:
            self.made += 1
            if self.made > self.limit:
                raise CheckpointError(f"its configuration describes more than {self.limit} tensors")
            return func(*args, **{**kwargs, "device": "meta"})
        if getattr(func, "__name__", "") in _FILLS:
            target = args[0] if args else kwargs.get("tensor")
            if isinstance(target, Tensor) and target.is_meta:
                return target
        if func is torch.arange and any(isinstance(n, (int, float)) and n > _SIDE for n in args):
            raise CheckpointError(f"its configuration describes a table with a side of {max(args)}")
        made = func(*args, **kwargs)
        if isinstance(made, Tensor) and not made.is_meta and made.numel() > _TABLE:
            raise CheckpointError(f"its configuration describes a table of {list(made.shape)} numbers")
        return made
