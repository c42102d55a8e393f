"""A UNet of Stable Diffusion 1.5's size, half precision on disk, float32 compute, in a quarter of its weights of memory.

Needs root for the memory control group. The file cache is dropped first. Time per step beside the time to read the weights
and the time to compute with everything resident, and the peak of the control group.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path

import torch

import effusion
from effusion.placement import apply_layerwise_casting

from . import harness

NAME = "placement_disk"
SIZE, STEPS = 256, 2  # pixels, calls of which the faster one counts
BASE = 700 << 20  # bytes beside the weights: torch itself, activations


def make(folder: Path) -> int:
    """Write random half-precision weights; their bytes."""
    with torch.device("cpu"):
        unet = effusion.UNet2DConditionModel(cross_attention_dim=768).half()
    unet.save_pretrained(folder)
    return sum(p.nbytes for p in unet.parameters())


def child(mode: str, folder: str) -> None:
    torch.set_num_threads(os.cpu_count() or 1)
    unet = effusion.UNet2DConditionModel.from_pretrained(folder, torch_dtype=torch.float16).eval()
    apply_layerwise_casting(unet, torch.float16, torch.float32, None)
    if mode == "streamed":
        unet.enable_group_offload("cpu", offload_type="leaf_level", use_stream=True, offload_to_disk_path=folder)
    x = torch.randn(2, 4, SIZE // 8, SIZE // 8)
    text = torch.randn(2, 77, unet.config.cross_attention_dim)
    times, total = [], 0.0
    with torch.no_grad():
        for _ in range(STEPS):
            start = time.perf_counter()
            total = float(unet(x * 0 + 0.5, 10, text * 0 + 0.1).sample.double().sum())
            times.append(time.perf_counter() - start)
    print(json.dumps({"seconds": min(times), "sum": total}))


def measure(repeat: int) -> str:
    rows = []
    with tempfile.TemporaryDirectory(dir=".") as name:
        folder = Path(name)
        weights = make(folder)
        limit = weights // 4 + BASE
        files = list(folder.glob("*.safetensors"))
        for _ in range(repeat):
            resident = harness.run_module(NAME, "resident", name)
            reading = harness.read_cold(files)
            try:
                with harness.memory_group(limit) as group:
                    streamed = harness.run_module(NAME, "streamed", name, inside=group)
                    used = harness.group_peak(group)
            except OSError as error:
                return f"Needs a memory control group of its own, which this machine does not give: {error.strerror}."
            assert streamed["sum"] == resident["sum"], "streamed and resident differ"
            least = max(resident["seconds"], reading)
            times = [resident["seconds"], reading, streamed["seconds"]]
            rows.append(
                [*(f"{t:.2f} s" for t in times), f"**{streamed['seconds'] / least:.2f}x**", f"{used / 1e6:.0f} MB"]
            )
    head = ["compute, resident", "reading", "streamed", "streamed / max of both (aim: <= 1.25x)", "peak of the group"]
    said = (
        f"{weights / 1e6:.0f} MB of weights, a limit of {limit / 1e6:.0f} MB: a quarter, and {BASE >> 20} MiB for torch"
    )
    return f"{said}. The results are the same bits.\n\n{harness.table(head, rows)}"


if __name__ == "__main__":
    if "--child" in sys.argv:
        child(*sys.argv[2:])
    else:
        harness.main(NAME, "A UNet read from disk in a quarter of its memory", measure, repeat=3)
