"""A UNet of Stable Diffusion 1.5's size, half precision on disk, float32 compute, in a quarter of its weights of memory.

The memory control group (needs root) holds a quarter of the weights beside what a process has once it has imported torch
and the library, which is measured first. The file cache is dropped before each run. Time per step beside the time to read
the weights and the time to compute with everything resident, and the peak of the control group.

The peer runs in such a group too, set up as its guide says: layerwise casting, then group offloading to disk. Streams,
which would read ahead, need an accelerator there.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import torch

import effusion

from . import harness

NAME = "placement_disk"
SIZE, STEPS = 256, 3  # pixels, calls of which the fastest one counts
_BASE = "import torch, {0}; {0}.UNet2DConditionModel; report(bytes=status('VmHWM:'))"


def make(folder: Path) -> int:
    """Write random half-precision weights; their bytes."""
    with torch.device("cpu"):
        unet = effusion.UNet2DConditionModel(cross_attention_dim=768).half()
    unet.save_pretrained(folder)
    return sum(p.nbytes for p in unet.parameters())


def child(mode: str, folder: str, scratch: str) -> None:
    torch.set_num_threads(os.cpu_count() or 1)
    library = importlib.import_module(harness.PEER if mode == "peer" else harness.OURS)
    casting = importlib.import_module(f"{library.__name__}.hooks").apply_layerwise_casting
    unet = library.UNet2DConditionModel.from_pretrained(folder, torch_dtype=torch.float16).eval()
    casting(unet, torch.float16, torch.float32, None)
    if mode != "resident":
        ahead = {"use_stream": True} if mode == "streamed" else {}
        unet.enable_group_offload("cpu", offload_type="leaf_level", offload_to_disk_path=scratch, **ahead)
    x = torch.full((2, 4, SIZE // 8, SIZE // 8), 0.5)
    text = torch.full((2, 77, unet.config.cross_attention_dim), 0.1)
    times, total = [], 0.0
    with torch.no_grad():
        for _ in range(STEPS):
            start = time.perf_counter()
            total = float(unet(x, 10, text).sample.double().sum())
            times.append(time.perf_counter() - start)
    print(json.dumps({"seconds": min(times), "sum": total}))


def confined(folder: Path, mode: str, limit: int) -> tuple[dict[str, float], int]:
    """A run in a control group of ``limit`` bytes, with a cold file cache: what it says, and the peak of the group."""
    harness.drop_cache(folder.glob("*.safetensors"))
    try:
        with harness.memory_group(limit) as group, tempfile.TemporaryDirectory(dir=folder) as scratch:
            found = harness.run_module(NAME, mode, str(folder), scratch, inside=group)
            return found, harness.group_peak(group)
    except OSError as error:
        raise harness.NotHere(f"needs a memory control group of its own ({error.strerror})") from error


def of_the_peer(folder: Path, limit: int, resident: float) -> str:
    """Seconds of the peer's step in a group of ``limit`` bytes, or what became of it."""
    try:
        found, _ = confined(folder, "peer", limit)
    except harness.ChildFailed as error:
        return str(error)
    same = abs(found["sum"] - resident) <= 1e-3 * abs(resident)
    return f"{found['seconds']:.2f} s" if same else "finishes with another result"


def measure(repeat: int) -> str:
    rows = []
    base, base_of_peer = (int(harness.child(_BASE.format(n))["bytes"]) for n in (harness.OURS, harness.PEER))
    with tempfile.TemporaryDirectory(dir=".") as name:
        folder = Path(name)
        weights = make(folder)
        limit = weights // 4 + base
        for _ in range(repeat):
            resident = harness.run_module(NAME, "resident", name, name)
            reading = harness.read_cold(list(folder.glob("*.safetensors")))
            streamed, used = confined(folder, "streamed", limit)
            assert streamed["sum"] == resident["sum"], "streamed and resident differ"
            least = max(resident["seconds"], reading)
            times = [resident["seconds"], reading, streamed["seconds"]]
            rows.append(
                [*(f"{t:.2f} s" for t in times), f"**{streamed['seconds'] / least:.2f}x**", f"{used / 1e6:.0f} MB"]
            )
            rows[-1].append(of_the_peer(folder, weights // 4 + base_of_peer, resident["sum"]))
    head = [
        "compute, resident",
        "reading",
        "streamed",
        "streamed / max of both (aim: <= 1.25x)",
        "peak of the group",
        "peer",
    ]
    said = (
        f"{weights / 1e6:.0f} MB of weights, a limit of {limit / 1e6:.0f} MB: a quarter of them, and {base / 1e6:.0f} MB that a "
        f"process with torch has before it reads any ({base_of_peer / 1e6:.0f} MB for the peer, whose limit is higher by "
        "that). The results of streaming are the same bits"
    )
    return f"{said}.\n\n{harness.table(head, rows)}"


if __name__ == "__main__":
    if "--child" in sys.argv:
        child(*sys.argv[sys.argv.index("--child") + 1 :])
    else:
        harness.main(NAME, "A UNet read from disk in a quarter of its memory", measure, repeat=3)
