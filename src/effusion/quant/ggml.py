"""The packings of ggml (Gerganov et al., 2023): blocks of 32 or 256 numbers of a few bits, with scales.

Each decoder gets blocks ``(n, bytes)`` and fills ``out`` ``(n, numbers)`` in float32. Operations run in place on
pieces that stay in a cache of the processor, because memory, not arithmetic, is what unpacking waits for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from ..core import memory
from ..core.errors import CheckpointError
from ..core.optional import require

_PIECE = 1 << 19  # numbers that are unpacked at once on the CPU: 2 MiB; with fewer, calling operators takes longer
# the sixteen values that IQ4's four bits stand for
_NONLINEAR = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def _half(blocks: Tensor, at: int) -> Tensor:
    """The float16 at byte ``at`` of each block: ``(n, 1)`` in float32."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: Tensor, out: Tensor) -> None:
    """Low four bits of ``packed`` ``(…, k)`` into the first ``k`` of ``out`` ``(…, 2k)``, high ones into the rest."""
    k = packed.shape[-1]
    out[..., :k] = packed & 15
    out[..., k:] = packed >> 4


def _bits(packed: Tensor) -> Tensor:
    """The bits of ``packed`` ``(n, k)``, lowest first: ``(n, 8 k)`` of 0 and 1."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(-1) >> shifts) & 1).flatten(1)


def _q8_0(blocks: Tensor, out: Tensor) -> None:
    out.copy_(blocks[:, 2:].view(torch.int8))
    out.mul_(_half(blocks, 0))


def _q4_0(blocks: Tensor, out: Tensor) -> None:
    _nibbles(blocks[:, 2:], out)
    out.sub_(8).mul_(_half(blocks, 0))


def _q4_1(blocks: Tensor, out: Tensor) -> None:
    _nibbles(blocks[:, 4:], out)
    out.mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _q5_0(blocks: Tensor, out: Tensor) -> None:
    _nibbles(blocks[:, 6:], out)
    out.add_(_bits(blocks[:, 2:6]), alpha=16).sub_(16).mul_(_half(blocks, 0))


def _q5_1(blocks: Tensor, out: Tensor) -> None:
    _nibbles(blocks[:, 8:], out)
    out.add_(_bits(blocks[:, 4:8]), alpha=16).mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _scales_and_minima(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Eight scales and eight minima of six bits out of twelve bytes."""
    a, b, c = packed.unflatten(1, (3, 4)).unbind(1)
    scales = torch.cat((a & 63, (c & 15) | ((a >> 6) << 4)), dim=1)
    minima = torch.cat((b & 63, (c >> 4) | ((b >> 6) << 4)), dim=1)
    return scales, minima


def _scale_groups(blocks: Tensor, groups: Tensor) -> None:
    """``groups`` ``(n, 8, 32)`` of whole numbers times scales, minus minima; as Q4_K and Q5_K begin."""
    scales, minima = _scales_and_minima(blocks[:, 4:16])
    groups.mul_((_half(blocks, 0) * scales).unsqueeze(-1)).sub_((_half(blocks, 2) * minima).unsqueeze(-1))


def _q4_k(blocks: Tensor, out: Tensor) -> None:
    _nibbles(blocks[:, 16:].unflatten(1, (4, 32)), out.view(-1, 4, 64))
    _scale_groups(blocks, out.view(-1, 8, 32))


def _q5_k(blocks: Tensor, out: Tensor) -> None:
    groups = out.view(-1, 8, 32)
    _nibbles(blocks[:, 48:].unflatten(1, (4, 32)), out.view(-1, 4, 64))
    for i in range(8):
        groups[:, i].add_((blocks[:, 16:48] >> i) & 1, alpha=16)
    _scale_groups(blocks, groups)


def _q6_k(blocks: Tensor, out: Tensor) -> None:
    low, high = blocks[:, :128].unflatten(1, (2, 2, 32)), blocks[:, 128:192].unflatten(1, (2, 32))
    quarters = out.view(-1, 2, 4, 32)
    for i in range(4):
        nibble = low[:, :, i % 2] & 15 if i < 2 else low[:, :, i % 2] >> 4
        quarters[:, :, i] = nibble | (((high >> 2 * i) & 3) << 4)
    scales = _half(blocks, 208) * blocks[:, 192:208].view(torch.int8)
    out.sub_(32)
    out.view(-1, 16, 16).mul_(scales.unsqueeze(-1))


def _q2_k(blocks: Tensor, out: Tensor) -> None:
    packed, quarters = blocks[:, 16:80].unflatten(1, (2, 32)), out.view(-1, 2, 4, 32)
    for i in range(4):
        quarters[:, :, i] = (packed >> 2 * i) & 3
    scales, minima = _half(blocks, 80) * (blocks[:, :16] & 15), _half(blocks, 82) * (blocks[:, :16] >> 4)
    out.view(-1, 16, 16).mul_(scales.unsqueeze(-1)).sub_(minima.unsqueeze(-1))


def _q3_k(blocks: Tensor, out: Tensor) -> None:
    packed, quarters = blocks[:, 32:96].unflatten(1, (2, 32)), out.view(-1, 2, 4, 32)
    for half in range(2):
        for i in range(4):
            absent = 1 - ((blocks[:, :32] >> (4 * half + i)) & 1)
            quarters[:, half, i] = (packed[:, half] >> 2 * i) & 3
            quarters[:, half, i].sub_(absent, alpha=4)
    low, high = blocks[:, 96:104], blocks[:, 104:108]
    parts = [low & 15, low >> 4]
    tops = torch.cat([(high >> 2 * i) & 3 for i in range(4)], dim=1)
    scales = (torch.cat(parts, dim=1) | (tops << 4)).float() - 32
    out.view(-1, 16, 16).mul_((_half(blocks, 108) * scales).unsqueeze(-1))


def _look_up(out: Tensor) -> None:
    """Numbers from 0 to 15 become the values they stand for."""
    table = torch.tensor(_NONLINEAR, dtype=torch.float32, device=out.device)
    out.copy_(table[out.to(torch.int32)])


def _iq4_nl(blocks: Tensor, out: Tensor) -> None:
    _nibbles(blocks[:, 2:], out)
    _look_up(out)
    out.mul_(_half(blocks, 0))


def _iq4_xs(blocks: Tensor, out: Tensor) -> None:
    _nibbles(blocks[:, 8:].unflatten(1, (8, 16)), out.view(-1, 8, 32))
    _look_up(out)
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=blocks.device)
    high = ((blocks[:, 2:4].unsqueeze(-1) >> shifts) & 3).flatten(1)
    low = torch.stack((blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4), dim=-1).flatten(1)
    scales = (low | (high << 4)).float() - 32
    out.view(-1, 8, 32).mul_((_half(blocks, 0) * scales).unsqueeze(-1))


# number of the packing in files -> how it is unpacked; others go through the package `gguf`
DECODERS: dict[int, Callable[[Tensor, Tensor], None]] = {
    2: _q4_0, 3: _q4_1, 6: _q5_0, 7: _q5_1, 8: _q8_0, 10: _q2_k, 11: _q3_k, 12: _q4_k, 13: _q5_k, 14: _q6_k,
    20: _iq4_nl, 23: _iq4_xs,
}  # fmt: skip


def block_of(kind: int) -> tuple[int, int] | None:
    """(numbers, bytes) of a block of the packing ``kind``, by the package's table; ``None`` if it is unknown.

    Raises:
        MissingExtra: the package ``gguf`` is not installed.
    """
    sizes = require("gguf", "reading GGUF files").constants.GGML_QUANT_SIZES
    found = next((size for number, size in sizes.items() if int(number) == kind), None)
    return (int(found[0]), int(found[1])) if found is not None else None


@dataclass(frozen=True)
class GGML:
    """Bytes in one of ggml's packings, in rows along the last axis; see :class:`.codec.Codec`."""

    kind: int
    shape: tuple[int, ...]

    def decode(self, packed: Tensor, dtype: torch.dtype) -> Tensor:
        """Float32 values as the reference's to the bit, then ``dtype``."""
        if packed.is_meta or not prod(self.shape):
            return torch.empty(self.shape, dtype=dtype, device=packed.device)
        block = block_of(self.kind)
        assert block is not None
        blocks = packed.reshape(-1, block[1])
        decoder = DECODERS.get(self.kind)
        if decoder is None:
            return self._by_package(packed).to(device=packed.device, dtype=dtype)
        out = memory.empty((len(blocks), block[0]), dtype, packed.device)
        step = max(_PIECE // block[0], 1) if packed.device.type == "cpu" else max(len(blocks), 1)
        scratch = None if dtype == torch.float32 else out.new_empty(min(step, len(out)), block[0], dtype=torch.float32)
        for start in range(0, len(blocks), step):
            target = out[start : start + step]
            piece = target if scratch is None else scratch[: len(target)]
            decoder(blocks[start : start + step], piece)
            if scratch is not None:
                target.copy_(piece)
        return out.view(self.shape)

    def spare(self, dtype: torch.dtype, device: torch.device) -> int:
        """What is unpacked at once, in float32 where that is not wanted; and its bits by themselves, a byte for each number."""
        count = prod(self.shape)
        piece = min(count, _PIECE) if device.type == "cpu" and self.kind in DECODERS else count
        return (0 if dtype == torch.float32 else 4 * piece) + piece

    @property
    def label(self) -> str:
        name: str = require("gguf", "reading GGUF files").GGMLQuantizationType(self.kind).name
        return name

    def _by_package(self, packed: Tensor) -> Tensor:
        gguf = require("gguf", "reading GGUF files")
        try:
            values = gguf.quants.dequantize(packed.cpu().numpy().reshape(-1), gguf.GGMLQuantizationType(self.kind))
        except NotImplementedError as error:
            raise CheckpointError(f"the package gguf can't unpack {self.label} yet; take another file") from error
        return torch.from_numpy(values).view(self.shape)

    @property
    def uniform(self) -> bool:
        block = block_of(self.kind)
        return block is not None and prod(self.shape[1:]) % block[0] == 0

    def rows(self, start: int, count: int) -> GGML | None:
        return replace(self, shape=(count, *self.shape[1:])) if self.uniform else None

    def reshaped(self, shape: Sequence[int]) -> GGML:
        assert prod(shape) == prod(self.shape)
        return replace(self, shape=tuple(shape))
