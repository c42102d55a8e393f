"""A checkpoint: tensors by name over one file, many shards or a dictionary; headers only at first."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core import hub
from ..core.errors import CheckpointError, HubSilent, MissingFile
from ..core.files import parse_json
from ..quant.codec import Codec, ScaledFloat
from . import gguf_file, torch_file
from .safetensors_file import SafetensorsFile
from .slices import TensorSlice

STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_MAX_INDEX = 64 << 20


@dataclass(frozen=True)
class Computed:
    """A tensor that has to be made from others: ``function`` of ``parts``, when it is asked for."""

    parts: tuple[Entry, ...]
    function: Callable[..., Tensor]
    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, function: Callable[..., Tensor], *parts: Entry) -> Computed:
        """Find shape and dtype by running ``function`` on ``meta``."""
        fake = function(*(torch.empty(p.shape, dtype=p.dtype, device="meta") for p in parts))
        return cls(parts, function, fake.dtype, tuple(fake.shape))

    @property
    def nbytes(self) -> int:
        """Bytes of what it is made from, as stored."""
        return sum(part.nbytes for part in self.parts)


@dataclass(frozen=True)
class Packed:
    """A tensor that is stored packed: ``part`` are its bytes, ``uint8``, and ``codec`` makes float32 values of them."""

    part: Entry
    codec: Codec
    dtype = torch.float32

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the values."""
        return self.codec.shape

    @property
    def nbytes(self) -> int:
        """Bytes as stored."""
        return self.part.nbytes


Entry = TensorSlice | Tensor | Computed | Packed


class Checkpoint(Mapping[str, Entry]):
    """What a checkpoint holds, by name: where each tensor lies, its dtype and shape.

    A value is a :class:`TensorSlice` (safetensors), the tensor itself (torch files, dictionaries), a
    :class:`Packed` or a :class:`Computed` one; all have ``dtype``, ``shape`` and ``nbytes``. :meth:`tensor` gives the tensor.
    """

    def __init__(
        self,
        entries: Mapping[str, Entry],
        files: Mapping[Path, SafetensorsFile | gguf_file.GGUFFile] | None = None,
        label: str = "the state dictionary",
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self._entries, self._files, self.label = dict(entries), dict(files or {}), label
        self.metadata = dict(metadata or {})

    def __getitem__(self, name: str) -> Entry:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def tensor(self, name: str, mapped: bool = True) -> Tensor:
        """Tensor ``name``; over the mapped file unless ``mapped`` is false."""
        return self._read(self._entries[name], mapped)

    def _read(self, entry: Entry, mapped: bool) -> Tensor:
        if isinstance(entry, Tensor):
            return entry
        if isinstance(entry, Computed):
            made = entry.function(*(self._read(part, mapped) for part in entry.parts))
            for part in entry.parts:
                self._release(part)
            return made
        if isinstance(entry, Packed):
            values = entry.codec.decode(self._read(entry.part, mapped), torch.float32)
            self._release(entry.part)
            return values
        return self._files[entry.path].read(entry, mapped)

    def packed(self, name: str, mapped: bool = True) -> tuple[Tensor, Codec] | None:
        """The bytes of tensor ``name`` and what unpacks them; ``None`` if it is stored plainly."""
        entry = self._entries[name]
        return (self._read(entry.part, mapped), entry.codec) if isinstance(entry, Packed) else None

    def release(self, name: str) -> None:
        """Give back the pages that reading ``name`` brought in, once its values were copied elsewhere."""
        self._release(self._entries[name])

    def _release(self, entry: Entry) -> None:
        if isinstance(entry, TensorSlice):
            self._files[entry.path].release(entry)

    def renamed(self, names: Mapping[str, str]) -> Checkpoint:
        """The same tensors under other names: ``names`` maps old to new; those not in it are left out."""
        return self.replaced({new: self._entries[old] for old, new in names.items()})

    def replaced(self, entries: Mapping[str, Entry]) -> Checkpoint:
        """Other entries over the same files."""
        return Checkpoint(entries, self._files, self.label, self.metadata)

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(self._files)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, as stored."""
        return sum(e.nbytes for e in self._entries.values())


@dataclass(frozen=True)
class WeightNames:
    """The file names that a checkpoint may have, for one stem, extension and variant."""

    stem: str
    extension: str
    variant: str | None = None

    @property
    def single(self) -> str:
        return f"{self.stem}{_dot(self.variant)}.{self.extension}"

    @property
    def index(self) -> str:
        return f"{self.stem}.{self.extension}.index{_dot(self.variant)}.json"

    def shard(self, number: int, count: int) -> str:
        return f"{self.stem}{_dot(self.variant)}-{number:05d}-of-{count:05d}.{self.extension}"


def _dot(text: str | None) -> str:
    return f".{text}" if text else ""


def open_file(path: str | os.PathLike[str]) -> Checkpoint:
    """Open one weights file: safetensors, GGUF, or one of torch's (in a child process)."""
    return open_files([Path(path)])[0]


def open_files(paths: Sequence[Path]) -> list[Checkpoint]:
    """Open several weights files; torch files are converted by one child process."""
    pickled = [path for path in paths if torch_file.looks_like(path)]
    place = dict(zip(pickled, torch_file.converted(pickled), strict=True)) if pickled else {}
    opened = []
    for path in paths:
        if _starts_with(path, gguf_file.MAGIC):
            opened.append(_open_gguf(path))
            continue
        file = SafetensorsFile(place.get(path, path))
        opened.append(Checkpoint(scaled(file), {file.path: file}, str(path), file.metadata))
    return opened


_SCALES = (".scale_weight", ".weight_scale")
_ASIDE = (".scale_input", ".input_scale", ".comfy_quant")  # hints for other programs' kernels


def scaled(file: SafetensorsFile) -> dict[str, Entry]:
    """The tensors of ``file``; eight-bit floats that have a scale beside them (as ComfyUI writes) as packed ones.

    Raises:
        CheckpointError: a scale that fits no rows of its weight.
    """
    entries: dict[str, Entry] = dict(file.slices)
    for name in file.slices:
        end = next((e for e in _SCALES if name.endswith(e)), None)
        weight = entries.get(f"{name.removesuffix(end)}.weight") if end else None
        if not isinstance(weight, TensorSlice) or weight.dtype.itemsize != 1 or not weight.dtype.is_floating_point:
            continue
        scale = file.slices[name]
        if prod(scale.shape) not in (1, weight.shape[0] if weight.shape else 1) or not scale.dtype.is_floating_point:
            raise CheckpointError(f"{file.path}: {name} {list(scale.shape)} is no scale of {list(weight.shape)}")
        codec = ScaledFloat(weight.dtype, weight.shape, partial(file.read, scale), prod(scale.shape) == 1)
        entries[f"{name.removesuffix(end or '')}.weight"] = Packed(replace(weight, dtype=torch.uint8), codec)
        del entries[name]
    marks = [n for n in entries if n.split(".")[-1] == "scaled_fp8"]
    packed = {n.removesuffix(".weight") for n, e in entries.items() if isinstance(e, Packed)}
    aside = [n for n in entries if n.endswith(_ASIDE) and n.rpartition(".")[0] in packed]
    return {n: e for n, e in entries.items() if n not in {*marks, *aside}}


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
                    return open_index(path, repo, **where) if name == names.index else open_file(path)
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


def open_index(path: Path, repo: str | os.PathLike[str] | None = None, **where: Any) -> Checkpoint:
    """Open the shards that the index file ``path`` lists; all headers are read and compared with it."""
    shard_of = read_index(path)
    shards = sorted(set(shard_of.values()))
    found = hub.sibling_files(path, shards, repo, **where)
    opened = dict(zip(shards, open_files([found[name] for name in shards]), strict=True))
    entries: dict[str, Entry] = {}
    files: dict[Path, SafetensorsFile | gguf_file.GGUFFile] = {}
    for tensor, shard in shard_of.items():
        if tensor not in opened[shard]:
            raise CheckpointError(f"{path} says that tensor {tensor!r} is in {shard}, but it is not")
        entries[tensor] = opened[shard][tensor]
    for checkpoint in opened.values():
        files.update(checkpoint._files)
    return Checkpoint(entries, files, str(path), next(iter(opened.values())).metadata)


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
