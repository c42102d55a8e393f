"""The safetensors format: a validated header, tensors mapped lazily, files written in one step.

Layout: 8 bytes little-endian length of the header, the header (a JSON object, padded with spaces),
then the bytes of all tensors without gaps. A header comes from a stranger: everything in it is
checked before anything is done with it.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import CheckpointError
from ..core.files import parse_json, replacing
from .slices import MappedFile, TensorSlice, check_sizes, tensor_bytes

MAX_HEADER = 32 << 20  # bytes; the largest published headers have less than 10 MB
# the format's names in the order in which the reference implementation lays tensors out: widest first
_NAMES = {
    "U64": "uint64", "I64": "int64", "F64": "float64", "C64": "complex64", "F32": "float32", "U32": "uint32",
    "I32": "int32", "BF16": "bfloat16", "F16": "float16", "U16": "uint16", "I16": "int16",
    "F8_E5M2FNUZ": "float8_e5m2fnuz", "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
DTYPES: dict[str, torch.dtype] = {n: getattr(torch, t) for n, t in _NAMES.items() if hasattr(torch, t)}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class SafetensorsFile:
    """One safetensors file: ``metadata``, ``slices`` by tensor name, and the tensors on demand."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            self._mapped = MappedFile(self.path)
        except FileNotFoundError as error:
            raise CheckpointError(f"{self.path}: there is no such file") from error
        header, start = self._header()
        self.metadata = _metadata(header.pop("__metadata__", None), self.path)
        self.slices = {name: _slice(self.path, name, entry, start) for name, entry in header.items()}
        _check_tiling(self.path, self.slices, start, self._mapped.size)

    def _header(self) -> tuple[dict[str, Any], int]:
        size = self._mapped.size
        if size < 8:
            raise CheckpointError(f"{self.path}: {size} bytes are no safetensors file")
        (length,) = struct.unpack("<Q", self._mapped.bytes(0, 8))
        if length > min(MAX_HEADER, size - 8):
            raise CheckpointError(
                f"{self.path}: no safetensors file, or a truncated one: its header claims {length} bytes, "
                f"the file has {size}, at most {MAX_HEADER} are allowed"
            )
        text = self._mapped.bytes(8, 8 + length)
        if not text.startswith(b"{"):
            raise CheckpointError(f"{self.path}: the header of a safetensors file starts with '{{', not {text[:1]!r}")
        try:
            header = parse_json(text.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{self.path}: broken safetensors header: {error}") from error
        return header, 8 + length

    def tensor(self, name: str, mapped: bool = True) -> Tensor:
        """Tensor ``name``: over the mapped file, or read into memory of its own."""
        return self.read(self.slices[name], mapped)

    def read(self, part: TensorSlice, mapped: bool = True) -> Tensor:
        """The tensor of any slice of this file."""
        return self._mapped.tensor(part) if mapped else part.read()

    def release(self, part: TensorSlice) -> None:
        """Drop the pages that reading ``part`` brought in; see :meth:`MappedFile.release`."""
        self._mapped.release(part)


def _metadata(value: Any, path: Path) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise CheckpointError(f"{path}: __metadata__ must map strings to strings")
    return value


def _slice(path: Path, name: str, entry: Any, start: int) -> TensorSlice:
    where = f"{path}: tensor {name!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: expected dtype, shape and data_offsets, found {_short(entry)}")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise CheckpointError(f"{where}: dtype {_short(entry['dtype'])} is unknown; known are {', '.join(DTYPES)}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _naturals(shape) or len(shape) > 64:
        raise CheckpointError(f"{where}: shape {_short(shape)} is not a list of sizes")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where}: data_offsets {_short(offsets)} are not [begin, end]")
    nbytes = prod(shape) * dtype.itemsize
    if nbytes != offsets[1] - offsets[0]:
        raise CheckpointError(
            f"{where}: {entry['dtype']} of shape {_short(shape)} is {nbytes} bytes, "
            f"its data_offsets span {offsets[1] - offsets[0]}"
        )
    check_sizes(where, shape)
    return TensorSlice(path, start + offsets[0], nbytes, dtype, tuple(shape))


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 62 for n in value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"


def _check_tiling(path: Path, slices: Mapping[str, TensorSlice], start: int, size: int) -> None:
    """The tensors must cover the data exactly: no overlap, no gap, nothing beyond the end."""
    at = start
    for name, part in sorted(slices.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if part.offset != at:
            kind = "overlaps its neighbour" if part.offset < at else f"leaves a gap of {part.offset - at} bytes"
            raise CheckpointError(f"{path}: tensor {name!r} {kind}")
        at += part.nbytes
    if at != size:
        kind = "truncated" if at > size else "followed by something else"
        raise CheckpointError(f"{path}: its header describes {at} bytes, the file has {size}: it is {kind}")


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write ``tensors`` to ``path`` one after the other, beside it first, then renamed.

    The bytes are those that the reference implementation writes (widest dtypes first, then by name).

    Raises:
        ValueError: a tensor whose dtype the format has no name for, or that has no data (meta).
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPE_NAMES or tensor.is_meta or tensor.layout is not torch.strided:
            raise ValueError(f"{name}: a {tensor.layout} tensor of {tensor.dtype} on {tensor.device} can't be saved")
    rank = {dtype: i for i, dtype in enumerate(DTYPE_NAMES)}
    order = sorted(tensors, key=lambda name: (rank[tensors[name].dtype], name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    at = 0
    for name in order:
        tensor = tensors[name]
        end = at + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            file.write(tensor_bytes(tensors[name]))
