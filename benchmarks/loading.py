"""Loading a pipeline of the size of SD 1.5: wall time and peak of resident memory, in fresh processes."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from . import harness
from .unet_step import SD15

CODE = """
import importlib, time
library = importlib.import_module(name)
import torch, transformers
library.StableDiffusionPipeline, library.UNet2DConditionModel, library.AutoencoderKL, library.PNDMScheduler
from transformers import CLIPTextModel, CLIPTokenizer
forget_peak()
before = status("VmRSS")
start = time.perf_counter()
pipe = library.StableDiffusionPipeline.from_pretrained(
    model, torch_dtype=getattr(torch, dtype), safety_checker=None, feature_extractor=None, requires_safety_checker=False
)
loaded = time.perf_counter() - start
peak = status("VmHWM") - before
networks = (pipe.unet, pipe.vae, pipe.text_encoder)
checksum = sum(float(p.detach().flatten()[::1024].double().sum()) for n in networks for p in n.parameters())
for network in networks:
    for p in network.parameters():
        p.detach().view(-1).sum()  # read every weight once, as the first step does
used = time.perf_counter() - start
weights = sum(p.numel() * p.element_size() for n in networks for p in n.parameters())
largest = max(p.numel() * p.element_size() for n in networks for p in n.parameters())
report(loaded=loaded, used=used, peak=peak, all=status("VmHWM") - before, weights=weights, largest=largest,
       checksum=checksum)
"""


SHOWN: tuple[tuple[str, str, Callable[[Sequence[float]], str]], ...] = (
    ("wall", "loaded", harness.median),
    ("wall, every weight read once", "used", harness.median),
    ("peak of loading", "peak", harness.gib),
    ("peak, every weight read once", "all", harness.gib),
)
VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "sample_size": 512,
}


def vocabulary(folder: Path) -> Path:
    """The smallest files that make a CLIP tokenizer."""
    words = {f"{c}{end}": i for i, (c, end) in enumerate((chr(97 + i % 26), "</w>") for i in range(26))}
    words |= {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(words))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder


def make(folder: Path) -> None:
    """The components of SD 1.5 at full size, random weights, saved by the peer in both precisions."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    files = vocabulary(folder / "vocabulary")
    text = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768
    )
    pipe = diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(**VAE),
        text_encoder=CLIPTextModel(text),
        tokenizer=CLIPTokenizer(str(files / "vocab.json"), str(files / "merges.txt"), model_max_length=77),
        unet=diffusers.UNet2DConditionModel(**SD15),
        scheduler=diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder / "float32")
    pipe.to(dtype=torch.float16).save_pretrained(folder / "float16")


def rows_of(label: str, runs: dict[str, list[dict[str, Any]]]) -> list[list[str]]:
    ours, peers = runs[harness.OURS], runs[harness.PEER]
    if {round(r["checksum"], 2) for r in ours} != {round(r["checksum"], 2) for r in peers}:
        raise RuntimeError(f"{label}: the two loaded different weights")
    answer = []
    for what, key, show in SHOWN:
        a, b = [r[key] for r in ours], [r[key] for r in peers]
        answer.append([f"{label}: {what}", show(a), show(b), harness.ratio(a, b)])
    return answer


def measure(repeat: int) -> str:
    """float32 as it is, and a float16 checkpoint loaded as float32."""
    base = os.environ.get("BENCHMARK_DIR")
    with tempfile.TemporaryDirectory(dir=base) as folder:
        make(Path(folder))
        rows: list[list[str]] = []
        notes = []
        for stored in ("float32", "float16"):
            model = str(Path(folder) / stored)
            runs = harness.alternate(
                repeat,
                **{n: lambda n=n, m=model: harness.child(CODE, name=n, model=m, dtype="float32")
                   for n in (harness.OURS, harness.PEER)},
            )  # fmt: skip
            rows += rows_of(f"{stored} file as float32", runs)
            first = runs[harness.OURS][0]
            over = statistics.median(r["all"] for r in runs[harness.OURS]) - first["weights"]
            weights, largest = harness.gib([first["weights"]]), first["largest"] / 2**20
            notes.append(
                f"{stored}: every weight read, Effusion's peak is the weights ({weights}) "
                f"and {over / 2**20:.0f} MiB more; the largest tensor has {largest:.0f} MiB."
            )
    text = harness.table(["", "Effusion", "peer", "ratio"], rows)
    return f"{text}\n\n" + "\n".join(f"- {note}" for note in notes)


if __name__ == "__main__":
    harness.main("loading", "Loading a pipeline of the size of SD 1.5", measure, repeat=3)
