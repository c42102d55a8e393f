"""Batches one by one, and large pictures in tiles whose borders are blended."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


class AutoencoderMixin:
    """Switches of autoencoders: a batch one by one, a large picture in tiles."""

    use_slicing = False
    use_tiling = False

    def enable_slicing(self) -> None:
        """Encode and decode the pictures of a batch one after another: less memory, the same result."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        self.use_slicing = False

    def enable_tiling(self) -> None:
        """Encode and decode large pictures in overlapping tiles: less memory, slightly different near borders."""
        self.use_tiling = True

    def disable_tiling(self) -> None:
        self.use_tiling = False


class SlicingMixin(AutoencoderMixin):
    """An autoencoder that looks at its switch for batches."""

    def _by_item(self, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """``run(x)``, one item of the batch at a time if slicing is on."""
        if not self.use_slicing:
            return run(x)
        return joined((run(item) for item in x.split(1)), x.shape[0])


def joined(parts: Iterable[Tensor], batch: int) -> Tensor:
    """The ``parts`` of a batch as one, each put into its place as it comes: kept, they would need twice the room."""
    out: Tensor | None = None
    at = 0
    for part in parts:
        if part.shape[0] == batch:
            return part
        out = part.new_empty(batch, *part.shape[1:]) if out is None else out
        out[at : at + part.shape[0]] = part
        at += part.shape[0]
        del part  # before the next one is made
    assert out is not None
    return out


def blend(a: Tensor, b: Tensor, extent: int, dim: int) -> Tensor:
    """``b`` with its first ``extent`` rows (``dim=-2``) or columns (``-1``) faded in from the last ones of ``a``."""
    extent = min(a.shape[dim], b.shape[dim], extent)
    if extent == 0:
        return b
    ramp = torch.arange(extent, device=b.device, dtype=torch.float32) / extent
    ramp = ramp.to(b.dtype).view(-1, *([1] * (-dim - 1)))
    end, start = a.narrow(dim, a.shape[dim] - extent, extent), b.narrow(dim, 0, extent)
    faded = end * (1 - ramp) + start * ramp
    return torch.cat([faded, b.narrow(dim, extent, b.shape[dim] - extent)], dim=dim)


Side = int | tuple[int, int]  # the same in both directions, or (vertically, horizontally)


def tiled(
    x: Tensor, run: Callable[[Tensor], Tensor], size: Side, stride: Side, extent: Side, limit: Side, scale: float
) -> Tensor:
    """``run`` on overlapping rectangles of ``x``, blended and put together.

    Beside the result only one tile is held, and of the tiles around it what is blended with.

    Args:
        x: ``(…, H, W)``.
        size, stride: sides of a rectangle and distance of two, in pixels of ``x``.
        extent, limit: rows that are blended and rows that a tile contributes, in pixels of the result.
        scale: side of the result over side of ``x``.
    """
    size, stride, extent, limit = ((v, v) if isinstance(v, int) else v for v in (size, stride, extent, limit))
    rows, columns = (_cuts(*cut, scale) for cut in zip(x.shape[-2:], size, stride, limit, strict=True))
    out: Tensor | None = None
    above: dict[int, Tensor] = {}  # the last rows of each tile of the row before
    top = 0
    for (i, end), height in rows:
        left, beside = 0, None
        for (j, stop), width in columns:
            tile = run(x[..., i:end, j:stop])
            tile = tile if j not in above else blend(above[j], tile, extent[0], -2)
            tile = tile if beside is None else blend(beside, tile, extent[1], -1)
            if out is None:
                sides = sum(h for _, h in rows), sum(w for _, w in columns)
                out = tile.new_empty(*tile.shape[:-2], *sides)
            out[..., top : top + height, left : left + width] = tile[..., :height, :width]
            above[j], beside = _last(tile, extent[0], -2), _last(tile, extent[1], -1)
            left += width
            del tile  # before the next one is made
        top += height
    assert out is not None
    return out


def _cuts(length: int, size: int, stride: int, limit: int, scale: float) -> list[tuple[tuple[int, int], int]]:
    """The (start, end) of each tile along one side, and how much of the result it contributes."""
    ends = [(at, min(at + size, length)) for at in range(0, length, stride)]
    return [((at, end), min(int((end - at) * scale), limit)) for at, end in ends]


def _last(tile: Tensor, extent: int, dim: int) -> Tensor:
    """A copy of the last rows or columns, which doesn't keep the whole tile."""
    extent = min(extent, tile.shape[dim])
    return tile.narrow(dim, tile.shape[dim] - extent, extent).clone()


def overlaid(x: Tensor, run: Callable[[Tensor], Tensor], size: int, overlap: int, scale: float) -> Tensor:
    """``run`` on overlapping squares of ``x``, each faded in over what is there already.

    Args:
        x: ``(…, H, W)``.
        size, overlap: side of a square and of what it shares with the next one, in pixels of ``x``.
        scale: side of the result over side of ``x``.
    """
    height, width = x.shape[-2:]
    ramp = torch.arange(round(size * scale), device=x.device) / (overlap * scale - 1)
    ramp = ramp.clamp(0, 1).to(x.dtype)
    out: Tensor | None = None
    for i in range(0, height, size - overlap):
        for j in range(0, width, size - overlap):
            tile = run(x[..., i : i + size, j : j + size])
            h, w = tile.shape[-2:]
            if out is None:
                out = tile.new_zeros(*tile.shape[:-2], int(height * scale), int(width * scale))
            top, left = int(i * scale), int(j * scale)
            share = torch.ones_like(tile[0, 0])
            share = share * ramp[:h, None] if i else share
            share = share * ramp[None, :w] if j else share
            place = out[..., top : top + h, left : left + w]
            place.copy_(share * tile + (1 - share) * place)
    assert out is not None
    return out
