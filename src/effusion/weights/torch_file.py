"""Torch's own files (``.bin``, ``.pt``, ``.ckpt``): pickles, so they are opened in a child process only.

The child reads with ``weights_only`` under limits of memory and time and writes what it found as safetensors,
once; the result is kept in the cache and mapped like any other file. Nothing of a pickle is ever
interpreted in the process that asked.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..core.errors import CheckpointError, UntrustedCode

_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"
_SECONDS, _SECONDS_PER_GB, _MEMORY = 120, 60, 2 << 30
_CHILD = "import sys; sys.path.insert(0, sys.argv[1]); from effusion.weights import torch_child; torch_child.main()"


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
    """
    targets = [_place(path) for path in paths]
    missing = [(p, t) for p, t in zip(paths, targets, strict=True) if not t.is_file()]
    for path, _ in missing:
        if zipfile.is_zipfile(path):
            _check_archive(path)
    if missing:
        _convert(missing)
    return targets


def cache_folder() -> Path:
    """Where conversions are kept: ``EFFUSION_CACHE``, or the user's cache folder."""
    given = os.environ.get("EFFUSION_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(given) if given else base / "effusion"


def _place(path: Path) -> Path:
    real, info = path.resolve(), path.stat()
    key = hashlib.sha256(f"{real}\0{info.st_size}\0{info.st_mtime_ns}\0{info.st_ino}".encode()).hexdigest()
    return _writable() / f"{path.stem[:40]}-{key[:32]}.safetensors"


def _writable() -> Path:
    folder = cache_folder() / "converted"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if os.access(folder, os.W_OK):
            return folder
    return Path(tempfile.mkdtemp(prefix="effusion-converted-"))


def _check_archive(path: Path) -> None:
    """Torch stores its records without compression, so an archive can't be larger inside than outside."""
    try:
        with zipfile.ZipFile(path) as archive:
            inside = sum(info.file_size for info in archive.infolist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError) as error:
        raise CheckpointError(f"{path}: a damaged archive: {error}") from error
    if inside > path.stat().st_size:
        raise CheckpointError(f"{path}: unpacks to {inside} bytes from {path.stat().st_size}: not a file torch wrote")


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
            [sys.executable, "-I", "-W", "ignore", "-c", _CHILD, root],
            input=json.dumps(order), capture_output=True, text=True, timeout=seconds, env=env, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise CheckpointError(f"{jobs[0][0]}: reading it took more than {seconds} s; it is no ordinary file") from error
    _report(done.stdout, done.returncode, done.stderr, dict.fromkeys(str(p.resolve()) for p, _ in jobs), jobs[0][0])


def _report(out: str, code: int, trace: str, known: Mapping[str, Any], first: Path) -> None:
    """Raise what the child says, if it says anything."""
    try:
        answer = json.loads(out.splitlines()[-1]) if out.strip() else {}
    except ValueError:
        answer = {}
    path = answer.get("path") if answer.get("path") in known else str(first)
    if answer.get("kind") == "code":
        raise UntrustedCode(
            f"{path}: a pickle with more than tensors in it, which could run code; not loaded. "
            f"Ask for a safetensors version of it. ({answer.get('text')})"
        )
    if code or answer.get("kind") != "done":
        text = answer.get("text") or (trace.strip().splitlines() or [f"exit status {code}"])[-1]
        raise CheckpointError(f"{path}: a damaged torch file, or none: {text[:300]}")
