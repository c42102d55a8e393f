"""A UNet of Stable Diffusion 1.5's size, half precision on disk, float32 compute, in a quarter of its weights of memory.

Needs root for the memory control group. The file cache is dropped first. Time per step beside the time to read the weights
and the time to compute with everything resident, and the peak of the control group.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import effusion
from effusion.placement import apply_layerwise_casting

from . import harness

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


def group(limit: int) -> Path:
    """A memory control group of ``limit`` bytes (version 1 or 2)."""
    root = Path("/sys/fs/cgroup")
    v1 = (root / "memory").is_dir()
    folder = (root / "memory" if v1 else root) / f"effusion-{os.getpid()}"
    folder.mkdir()
    (folder / ("memory.limit_in_bytes" if v1 else "memory.max")).write_text(str(limit))
    return folder


def peak(folder: Path) -> int:
    name = "memory.max_usage_in_bytes"
    return int((folder / (name if (folder / name).exists() else "memory.peak")).read_text())


def run(folder: Path, mode: str, inside: Path | None = None) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.placement_disk", "--child", mode, str(folder)]
    enter = (lambda: (inside / "cgroup.procs").write_text(str(os.getpid()))) if inside else None
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, preexec_fn=enter)  # type: ignore[arg-type]
    if done.returncode:
        raise RuntimeError(f"the {mode} run ended with {done.returncode}")
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def read_cold(folder: Path) -> float:
    """Seconds to read the weights from the disk; their pages are dropped from the file cache before and after."""
    start = time.perf_counter()
    for file in folder.glob("*.safetensors"):
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd), os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        while os.read(fd, 16 << 20):
            pass
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)
    return time.perf_counter() - start


def measure(repeat: int) -> str:
    rows = []
    with tempfile.TemporaryDirectory(dir=".") as name:
        folder = Path(name)
        weights = make(folder)
        limit = weights // 4 + BASE
        for _ in range(repeat):
            resident = run(folder, "resident")
            reading = read_cold(folder)
            try:
                inside = group(limit)
            except OSError as error:
                return f"Needs a memory control group of its own, which this machine does not give: {error.strerror}."
            try:
                streamed = run(folder, "streamed", inside)
                used = peak(inside)
            finally:
                inside.rmdir()
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
        harness.main("placement_disk", "A UNet read from disk in a quarter of its memory", measure, repeat=3)
