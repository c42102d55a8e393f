"""The GGUF format (ggml, 2023): a validated header, tensors mapped, packed ones with the codec that unpacks them.

Layout: ``GGUF``, version, counts, metadata, one record for each tensor, then the data at aligned offsets.
Sizes of blocks and the arithmetic of unpacking are those of :mod:`effusion.quant.ggml`.
"""

from __future__ import annotations

import os
import struct
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import CheckpointError
from ..quant.ggml import GGML, block_of
from .slices import MappedFile, TensorSlice, check_sizes

MAGIC = b"GGUF"
# of all fields together: the largest vocabularies have 1.5 million entries
_MAX_TENSORS, _MAX_FIELDS, _MAX_TEXT, _MAX_ITEMS = 200_000, 100_000, 64 << 20, 4 << 20
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_PLAIN = {
    0: torch.float32, 1: torch.float16, 30: torch.bfloat16, 28: torch.float64,
    24: torch.int8, 25: torch.int16, 26: torch.int32, 27: torch.int64,
}  # fmt: skip


class GGUFFile:
    """One GGUF file: ``metadata``, ``slices``, ``kinds`` of packing, ``shapes`` once unpacked."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._mapped = MappedFile(self.path)
        self._at, self._text_left, self._items_left = 0, _MAX_TEXT, _MAX_ITEMS
        try:
            self._parse()
        except (struct.error, UnicodeDecodeError) as error:
            raise CheckpointError(f"{self.path}: a truncated or damaged GGUF file ({error})") from error

    def _parse(self) -> None:
        magic, version, tensors, fields = struct.unpack("<4sIQQ", self._take(24))
        if magic != MAGIC or version not in (2, 3):
            raise CheckpointError(f"{self.path}: no GGUF file of version 2 or 3 ({magic!r}, {version})")
        if tensors > _MAX_TENSORS or fields > _MAX_FIELDS:
            raise CheckpointError(f"{self.path}: claims {tensors} tensors and {fields} fields; that is no real file")
        self.metadata: dict[str, Any] = {}
        for _ in range(fields):
            name = self._text()
            if name in self.metadata:
                raise CheckpointError(f"{self.path}: the field {name!r} is there twice")
            self.metadata[name] = self._value(self._number("I"))
        records = [self._record() for _ in range(tensors)]
        self._place(records)

    def _take(self, size: int) -> bytes:
        if size > self._mapped.size - self._at:
            raise CheckpointError(f"{self.path}: truncated: {size} bytes wanted at {self._at} of {self._mapped.size}")
        self._at += size
        return self._mapped.bytes(self._at - size, self._at)

    def _number(self, kind: str) -> Any:
        return struct.unpack("<" + kind, self._take(struct.calcsize(kind)))[0]

    def _text(self) -> str:
        size = self._number("Q")
        if size > self._text_left:
            raise CheckpointError(f"{self.path}: a text of {size} bytes; all together at most {_MAX_TEXT} are allowed")
        self._text_left -= size
        return self._take(size).decode("utf-8")

    def _value(self, kind: int, nested: bool = False) -> Any:
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _STRING:
            return self._text()
        if kind != _ARRAY or nested:
            raise CheckpointError(f"{self.path}: a field of the unknown type {kind}")
        inner, count = self._number("I"), self._number("Q")
        if count > self._items_left:
            raise CheckpointError(
                f"{self.path}: a list of {count} entries; all together at most {_MAX_ITEMS} are allowed"
            )
        self._items_left -= count
        if inner in _SCALARS:
            form = f"<{count}{_SCALARS[inner]}"
            return list(struct.unpack(form, self._take(struct.calcsize(form))))
        return [self._value(inner, nested=True) for _ in range(count)]

    def _record(self) -> tuple[str, tuple[int, ...], int, int]:
        name, axes = self._text(), self._number("I")
        if axes > 8:
            raise CheckpointError(f"{self.path}: tensor {name!r} has {axes} axes")
        sizes = struct.unpack(f"<{axes}Q", self._take(8 * axes))
        kind, offset = self._number("I"), self._number("Q")
        return name, tuple(reversed(sizes)), kind, offset

    def _place(self, records: list[tuple[str, tuple[int, ...], int, int]]) -> None:
        align = self.metadata.get("general.alignment", 32)
        if not isinstance(align, int) or not 1 <= align <= 1 << 20:
            raise CheckpointError(f"{self.path}: alignment {align!r}")
        start = -(-self._at // align) * align
        self.slices: dict[str, TensorSlice] = {}
        self.kinds: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        end = start
        for name, shape, kind, offset in sorted(records, key=lambda record: record[3]):
            where = f"{self.path}: tensor {name!r}"
            check_sizes(where, shape)
            nbytes, dtype = self._size(where, shape, kind)
            if name in self.slices:
                raise CheckpointError(f"{where} is there twice")
            if start + offset < end:
                raise CheckpointError(f"{where} overlaps its neighbour")
            end = start + offset + nbytes
            if end > self._mapped.size:
                raise CheckpointError(
                    f"{where} reaches to {end}, the file has {self._mapped.size} bytes: it is truncated"
                )
            self.kinds[name] = kind
            self.shapes[name] = original = self._original(name, shape)
            if kind not in _PLAIN:  # rows of bytes, if rows are made of whole blocks
                codec = GGML(kind, original)
                cut = original[0] if original[0] and codec.uniform else 1
                original = (cut, nbytes // cut)
            self.slices[name] = TensorSlice(self.path, start + offset, nbytes, dtype, original)

    def _size(self, where: str, shape: tuple[int, ...], kind: int) -> tuple[int, torch.dtype]:
        if kind in _PLAIN:
            return prod(shape) * _PLAIN[kind].itemsize, _PLAIN[kind]
        found = block_of(kind)
        if found is None or not shape:
            raise CheckpointError(f"{where}: packing {kind} of shape {list(shape)} is unknown")
        block, size = found
        if shape[-1] % block:
            raise CheckpointError(f"{where}: rows of {shape[-1]} do not divide into blocks of {block}")
        return prod(shape) // block * size, torch.uint8

    def _original(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape before packing, which some programs note because rows had to be regrouped."""
        noted = self.metadata.get(f"comfy.gguf.orig_shape.{name}")
        if noted is None:
            return shape
        naturals = isinstance(noted, list) and noted and all(type(n) is int and n > 0 for n in noted)
        if not naturals or prod(noted) != prod(shape):
            raise CheckpointError(f"{self.path}: {name!r} notes the shape {noted}, which does not fit {list(shape)}")
        return tuple(noted)

    def read(self, part: TensorSlice, mapped: bool = True) -> Tensor:
        """The raw tensor of a slice of this file."""
        return self._mapped.tensor(part) if mapped else part.read()

    def release(self, part: TensorSlice) -> None:
        """Drop the pages that reading ``part`` brought in."""
        self._mapped.release(part)

    def codec(self, name: str) -> GGML | None:
        """What unpacks the bytes of tensor ``name``, or ``None`` if it is stored plainly."""
        return None if self.kinds[name] in _PLAIN else GGML(self.kinds[name], self.shapes[name])
