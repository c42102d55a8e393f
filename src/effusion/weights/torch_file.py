"""Torch's own files (``.bin``, ``.pt``, ``.ckpt``): pickles, so they are opened in a child process only.

The child reads with ``weights_only`` under limits of memory and time and writes what it found as safetensors,
once; the result is kept in the cache and mapped like any other file. Nothing of a pickle is ever
interpreted in the process that asked.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..core.errors import CheckpointError, MissingExtra, UntrustedCode
from ..core.files import abandoned

_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"
_SECONDS, _SECONDS_PER_GB, _MEMORY = 120, 60, 2 << 30
_FORMAT = 1  # of what is kept in the cache: raised when the child writes something else
_HERE = "effusion-converted-"
_CHILD = """
import json, sys
sys.path.insert(0, sys.argv[1])
sys.path += sys.argv[2:]
try:
    import torch
    from effusion.weights import torch_child
except ImportError as error:
    print(json.dumps({"kind": "import", "text": str(error)}))
else:
    torch_child.main()
"""


def looks_like(path: Path) -> bool:
    """Whether ``path`` starts like a torch file: a zip archive or a bare pickle."""
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: there is no such file") from error
    pickled = head.startswith(_PICKLE) and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05") and head[8:9] != b"{"
    return pickled or head.startswith(_ZIP)


def converted(paths: Sequence[Path]) -> list[Path]:
    """For each torch file a safetensors file with its tensors, from the cache or made now (one child for all).

    Raises:
        UntrustedCode: a file holds anything but tensors and plain containers.
        CheckpointError: one is damaged, holds no dictionary of tensors, or takes too much memory or time.
        MissingExtra: the child finds no torch.
    """
    targets = [_place(path) for path in paths]
    missing = [(p, t) for p, t in zip(paths, targets, strict=True) if not t.is_file()]
    if missing:
        _sweep(missing[0][1].parent)
        _convert(missing)
    return targets


def cache_folder() -> Path:
    """Where conversions are kept: ``EFFUSION_CACHE``, or the user's cache folder."""
    given = os.environ.get("EFFUSION_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(given) if given else base / "effusion"


def _place(path: Path) -> Path:
    real, info = path.resolve(), path.stat()
    facts = f"{real}\0{info.st_size}\0{info.st_mtime_ns}\0{info.st_ino}\0{_FORMAT}"
    return _writable() / f"{path.stem[:40]}-{hashlib.sha256(facts.encode()).hexdigest()[:32]}.safetensors"


def _writable() -> Path:
    folder = cache_folder() / "converted"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if os.access(folder, os.W_OK):
            return folder
    return _temporary(os.getpid())


@functools.lru_cache(maxsize=1)
def _temporary(process: int) -> Path:
    """A folder of this process, which goes with it."""
    for left in Path(tempfile.gettempdir()).glob(f"{_HERE}*-*"):
        owner = left.name.removeprefix(_HERE).partition("-")[0]
        if owner.isdecimal() and abandoned(left, int(owner)):
            shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{_HERE}{process}-"))
    atexit.register(_remove, folder, process)
    return folder


def _remove(folder: Path, process: int) -> None:
    if os.getpid() == process:  # not in a fork
        shutil.rmtree(folder, ignore_errors=True)


def _sweep(folder: Path) -> None:
    """Remove what children that were killed have left half written."""
    for left in folder.glob(".*.part"):
        owner = left.name.split(".")[-2].partition("-")[0]
        if owner.isdecimal() and abandoned(left, int(owner)):
            left.unlink(missing_ok=True)


def _convert(jobs: Sequence[tuple[Path, Path]]) -> None:
    size = sum(path.stat().st_size for path, _ in jobs)
    seconds = _SECONDS + _SECONDS_PER_GB * (size >> 30)
    order = {
        "memory": _MEMORY + 4 * size,
        "written": (64 << 20) + 4 * size,
        "seconds": seconds,
        "jobs": [[str(path.resolve()), str(target)] for path, target in jobs],
    }
    root = str(Path(__file__).parents[2])
    env = {k: v for k, v in os.environ.items() if k in ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT", "HOME", "TMPDIR")}
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-W", "ignore", "-c", _CHILD, root, *_torch_folders()],
            input=json.dumps(order), capture_output=True, text=True, timeout=seconds, env=env, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise CheckpointError(f"{jobs[0][0]}: reading it took more than {seconds} s; it is no ordinary file") from error
    _report(done.stdout, done.returncode, done.stderr, dict.fromkeys(str(p.resolve()) for p, _ in jobs), jobs[0][0])


def _torch_folders() -> list[str]:
    """Where this process has torch and what it needs from: the child looks at no ``PYTHONPATH`` and no user's folder."""
    files = (getattr(sys.modules.get(name), "__file__", None) for name in ("torch", "numpy", "typing_extensions"))
    paths = [Path(file).absolute() for file in files if file]
    return list(dict.fromkeys(str(p.parents[1] if p.name == "__init__.py" else p.parent) for p in paths))


def _report(out: str, code: int, trace: str, known: Mapping[str, Any], first: Path) -> None:
    """Raise what the child says, if it says anything."""
    try:
        answer = json.loads(out.splitlines()[-1]) if out.strip() else {}
    except ValueError:
        answer = {}
    path = answer.get("path") if answer.get("path") in known else str(first)
    if answer.get("kind") == "import":
        raise MissingExtra(
            f"{path}: torch files are read by a process of their own, in which torch can't be imported "
            f"({answer.get('text')}); install it for {sys.executable}, or load a safetensors version of the file"
        )
    if answer.get("kind") == "code":
        raise UntrustedCode(
            f"{path}: a pickle with more than tensors in it, which could run code; not loaded. "
            f"Ask for a safetensors version of it. ({answer.get('text')})"
        )
    if code or answer.get("kind") != "done":
        text = answer.get("text") or (trace.strip().splitlines() or [f"exit status {code}"])[-1]
        raise CheckpointError(f"{path}: a damaged torch file, or none: {text[:300]}")
