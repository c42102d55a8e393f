"""Writing GGUF (ggml, 2023), version 3: tensors are packed one after the other while they are written."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..core.files import replacing
from ..core.optional import require
from ..quant.codec import Codec
from ..quant.ggml import GGML, block_of
from .gguf_file import MAGIC
from .slices import tensor_bytes

_ALIGN = 32
_PLAIN = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}
_CAN_PACK = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")  # the package unpacks more than it can pack


def write(
    path: Path,
    tensors: Mapping[str, Tensor],
    architecture: str,
    packing: str | None = None,
    codecs: Mapping[str, Codec] | None = None,
) -> None:
    """Write ``tensors`` to ``path``, beside it first, then renamed.

    Args:
        architecture: what ``general.architecture`` says, such as ``"flux"``.
        packing: ``"Q4_0"``, ``"Q4_1"``, ``"Q5_0"``, ``"Q5_1"`` or ``"Q8_0"``: the weights of linear layers are packed
            so (computed in float32) where rows are whole blocks; the others, and all if ``None``, stay as they are.
        codecs: of tensors that are packed already (``uint8``).

    Raises:
        ValueError: a packing that can't be written, or a dtype that the format has no name for.
    """
    if packing is not None and packing not in _CAN_PACK:
        raise ValueError(f"packing={packing!r} can't be written; allowed are {', '.join(_CAN_PACK)} and None")
    plans = {name: _plan(name, t, packing, (codecs or {}).get(name)) for name, t in tensors.items()}
    with replacing(path) as file:
        _header(file, plans, architecture)
        for kind, shape, nbytes, data in plans.values():
            raw = data()
            assert len(raw) == nbytes, (kind, shape)
            file.write(raw)
            file.write(b"\0" * (-nbytes % _ALIGN))


Plan = tuple[int, tuple[int, ...], int, Callable[[], Any]]  # number of the packing, shape, bytes, what gives them


def _plan(name: str, tensor: Tensor, packing: str | None, codec: Codec | None) -> Plan:
    if codec is not None:
        if not isinstance(codec, GGML):
            raise ValueError(f"{name} is packed as {codec.label}, which GGUF has no name for; `dequantize()` first")
        return codec.kind, codec.shape, tensor.nbytes, lambda: tensor_bytes(tensor)
    if tensor.dtype not in _PLAIN or tensor.is_meta:
        raise ValueError(f"{name}: a tensor of {tensor.dtype} on {tensor.device} can't be written to a GGUF file")
    shape = tuple(tensor.shape)
    if packing is not None and tensor.ndim == 2 and name.endswith(".weight"):
        quants = require("gguf", "writing GGUF files")
        kind = quants.GGMLQuantizationType[packing]
        block = block_of(int(kind))
        assert block is not None
        if shape[1] % block[0] == 0:
            nbytes = tensor.numel() // block[0] * block[1]
            return (
                int(kind),
                shape,
                nbytes,
                lambda: quants.quants.quantize(tensor.cpu().float().numpy(), kind).reshape(-1).data,
            )
    return _PLAIN[tensor.dtype], shape, tensor.nbytes, lambda: tensor_bytes(tensor)


def _text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def _header(file: BinaryIO, plans: Mapping[str, Plan], architecture: str) -> None:
    file.write(struct.pack("<4sIQQ", MAGIC, 3, len(plans), 2))
    file.write(_text("general.architecture") + struct.pack("<I", 8) + _text(architecture))
    file.write(_text("general.quantization_version") + struct.pack("<II", 4, 2))
    at = 0
    for name, (kind, shape, nbytes, _) in plans.items():
        axes = shape or (1,)
        file.write(_text(name) + struct.pack(f"<I{len(axes)}QIQ", len(axes), *reversed(axes), kind, at))
        at += nbytes + -nbytes % _ALIGN
    file.write(b"\0" * (-file.tell() % _ALIGN))
