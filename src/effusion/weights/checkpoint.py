"""Finding and opening checkpoints: one file, many shards or a dictionary; headers only at first."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..core import hub
from ..core.errors import CheckpointError, HubSilent, MissingFile
from ..core.files import parse_json
from . import gguf_file, torch_file
from .entries import Checkpoint, Entry, Packed
from .names import STEMS, WeightNames
from .safetensors_file import SafetensorsFile
from .scaled_float import is_scale, scaled

_MAX_INDEX = 64 << 20


def open_file(path: str | os.PathLike[str], pickles: bool = True) -> Checkpoint:
    """Open one weights file: safetensors, GGUF, or (with ``pickles``) one of torch's, in a child process."""
    return scaled(_open_raw([Path(path)], pickles)[0])


def _open_raw(paths: Sequence[Path], pickles: bool) -> list[Checkpoint]:
    """Weights files as they are, scales beside weights; torch files are converted by one child process."""
    pickled = [path for path in paths if torch_file.looks_like(path)]
    if pickled and not pickles:
        raise CheckpointError(
            f"{pickled[0]} is a torch file inside, whatever its name says; `use_safetensors=True` allows safetensors only"
        )
    place = dict(zip(pickled, torch_file.converted(pickled), strict=True)) if pickled else {}
    opened = []
    for path in paths:
        if _starts_with(path, gguf_file.MAGIC):
            opened.append(_open_gguf(path))
            continue
        file = SafetensorsFile(place.get(path, path))
        opened.append(Checkpoint(file.slices, {file.path: file}, str(path), file.metadata))
    return opened


def _starts_with(path: Path, magic: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(magic)) == magic


def _open_gguf(path: Path) -> Checkpoint:
    """A GGUF file: plain tensors as slices, the others with their codecs."""
    file = gguf_file.GGUFFile(path)
    entries: dict[str, Entry] = {}
    for name, part in file.slices.items():
        codec = file.codec(name)
        entries[name] = part if codec is None else Packed(part, codec)
    texts = {k: v for k, v in file.metadata.items() if isinstance(v, str)}
    return Checkpoint(entries, {file.path: file}, str(path), texts)


def open_checkpoint(
    repo: str | os.PathLike[str],
    *,
    stems: tuple[str, ...] = STEMS[:1],
    variant: str | None = None,
    use_safetensors: bool | None = None,
    **where: Any,
) -> Checkpoint:
    """Find and open the weights in a folder or hub repository.

    Args:
        stems: base names to look for, the first found wins.
        variant: ``"fp16"`` finds ``….fp16.safetensors`` and its sharded form.
        use_safetensors: ``True`` safetensors only, ``False`` torch files only, ``None`` either,
            safetensors first. Torch files are read with ``weights_only``.
        where: location arguments of :func:`effusion.core.hub.resolve_file`.

    Raises:
        CheckpointError: no such weights, or they are not what they should be (file and key named).
    """
    extensions = {True: ("safetensors",), False: ("bin",), None: ("safetensors", "bin")}[use_safetensors]
    looked: list[str] = []
    silent: HubSilent | None = None
    for extension in extensions:
        for stem in stems if extension != "bin" else _torch_stems(stems):
            names = WeightNames(stem, extension, variant)
            for name in (names.single, names.index):
                try:
                    path = hub.resolve_file(repo, name, **where)
                except HubSilent as error:  # then the cache is all there is
                    silent, where = error, {**where, "local_files_only": True}
                    looked.append(name)
                except MissingFile:
                    looked.append(name)
                else:
                    pickles = use_safetensors is not True
                    if name == names.single:
                        return open_file(path, pickles)
                    return open_index(path, repo, pickles, **where)
    raise silent or MissingFile(_nothing_found(repo, looked, variant, use_safetensors, where))


def _torch_stems(stems: tuple[str, ...]) -> tuple[str, ...]:
    return tuple("pytorch_model" if stem == "model" else stem for stem in stems)


def _nothing_found(
    repo: Any, looked: list[str], variant: str | None, use_safetensors: bool | None, where: Mapping[str, Any]
) -> str:
    place = f"{repo}/{where['subfolder']}" if where.get("subfolder") else f"{repo}"
    text = f"{place} has none of {', '.join(looked)}"
    if variant:
        return f"{text}; leave out `variant={variant!r}` to load the ordinary weights, if they are there"
    if use_safetensors is True:
        return f"{text}; `use_safetensors=None` allows torch files too"
    return f"{text}; if the weights are a variant (`….fp16.safetensors`), name it: `variant='fp16'`"


def open_index(
    path: Path, repo: str | os.PathLike[str] | None = None, pickles: bool = True, **where: Any
) -> Checkpoint:
    """Open the shards that the index file ``path`` lists; all headers are read and compared with it."""
    shard_of = read_index(path)
    shards = sorted(set(shard_of.values()))
    found = hub.sibling_files(path, shards, repo, **where)
    opened = dict(zip(shards, _open_raw([found[name] for name in shards], pickles), strict=True))
    # a scale that no index lists belongs to its weight all the same
    entries: dict[str, Entry] = {n: e for shard in opened.values() for n, e in shard.items() if is_scale(n)}
    for tensor, shard in shard_of.items():
        if tensor not in opened[shard]:
            raise CheckpointError(f"{path} says that tensor {tensor!r} is in {shard}, but it is not")
        entries[tensor] = opened[shard][tensor]
    first, *others = opened.values()
    whole = scaled(first.joined(others, entries, str(path)))
    return whole.replaced({name: entry for name, entry in whole.items() if name in shard_of})


def read_index(path: Path) -> dict[str, str]:
    """The ``weight_map`` of an index file: tensor name -> shard name, checked."""
    if path.stat().st_size > _MAX_INDEX:
        raise CheckpointError(f"{path}: {path.stat().st_size} bytes are too large for an index")
    try:
        index = parse_json(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no valid index: {error}") from error
    table = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(table, dict) or not table or not all(isinstance(v, str) for v in table.values()):
        raise CheckpointError(f"{path}: an index needs a `weight_map` from tensor names to file names")
    for shard in set(table.values()):
        hub.confine(shard, str(path))
    return table


def from_dict(state: Mapping[str, Any]) -> Checkpoint:
    """A dictionary of tensors as a checkpoint."""
    strange = [k for k, v in state.items() if not isinstance(v, torch.Tensor)]
    if strange:
        raise CheckpointError(f"a state dictionary maps names to tensors; these are none: {strange[:5]}")
    return Checkpoint(state)
