"""What the benchmarks share: fresh processes, alternating pairs, ratios, and the page with the tables.

A ratio is the median of the ratios of neighbouring runs, ours to the peer's: what slows the machine down for a while
slows both. The range behind it is the smallest and the largest of them.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
PEER = "diffusers"
OURS = "effusion"
Result = TypeVar("Result")

# prepended to code that runs in a fresh process: `report(**values)` hands values back
_PRELUDE = """
import json, sys
def report(**values):
    print("REPORT", json.dumps(values))
def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
def forget_peak():
    open("/proc/self/clear_refs", "w").write("5")
"""


def child(code: str, **values: Any) -> dict[str, Any]:
    """Run ``code`` in a fresh process with ``values`` as variables; what it reports, and ``wall`` in seconds."""
    setup = "".join(f"{name} = {value!r}\n" for name, value in values.items())
    source = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]))
    env = {**os.environ, "PYTHONPATH": source, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    start = time.perf_counter()
    run = subprocess.run([sys.executable, "-c", _PRELUDE + setup + code], env=env, capture_output=True, text=True)
    wall = time.perf_counter() - start
    if run.returncode:
        raise RuntimeError(f"the benchmarked process failed:\n{run.stderr[-3000:]}")
    lines = [line.partition(" ")[2] for line in run.stdout.splitlines() if line.startswith("REPORT ")]
    return {"wall": wall, **(json.loads(lines[-1]) if lines else {})}


class ChildFailed(RuntimeError):
    """A benchmarked process was killed or failed; how."""


@contextlib.contextmanager
def memory_group(limit: int) -> Iterator[Path]:
    """The folder of a memory control group of ``limit`` bytes (version 1 or 2); needs root.

    Raises:
        OSError: this machine does not give one.
    """
    root = Path("/sys/fs/cgroup")
    v1 = (root / "memory").is_dir()
    folder = (root / "memory" if v1 else root) / f"effusion-{os.getpid()}"
    folder.mkdir()
    try:
        (folder / ("memory.limit_in_bytes" if v1 else "memory.max")).write_text(str(limit))
        yield folder
    finally:
        folder.rmdir()


def group_peak(folder: Path) -> int:
    """The most bytes that a memory control group held, file cache included."""
    name = "memory.max_usage_in_bytes"
    return int((folder / (name if (folder / name).exists() else "memory.peak")).read_text())


def run_module(name: str, *arguments: str, inside: Path | None = None, limit: float | None = None) -> dict[str, Any]:
    """What `python -m benchmarks.NAME --child …` prints as JSON in its last line; in a control group if one is given.

    Args:
        limit: seconds after which it is stopped.

    Raises:
        ChildFailed: it failed, was killed or stopped.
    """
    command = [sys.executable, "-m", f"benchmarks.{name}", "--child", *arguments]
    enter = (lambda: (inside / "cgroup.procs").write_text(str(os.getpid()))) if inside else None
    options: dict[str, Any] = {"capture_output": True, "text": True, "preexec_fn": enter, "timeout": limit}
    try:
        done = subprocess.run(command, **options)
    except subprocess.TimeoutExpired:
        raise ChildFailed(f"stopped after {limit:.0f} s") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        raise ChildFailed(f"killed (signal {-done.returncode})" if done.returncode < 0 else f"failed: {last}")
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def drop_cache(files: Iterable[Path]) -> None:
    """Take ``files`` out of the system's file cache."""
    for file in files:
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def read_cold(files: Sequence[Path]) -> float:
    """Seconds to read ``files`` from the disk, one after the other; they are not in the file cache afterwards."""
    drop_cache(files)
    buffer = bytearray(16 << 20)
    start = time.perf_counter()
    for file in files:
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
    took = time.perf_counter() - start
    drop_cache(files)
    return took


def alternate(repeat: int, **variants: Callable[[], Result]) -> dict[str, list[Result]]:
    """Run the variants in turn, ``repeat`` times, the order reversed every other time; a first round warms up."""
    results: dict[str, list[Result]] = {name: [] for name in variants}
    for i in range(-1, repeat):
        for name in list(variants) if i % 2 == 0 else reversed(variants):
            result = variants[name]()
            if i >= 0:
                results[name].append(result)
    return results


def ratio(ours: Sequence[float], peers: Sequence[float]) -> str:
    """``0.41x (0.39–0.45)``: the median and range of the ratios of neighbouring runs."""
    each = [a / b for a, b in zip(ours, peers, strict=True)]
    return f"**{statistics.median(each):.2f}x** ({min(each):.2f}–{max(each):.2f})"


def median(values: Sequence[float], digits: int = 2, unit: str = " s") -> str:
    return f"{statistics.median(values):.{digits}f}{unit}"


def gib(values: Sequence[float]) -> str:
    """The median of byte counts, in GiB."""
    return f"{statistics.median(values) / 2**30:.2f} GiB"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine() -> str:
    """The hardware and versions that a table was made with."""
    cpu = next((r for r in _lines("/proc/cpuinfo") if r.startswith("model name")), ":" + platform.processor())
    memory = next((int(r.split()[1]) for r in _lines("/proc/meminfo") if r.startswith("MemTotal")), 0) / 2**20
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("torch", PEER, "transformers"))
    return (
        f"{cpu.partition(':')[2].strip()}, {os.cpu_count()} cores, {memory:.0f} GiB RAM; "
        f"Python {platform.python_version()}, {versions}"
    )


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


class NotHere(Exception):
    """This machine lacks what a benchmark needs; the others go on."""


def main(
    name: str, title: str, measure: Callable[..., str], repeat: int, options: Mapping[str, str | bool] | None = None
) -> None:
    """Entry point of a benchmark module: print its table; with ``--write`` put it on the page.

    Args:
        options: further arguments of the command line and of ``measure``, with their defaults.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=title)
    parser.add_argument("--repeat", type=int, default=repeat, help=f"pairs of runs (default {repeat})")
    parser.add_argument("--write", action="store_true", help=f"replace the section in {PAGE.relative_to(ROOT)}")
    for option, default in (options or {}).items():
        how: dict[str, Any] = {"action": "store_true"} if default is False else {"default": default}
        parser.add_argument(f"--{option}", **how)
    args = parser.parse_args()
    try:
        measured = measure(args.repeat, **{option: getattr(args, option) for option in options or {}})
    except NotHere as error:
        print(f"benchmarks.{name} {error}, which this machine does not have: left out")
        return
    text = f"## {title}\n\n{measured}\n\n`python -m benchmarks.{name}` on {machine()}.\n"
    print(text)
    if args.write:
        write_section(name, text)


def write_section(name: str, text: str) -> None:
    """Replace section ``name`` of the page, or add it at the end."""
    page = PAGE.read_text(encoding="utf-8")
    section = f"<!-- {name} -->\n{text}<!-- /{name} -->\n"
    pattern = re.compile(rf"<!-- {name} -->\n.*?<!-- /{name} -->\n", re.DOTALL)
    page = pattern.sub(lambda _: section, page) if pattern.search(page) else f"{page.rstrip()}\n\n{section}"
    PAGE.write_text(page, encoding="utf-8")
