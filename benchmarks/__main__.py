"""Run the benchmarks one after the other: `python -m benchmarks [--write] [NAME …]`."""

from __future__ import annotations

import argparse
import subprocess
import sys

ALL = (
    "import_time",
    "cold_start",
    "schedulers",
    "unet_step",
    "transformer_forward",
    "loading",
    "single_file",
    "gguf_linear",
    "forecast",
    "budgets",
    "hoisting",
    "placement_memory",
    "placement_disk",
    "placement_gpu",
    "planning",
    "twelve_billion",
)

parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(ALL)}; all if none is named")
parser.add_argument("--write", action="store_true", help="replace their sections in docs/benchmarks.md")
args = parser.parse_args()
if unknown := sorted(set(args.names) - set(ALL)):
    parser.error(f"no benchmark {', '.join(unknown)}; there are {', '.join(ALL)}")
for name in args.names or ALL:  # a process each: no benchmark inherits another's memory
    command = [sys.executable, "-m", f"benchmarks.{name}", *(["--write"] if args.write else [])]
    if subprocess.run(command).returncode:
        sys.exit(f"benchmarks.{name} failed")
