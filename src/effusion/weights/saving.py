"""Writing checkpoints: split into shards, written aside, and moved into place only when everything is complete."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import CheckpointError
from ..core.files import abandoned
from . import names as weight_names
from . import safetensors_file

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_ASIDE = ".saving-"


def parse_size(size: int | str) -> int:
    """``"5GB"`` (decimal), ``"5GiB"`` (binary) or a number of bytes, as bytes."""
    if isinstance(size, int) and size > 0:
        return size
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?B)\s*", str(size).upper())
    if not found or not float(found[1]):
        raise ValueError(f"size {size!r}: give bytes as a positive number, or text like '500MB', '5GB', '5GiB'")
    return int(float(found[1]) * _UNITS[found[2]])


@contextlib.contextmanager
def staged(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A scratch folder whose files replace those in ``folder`` one by one if the block succeeds.

    If it fails, or the process dies, ``folder`` is as it was (what a dead process left is swept up
    by a save a day later). Files are renamed, so readers of old ones, mappings too, keep them.

    Raises:
        CheckpointError: ``folder`` is a file.
    """
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target} is a file; a folder is needed to save to")
    created = not target.exists()
    target.mkdir(parents=True, exist_ok=True)
    _sweep(target)
    aside = Path(tempfile.mkdtemp(prefix=f"{_ASIDE}{os.getpid()}-", dir=target))
    try:
        yield aside
        _move_all(aside, target)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        if created:
            with contextlib.suppress(OSError):
                target.rmdir()
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _move_all(aside: Path, target: Path) -> None:
    """Weights first, then what refers to them: configs and indices last."""
    files = [p for p in aside.rglob("*") if p.is_file()]
    for path in sorted(files, key=lambda p: (p.suffix == ".json", "index" in p.name, str(p))):
        place = target / path.relative_to(aside)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, place)


def _sweep(folder: Path) -> None:
    for left in folder.glob(_ASIDE + "*"):
        owner = left.name.removeprefix(_ASIDE).split("-")[0]
        if owner.isdecimal() and abandoned(left, int(owner)):
            shutil.rmtree(left, ignore_errors=True)


def split(tensors: Mapping[str, Tensor], limit: int) -> list[dict[str, Tensor]]:
    """``tensors`` in order, cut into shards of at most ``limit`` bytes; a larger tensor gets its own."""
    shards: list[dict[str, Tensor]] = [{}]
    room = limit
    for name, tensor in tensors.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = limit
        shards[-1][name] = tensor
        room -= tensor.nbytes
    return shards


def save_weights(
    folder: Path,
    tensors: Mapping[str, Tensor],
    *,
    stem: str = "diffusion_pytorch_model",
    variant: str | None = None,
    max_shard_size: int | str = "10GB",
    safe_serialization: bool = True,
    save_function: Callable[..., Any] | None = None,
) -> list[str]:
    """Write ``tensors`` into ``folder``, sharded if they exceed ``max_shard_size``.

    Returns:
        The names of the files written.
    """
    names = weight_names.WeightNames(stem, "safetensors" if safe_serialization else "bin", variant)
    shards = split(tensors, parse_size(max_shard_size))
    write = save_function or (_write_safetensors if safe_serialization else torch.save)
    files = [names.single] if len(shards) == 1 else [names.shard(i + 1, len(shards)) for i in range(len(shards))]
    for file, shard in zip(files, shards, strict=True):
        write(shard, folder / file)
    if len(shards) == 1:
        return files
    weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / names.index).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return [*files, names.index]


def _write_safetensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    safetensors_file.write(path, tensors, {"format": "pt"})


def remove_stale(folder: Path, written: list[str], stem: str, variant: str | None) -> None:
    """After a save: remove shards and indices of the same stem and variant that the new save does not have."""
    for path in folder.iterdir():
        found = weight_names.parse(path.name)
        if found is None or found.extension not in ("safetensors", "bin"):
            continue
        if (found.stem, found.variant) == (stem, variant) and path.name not in written and path.is_file():
            path.unlink()
