"""Building a network without its weights: the parameters stay on ``meta``, everything else is real."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ..core.errors import CheckpointError

MOST_TENSORS, MOST_BYTES = 50_000, 400 << 20  # the positions of Stable Diffusion 3.5 are 340 MB
# by name: transformers puts functions of its own in the place of those of nn.init
_FILLS = {"zero_", "fill_", "erfinv_", "clamp_", "mul_", "add_", "copy_"}
_FILLS |= {name for name in dir(nn.init) if name.endswith("_") and not name.startswith("_")}


class Skeleton(TorchFunctionMode):
    """Context in which layers get ``meta`` parameters and no initialisation.

    Layers allocate what they are going to fill with ``torch.empty``, and only that goes to ``meta``. What a
    constructor *computes* (rotary tables, position indices, and other buffers that no checkpoint
    carries) comes from other functions and is computed for real, so that it is right afterwards.

    A configuration is a stranger's, and building must end: what an operator would allocate is asked on ``meta``
    before it runs.

    Raises:
        CheckpointError: more tensors than ``limit``, or more than ``room`` bytes of real ones at a time.
    """

    def __init__(self, limit: int = MOST_TENSORS, room: int = MOST_BYTES) -> None:
        super().__init__()
        self.limit, self.room, self.made, self.bytes = limit, room, 0, 0
        self._real: list[tuple[StorageWeakRef, int]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch._C._set_grad_enabled:  # makes no tensor, and comes with every layer
            return func(*args, **kwargs)
        if func is torch.empty and kwargs.get("device") is None:
            self.made += 1
            if self.made > self.limit:
                raise CheckpointError(f"its configuration describes more than {self.limit} tensors")
            return func(*args, **{**kwargs, "device": "meta"})
        name = getattr(func, "__name__", "")
        target = args[0] if args else kwargs.get("tensor")
        if isinstance(target, Tensor) and target.is_meta:  # nothing becomes real out of it
            return target if name in _FILLS else func(*args, **kwargs)
        if name == "__get__":  # an attribute
            return func(*args, **kwargs)
        self._reserve(_allocates(func, args, kwargs))
        made = func(*args, **kwargs)
        if isinstance(made, Tensor) and not made.is_meta:
            storage = made.untyped_storage()
            self._real.append((StorageWeakRef(storage), storage.nbytes()))
        return made

    def _reserve(self, size: int) -> None:
        """Count ``size`` more bytes; what is gone already is only looked for when they seem too many."""
        self.bytes += size
        if self.bytes <= self.room:
            return
        alive = {ref.cdata: (ref, nbytes) for ref, nbytes in self._real if not ref.expired()}
        self._real = list(alive.values())
        self.bytes = size + sum(nbytes for _, nbytes in self._real)
        if self.bytes > self.room:
            raise CheckpointError(f"its configuration describes tables of more than {self.room >> 20} MB")


def _allocates(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> int:
    """How many bytes the result of ``func`` is going to take that its arguments don't; 0 if that can't be told."""
    given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    if any(x.is_meta for x in given):
        return 0
    fake_args, fake = tree_map_only(Tensor, _on_meta, (args, kwargs))
    try:
        made = func(*fake_args, **(fake if given else {**kwargs, "device": "meta"}))
    except Exception:  # needs values, or makes no tensor
        return 0
    before = {x.untyped_storage()._cdata for x in tree_leaves((fake_args, fake)) if isinstance(x, Tensor)}
    results = [x.untyped_storage() for x in tree_leaves(made) if isinstance(x, Tensor) and x.is_meta]
    return sum(nbytes for cdata, nbytes in {s._cdata: s.nbytes() for s in results}.items() if cdata not in before)


def _on_meta(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
