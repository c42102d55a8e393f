"""Tiles and slices take the memory of one beside the result, however large the picture or the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from effusion.nn.tiling import SlicingMixin, tiled


class Peak(TorchDispatchMode):
    """The most bytes that tensors made within it had at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self._alive: dict[Any, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and not func.is_view:
                self._alive[StorageWeakRef(t.untyped_storage())] = t.untyped_storage().nbytes()
        self._alive = {ref: n for ref, n in self._alive.items() if not ref.expired()}
        self.bytes = max(self.bytes, sum(self._alive.values()))
        return out


def doubled(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, -1).repeat_interleave(2, -2)


def in_tiles(x: Tensor) -> Tensor:
    return tiled(x, doubled, size=8, stride=6, extent=4, limit=12, scale=2)


def one_by_one(x: Tensor) -> Tensor:
    mixin = SlicingMixin()
    mixin.enable_slicing()
    return mixin._by_item(doubled, x)


def beyond_result(run: Callable[[Tensor], Tensor], x: Tensor) -> int:
    with Peak() as peak:
        out = run(x)
    torch.testing.assert_close(out, doubled(x))
    return peak.bytes - out.nbytes


def test_sixteen_times_the_area_takes_strips_of_tiles_more() -> None:
    small, large = (beyond_result(in_tiles, torch.randn(1, 2, side, side)) for side in (24, 96))
    strips = 2 * 4 * (4 * 16) * 96 // 6  # channels, bytes, what is blended of a tile, tiles in a row
    assert large <= small + strips


def test_tiles_need_not_fit_evenly() -> None:
    for sides in ((13, 70), (7, 7), (97, 8)):
        beyond_result(in_tiles, torch.randn(1, 2, *sides))


def test_eight_times_the_batch_takes_no_more() -> None:
    one, eight = (beyond_result(one_by_one, torch.randn(batch, 2, 8, 8)) for batch in (1, 8))
    assert eight <= one + 2 * 16 * 16 * 4  # what comes out for an item is copied into its place


def test_gradients_go_through_tiles_and_slices() -> None:
    x = torch.randn(2, 1, 20, 14, requires_grad=True)
    mixin = SlicingMixin()
    mixin.enable_slicing()
    (grad,) = torch.autograd.grad(mixin._by_item(in_tiles, x).sum(), x)
    torch.testing.assert_close(grad, torch.full_like(x, 4.0))
