"""Loading a pipeline out of one file in the original layout, and looking into a file of 24 GB; fresh processes."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from . import harness, loading

CODE = """
import importlib, time
library = importlib.import_module(name)
import torch, transformers
library.StableDiffusionPipeline, library.UNet2DConditionModel, library.AutoencoderKL, library.PNDMScheduler
from transformers import CLIPTextModel, CLIPTokenizer
forget_peak()
before = status("VmRSS")
start = time.perf_counter()
pipe = library.StableDiffusionPipeline.from_single_file(
    file, config=config, torch_dtype=getattr(torch, dtype), local_files_only=True, safety_checker=None
)
loaded = time.perf_counter() - start
peak = status("VmHWM") - before
networks = (pipe.unet, pipe.vae, pipe.text_encoder)
checksum = sum(float(p.detach().flatten()[::1024].double().sum()) for n in networks for p in n.parameters())
report(loaded=loaded, peak=peak, checksum=checksum)
"""
WRITE = """
import effusion, sys
pipe = effusion.StableDiffusionPipeline.from_pretrained(folder, torch_dtype="auto", safety_checker=None)
pipe.save_single_file(file)
"""
INSPECT = """
import time
from effusion.cli import inspect
from effusion.weights import checkpoint, recognise
def read():
    return next(int(line.split()[1]) for line in open("/proc/self/io") if line.startswith("rchar"))
before, start = read(), time.perf_counter()
lines = inspect.table(inspect.components(file))
seconds = time.perf_counter() - start
report(seconds=seconds, read=read() - before, first=lines[1])
"""


def big_file(path: Path) -> int:
    """A file with the header of a FLUX.1 transformer in bfloat16, 24 GB with a hole for the data; its length."""
    import torch

    import effusion
    from effusion.weights import single_file
    from effusion.weights.skeleton import Skeleton

    with Skeleton():
        model = effusion.FluxTransformer2DModel(guidance_embeds=True)
    header: dict[str, Any] = {}
    at = 0
    for name, tensor in single_file.original_state(model).items():
        size = tensor.numel() * torch.bfloat16.itemsize
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    return at


def inspect_rows(folder: Path, repeat: int) -> list[list[str]]:
    size = big_file(folder / "flux.safetensors")
    runs = [harness.child(INSPECT, file=str(folder / "flux.safetensors")) for _ in range(repeat + 1)][1:]
    label = f"`effusion inspect`, {size / 1e9:.1f} GB, after import"
    read = max(r["read"] for r in runs)
    return [[label, harness.median([r["seconds"] for r in runs], 3), "–", f"{read / 2**20:.2f} MiB read"]]


def measure(repeat: int) -> str:
    """Half-precision file to float32, float32 file to half, and as stored."""
    base = os.environ.get("BENCHMARK_DIR")
    with tempfile.TemporaryDirectory(dir=base) as text:
        folder = Path(text)
        rows = inspect_rows(folder, repeat)
        loading.make(folder)
        for stored, dtype in (("float16", "float32"), ("float32", "float16"), ("float16", "float16")):
            file = folder / f"{stored}.safetensors"
            if not file.exists():
                harness.child(WRITE, folder=str(folder / stored), file=str(file))
            runs = harness.alternate(
                repeat,
                **{n: lambda n=n, f=file, d=dtype: harness.child(
                       CODE, name=n, file=str(f), config=str(folder / "float32"), dtype=d)
                   for n in (harness.OURS, harness.PEER)},
            )  # fmt: skip
            rows += rows_of(f"SD 1.5, {stored} file as {dtype}", runs)
    return harness.table(["", "Effusion", "peer", "ratio"], rows)


def rows_of(label: str, runs: dict[str, list[dict[str, Any]]]) -> list[list[str]]:
    ours, peers = runs[harness.OURS], runs[harness.PEER]
    if {round(r["checksum"], 1) for r in ours} != {round(r["checksum"], 1) for r in peers}:
        raise RuntimeError(f"{label}: the two loaded different weights")
    answer = []
    for what, key, show in (("wall", "loaded", harness.median), ("peak", "peak", harness.gib)):
        a, b = [r[key] for r in ours], [r[key] for r in peers]
        answer.append([f"{label}: {what}", show(a), show(b), harness.ratio(a, b)])
    return answer


if __name__ == "__main__":
    harness.main("single_file", "Loading one file in the original layout", measure, repeat=3)
