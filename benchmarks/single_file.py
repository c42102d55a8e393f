"""Loading a pipeline out of one file in the original layout, and looking into a file of 24 GB; fresh processes."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

import effusion
from effusion.pipelines import saving
from effusion.weights.safetensors_file import DTYPE_NAMES
from effusion.weights.single_file import original_state
from effusion.weights.skeleton import Skeleton

from . import harness, loading
from .unet_step import SD15, SDXL

CODE = """
import importlib, time
library = importlib.import_module(name)
import torch, transformers
cls = getattr(library, pipeline)
library.UNet2DConditionModel, library.AutoencoderKL, library.PNDMScheduler, library.EulerDiscreteScheduler
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
forget_peak()
before = status("VmRSS")
start = time.perf_counter()
pipe = cls.from_single_file(file, config=config, torch_dtype=getattr(torch, dtype), local_files_only=True)
loaded = time.perf_counter() - start
peak = status("VmHWM") - before
networks = [n for n in pipe.components.values() if isinstance(n, torch.nn.Module)]
checksum = sum(float(p.detach().view(-1).sum()) for n in networks for p in n.parameters())  # reads every weight once
used = time.perf_counter() - start
report(loaded=loaded, peak=peak, used=used, all=status("VmHWM") - before, checksum=checksum)
"""
INSPECT = """
import time
from effusion.cli import inspect
from effusion.weights import checkpoint, recognise
def read():
    calls = next(int(line.split()[1]) for line in open("/proc/self/io") if line.startswith("rchar"))
    return calls + status("RssFile")  # what was read, and pages of mapped files
before, start = read(), time.perf_counter()
lines = inspect.table(inspect.components(file))
seconds = time.perf_counter() - start
report(seconds=seconds, read=read() - before, first=lines[1])
"""


def sparse_file(path: Path, state: Mapping[str, torch.Tensor], dtype: torch.dtype) -> int:
    """A file with tensors of the shapes in ``state``: a few numbers of each, and a hole for the rest; bytes of data."""
    header: dict[str, Any] = {}
    at = 0
    for name, tensor in state.items():
        size = tensor.numel() * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(tensor.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
        for i, entry in enumerate(header.values()):
            begin, end = entry["data_offsets"]
            file.seek(8 + len(text) + begin)
            numbers = torch.linspace(0, 1 + i % 7, min((end - begin) // dtype.itemsize, 256)).to(dtype)
            file.write(numbers.view(torch.uint8).numpy().tobytes())
    return at


def flux() -> effusion.FluxTransformer2DModel:
    with Skeleton():
        return effusion.FluxTransformer2DModel(guidance_embeds=True)


def pipelines(folder: Path) -> dict[str, Any]:
    """Pipelines of published sizes without weights."""
    loading.vocabulary(folder)
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    large = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
    with Skeleton():
        parts: dict[str, Any] = {
            "vae": effusion.AutoencoderKL(**loading.VAE),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**text)),
            "tokenizer": CLIPTokenizer.from_pretrained(folder),
        }
        second = CLIPTextModelWithProjection(CLIPTextConfig(**large, hidden_act="gelu", projection_dim=1280))
        two = {"text_encoder_2": second, "tokenizer_2": parts["tokenizer"]}
        return {
            "SD 1.5": effusion.StableDiffusionPipeline(
                **parts, unet=effusion.UNet2DConditionModel(**SD15),
                scheduler=effusion.PNDMScheduler(skip_prk_steps=True, steps_offset=1),
                safety_checker=None, feature_extractor=None, requires_safety_checker=False,
            ),
            "SDXL": effusion.StableDiffusionXLPipeline(
                **parts, **two, unet=effusion.UNet2DConditionModel(**SDXL), scheduler=effusion.EulerDiscreteScheduler()
            ),
        }  # fmt: skip


def save_configs(pipe: Any, folder: Path) -> None:
    """What a pipeline's folder has besides weights."""
    pipe.save_config(folder)
    for name, part in pipe.components.items():
        if part is not None:
            save = part.save_pretrained if "tokenizer" in name else getattr(part, "save_config", None)
            (save or part.config.save_pretrained)(folder / name)


def inspect_rows(folder: Path, repeat: int) -> list[list[str]]:
    size = sparse_file(folder / "flux.safetensors", original_state(flux()), torch.bfloat16)
    runs = [harness.child(INSPECT, file=str(folder / "flux.safetensors")) for _ in range(repeat + 1)][1:]
    label = f"`effusion inspect`, {size / 1e9:.1f} GB, after import"
    read = max(r["read"] for r in runs)
    return [[label, harness.median([r["seconds"] for r in runs], 3), "–", f"{read / 2**20:.2f} MiB read"]]


def measure(repeat: int, only: str) -> str:
    """Half-precision file to float32, float32 file to half, and as stored."""
    base = os.environ.get("BENCHMARK_DIR")
    with tempfile.TemporaryDirectory(dir=base) as text:
        folder = Path(text)
        rows = inspect_rows(folder, repeat)
        chosen = {n: p for n, p in pipelines(folder).items() if only in ("", n)}
        for size, pipe in chosen.items():
            save_configs(pipe, folder / size)
            for stored, dtype in (("float16", "float32"), ("float32", "float16"), ("float16", "float16")):
                file = folder / f"{size} {stored}.safetensors"
                sparse_file(file, saving.original_state(pipe), getattr(torch, stored))
                given = {"pipeline": type(pipe).__name__, "file": str(file), "config": str(folder / size)}
                runs = harness.alternate(
                    repeat,
                    **{n: lambda n=n, d=dtype, g=given: harness.child(CODE, name=n, dtype=d, **g)
                       for n in (harness.OURS, harness.PEER)},
                )  # fmt: skip
                rows += rows_of(f"{size}, {stored} file as {dtype}", runs)
    text = harness.table(["", "Effusion", "peer", "ratio"], rows)
    return f"{text}\n\nOf the pipelines, only {only} was run." if only else text


def rows_of(label: str, runs: dict[str, list[dict[str, Any]]]) -> list[list[str]]:
    ours, peers = runs[harness.OURS], runs[harness.PEER]
    if {round(r["checksum"], 1) for r in ours} != {round(r["checksum"], 1) for r in peers}:
        raise RuntimeError(f"{label}: the two loaded different weights")
    answer = []
    for what, key, show in loading.SHOWN:
        a, b = [r[key] for r in ours], [r[key] for r in peers]
        answer.append([f"{label}: {what}", show(a), show(b), harness.ratio(a, b)])
    return answer


if __name__ == "__main__":
    harness.main("single_file", "Loading one file in the original layout", measure, repeat=3, options={"only": ""})
