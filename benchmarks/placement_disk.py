"""A UNet of Stable Diffusion 1.5's size, half precision on disk, float32 compute, in a quarter of its weights of memory.

``python -m benchmarks.placement_disk [--small] [--size 256] [--steps 2]``; needs root for the memory control group.
The file cache is dropped first. Prints time per step beside the time to read the weights and the time to compute
with everything resident, and the peak of the control group.
"""

from __future__ import annotations

import argparse
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

SMALL = {"block_out_channels": (64, 128, 256, 256), "cross_attention_dim": 128, "attention_head_dim": 4}


def make(folder: Path, small: bool) -> int:
    """Write random half-precision weights; their bytes."""
    with torch.device("cpu"):
        unet = effusion.UNet2DConditionModel(**(SMALL if small else {"cross_attention_dim": 768})).half()
    unet.save_pretrained(folder)
    return sum(p.nbytes for p in unet.parameters())


def child(folder: str, mode: str, size: int, steps: int) -> None:
    torch.set_num_threads(os.cpu_count() or 1)
    unet = effusion.UNet2DConditionModel.from_pretrained(folder, torch_dtype=torch.float16).eval()
    apply_layerwise_casting(unet, torch.float16, torch.float32, None)
    if mode == "streamed":
        unet.enable_group_offload("cpu", offload_type="leaf_level", use_stream=True, offload_to_disk_path=folder)
    x = torch.randn(2, 4, size // 8, size // 8)
    text = torch.randn(2, 77, unet.config.cross_attention_dim)
    times, total = [], 0.0
    with torch.no_grad():
        for _ in range(steps):
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


def run(folder: Path, mode: str, args: argparse.Namespace, inside: Path | None = None) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.placement_disk", "--child", mode, "--folder", str(folder)]
    command += ["--size", str(args.size), "--steps", str(args.steps)]
    enter = (lambda: (inside / "cgroup.procs").write_text(str(os.getpid()))) if inside else None
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, preexec_fn=enter)  # type: ignore[arg-type]
    return json.loads(done.stdout) if done.returncode == 0 else {"failed": done.returncode}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--base", type=int, default=700, help="MB beside the weights: torch itself, activations")
    parser.add_argument("--child")
    parser.add_argument("--folder")
    args = parser.parse_args()
    if args.child:
        return child(args.folder, args.child, args.size, args.steps)
    with tempfile.TemporaryDirectory(dir=".") as name:
        folder = Path(name)
        weights = make(folder, args.small)
        limit = weights // 4 + (args.base << 20)
        resident = run(folder, "resident", args)
        start = time.perf_counter()
        for file in folder.glob("*.safetensors"):
            fd = os.open(file, os.O_RDONLY)
            os.fsync(fd), os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            while os.read(fd, 16 << 20):
                pass
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        reading = time.perf_counter() - start
        inside = group(limit)
        try:
            streamed = run(folder, "streamed", args, inside)
            used = peak(inside)
        finally:
            inside.rmdir()
    print(f"weights {weights / 1e6:.0f} MB in half precision, limit {limit / 1e6:.0f} MB, peak {used / 1e6:.0f} MB")
    print(f"resident {resident}, reading {reading:.2f} s, streamed {streamed}")
    if "seconds" in streamed and "seconds" in resident:
        print(f"time / max(compute, reading): {streamed['seconds'] / max(resident['seconds'], reading):.2f}")
        print(f"same bits: {streamed['sum'] == resident['sum']}")


if __name__ == "__main__":
    main()
