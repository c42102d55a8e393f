"""What a packed weight is to everybody else: bytes that rest and travel, and a codec that makes the weight of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from ..core import memory


class Codec(Protocol):
    """How the bytes of one weight, ``uint8``, become its values; knows nothing of files or devices."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight, not of its bytes."""

    @property
    def label(self) -> str:
        """What people call this packing."""

    def decode(self, packed: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight in ``dtype``, a new tensor on the device of ``packed``."""

    def spare(self, dtype: torch.dtype, device: torch.device) -> int:
        """Bytes that decoding into ``dtype`` on ``device`` takes beside the bytes and the weight."""

    @property
    def uniform(self) -> bool:
        """Whether rows of bytes are rows of values and all are unpacked alike, so that they can change places."""

    def rows(self, start: int, count: int) -> Codec | None:
        """The codec of ``count`` rows of the bytes; ``None`` if they can't be cut."""

    def reshaped(self, shape: Sequence[int]) -> Codec:
        """The codec of the same bytes as a weight of another shape."""


@dataclass(frozen=True)
class ScaledFloat:
    """Small floating-point numbers with one scale for all, or one for each row: ``weight = stored * scale``.

    Attributes:
        stored: dtype of the stored numbers, such as ``torch.float8_e4m3fn``.
        scale: reads the scale, a scalar or ``(rows,)`` or ``(rows, 1)``; called once.
        uniform: whether it is a scalar.
    """

    stored: torch.dtype
    shape: tuple[int, ...]
    scale: Callable[[], Tensor]
    uniform: bool = True

    @property
    def label(self) -> str:
        return f"{str(self.stored).removeprefix('torch.')} scaled"

    @cached_property
    def _factor(self) -> Tensor:
        read = self.scale().float()
        return read if read.numel() == 1 else read.reshape(-1, *([1] * (len(self.shape) - 1)))

    def decode(self, packed: Tensor, dtype: torch.dtype) -> Tensor:
        values = memory.empty(self.shape, torch.float32, packed.device).copy_(packed.view(self.stored).view(self.shape))
        return values.mul_(self._factor.to(values.device)).to(dtype)

    def spare(self, dtype: torch.dtype, device: torch.device) -> int:
        return 4 * prod(self.shape) if dtype != torch.float32 else 0

    def rows(self, start: int, count: int) -> ScaledFloat:
        def part() -> Tensor:
            return self._factor if self._factor.numel() == 1 else self._factor[start : start + count]

        return replace(self, shape=(count, *self.shape[1:]), scale=part)

    def reshaped(self, shape: Sequence[int]) -> ScaledFloat:
        assert prod(shape) == prod(self.shape)
        return replace(self, shape=tuple(shape))
