"""``effusion env``: versions, devices and limits, to paste into a report."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
from typing import Any

from .. import __version__

# what a plain installation has; the optional ones come from the table of extras
REQUIRED = ("torch", "safetensors", "huggingface_hub", "numpy", "pillow", "tqdm", "transformers")
_DISTRIBUTIONS = {"flash_attn": "flash-attn"}


def add_parser(subparsers: Any) -> None:
    """The verb's arguments."""
    parser = subparsers.add_parser("env", help="versions and devices of this machine")
    parser.add_argument("--rates", action="store_true", help="how fast it computes, copies and reads; measured anew")


def run(args: argparse.Namespace) -> None:
    """Print one ``name: value`` line each."""
    for name, value in (rates() if args.rates else facts()).items():
        print(f"{name}: {value}")


def facts() -> dict[str, str]:
    """What there is to know about this installation and machine."""
    import torch

    from ..core.config import FORMAT_VERSION
    from ..core.optional import EXTRAS
    from ..placement import machine

    found = {
        "effusion": f"{__version__} (reads and writes the files of diffusers {FORMAT_VERSION})",
        "python": f"{platform.python_version()} on {platform.platform()}",
        "cpu": f"{_cpu()}, {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads",
        "memory": f"{machine.free_device_memory(torch.device('cpu')) / 2**30:.1f} GiB free",
    }
    for device in machine.devices():
        if device.type != "cpu":
            free = machine.free_device_memory(device) / 2**30
            found[str(device)] = f"{_name_of(device)}, {free:.1f} GiB free"
    found |= {name: _version(name) for name in (*REQUIRED, *EXTRAS)}
    found["cuda in torch"] = torch.version.cuda or "no"
    return found


def rates() -> dict[str, str]:
    """The rates that plans count with, for each device."""
    from ..placement.machine import devices
    from ..placement.rates import rates as measure

    found = {}
    for device in devices():
        measured = measure(device, fresh=True)
        compute = ", ".join(f"{rate / 1e9:.0f} Gflop/s in {dtype}" for dtype, rate in measured.matmul.items())
        found[f"{device} computes"] = compute
        found[f"{device} memory"] = f"{measured.memory / 1e9:.1f} GB/s"
        found[f"{device} is fed with"] = f"{measured.host_to_device / 1e9:.1f} GB/s from host memory"
        found["disk"] = f"{measured.disk / 1e9:.2f} GB/s, cold; mapped files, cached, {measured.mapped / 1e9:.1f} GB/s"
    return found


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(_DISTRIBUTIONS.get(package, package))
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _name_of(device: Any) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
