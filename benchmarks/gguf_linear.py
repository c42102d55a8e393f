"""A linear layer over packed weights on the CPU: unpacking and multiplying, beside the peer's layer."""

from __future__ import annotations

import statistics
import time
from typing import Any

import gguf
import numpy as np
import torch
from torch import nn

from effusion.placement.packing import unpack_in_calls
from effusion.quant.ggml import GGML

from . import harness

SIZES = ((3072, 3072), (12288, 3072))  # out, in: attention and feed-forward of FLUX.1
TOKENS = 64


def packed(kind: str, rows: int, columns: int) -> np.ndarray:
    """Random bytes in the packing ``kind``, with scales that are small numbers."""
    number = gguf.GGMLQuantizationType[kind]
    block, size = gguf.constants.GGML_QUANT_SIZES[number]
    raw = np.random.default_rng(0).integers(0, 256, (rows * columns // block, size), dtype=np.uint8)
    for at in (0, 2) if kind == "Q4_K" else (0,):
        raw[:, at : at + 2] = np.array([0.01], np.float16).view(np.uint8)
    return raw.reshape(rows, columns // block * size)


def ours(kind: str, raw: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype) -> nn.Module:
    layer = nn.Linear(shape[1], shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(raw, requires_grad=False)
    unpack_in_calls(layer, {"weight": (GGML(int(gguf.GGMLQuantizationType[kind]), shape), dtype)})
    return layer


def peers(kind: str, raw: torch.Tensor, shape: tuple[int, int], dtype: torch.dtype) -> nn.Module:
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    layer = GGUFLinear(shape[1], shape[0], bias=False, compute_dtype=dtype, device="meta")
    layer.weight = GGUFParameter(raw, quant_type=gguf.GGMLQuantizationType[kind])
    return layer


def seconds(layer: nn.Module, x: torch.Tensor) -> float:
    start = time.perf_counter()
    with torch.no_grad():
        layer(x)
    return time.perf_counter() - start


def measure(repeat: int) -> str:
    """Every packing, size and dtype."""
    rows: list[list[str]] = []
    for kind in ("Q8_0", "Q4_K"):
        for shape in SIZES:
            raw = torch.from_numpy(packed(kind, *shape))
            for dtype in (torch.float32, torch.bfloat16):
                x = torch.randn(TOKENS, shape[1], dtype=dtype)
                layers: dict[str, Any] = {
                    harness.OURS: ours(kind, raw, shape, dtype), harness.PEER: peers(kind, raw, shape, dtype)
                }  # fmt: skip
                with torch.no_grad():
                    a, b = (layer(x).float() for layer in layers.values())
                if (a - b).norm() > 0.02 * b.norm():
                    raise RuntimeError(f"{kind}: the two layers give different numbers")
                runs = harness.alternate(
                    repeat, **{name: lambda layer=layer, x=x: seconds(layer, x) for name, layer in layers.items()}
                )
                mine, theirs = runs[harness.OURS], runs[harness.PEER]
                label = f"{kind}, {shape[1]} to {shape[0]}, {str(dtype).removeprefix('torch.')}"
                show = [f"{statistics.median(times) * 1e3:.1f} ms" for times in (mine, theirs)]
                rows.append([label, *show, harness.ratio(mine, theirs)])
    text = harness.table(["", "Effusion", "peer", "ratio"], rows)
    return f"{TOKENS} tokens, {torch.get_num_threads()} thread(s).\n\n{text}"


if __name__ == "__main__":
    harness.main("gguf_linear", "A linear layer over packed weights (GGUF)", measure, repeat=15)
