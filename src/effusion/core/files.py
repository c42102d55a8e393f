"""Files that appear whole or not at all, what those that did not leave behind, and JSON of strangers."""

from __future__ import annotations

import json
import os
import secrets
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

DAY = 24 * 3600.0


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write beside ``path``: it takes that place, complete and on the disk, if the block succeeds.

    A reader sees the old file or the new one, never a part. The name is new, so that nobody can have put a link there.
    """
    beside = path.with_name(f".{path.name[:100]}.{os.getpid()}-{secrets.token_hex(8)}.part")
    try:
        with beside.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_atomically(path: Path, data: bytes) -> None:
    """Make ``data`` the content of ``path`` in one step; see :func:`replacing`."""
    with replacing(path) as file:
        file.write(data)


def abandoned(path: Path, owner: int) -> bool:
    """Whether ``path`` is more than a day old and there is no process ``owner``, who made it, any more.

    Neither says enough alone: another machine may share the folder and has other processes, and a number may be
    that of somebody else by now.
    """
    try:
        age = time.time() - path.stat().st_mtime
    except OSError:
        return False
    return age > DAY and not runs(owner)


def runs(process: int) -> bool:
    """Whether there is a process of this number on this machine. Of others nothing is known on Windows: the answer is no."""
    if sys.platform == "win32":  # asking would end it there
        return process == os.getpid()
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # it is somebody else's
        return True
    return True


def parse_json(text: str) -> Any:
    """The value of a JSON ``text``, in which no key may be there twice. Infinity is a number, as the ecosystem has it.

    Raises:
        ValueError: it is no JSON, or has ``NaN`` or a number of thousands of digits in it.
        RecursionError: it is nested too deeply.
    """
    return json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_infinity)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {twice!r} is there twice")
    return found


def _infinity(word: str) -> float:
    if word == "NaN":
        raise ValueError("NaN is no number")
    return float(word)
