"""What a checkpoint holds: tensors by name, where they lie, and how they are made or unpacked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..quant.codec import Codec
from .gguf_file import GGUFFile
from .safetensors_file import SafetensorsFile
from .slices import TensorSlice


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
        files: Mapping[Path, SafetensorsFile | GGUFFile] | None = None,
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

    def place(self, name: str) -> Path | None:
        """The file that tensor ``name`` is in, the first one if it is made from several; ``None`` if it is in none."""
        entry = self._entries[name]
        while isinstance(entry, (Packed, Computed)):
            parts = (entry.part,) if isinstance(entry, Packed) else entry.parts
            if not parts:
                return None
            entry = parts[0]
        return entry.path if isinstance(entry, TensorSlice) else None

    def renamed(self, names: Mapping[str, str]) -> Checkpoint:
        """The same tensors under other names: ``names`` maps old to new; those not in it are left out."""
        return self.replaced({new: self._entries[old] for old, new in names.items()})

    def replaced(self, entries: Mapping[str, Entry]) -> Checkpoint:
        """Other entries over the same files."""
        return Checkpoint(entries, self._files, self.label, self.metadata)

    def joined(self, others: Iterable[Checkpoint], entries: Mapping[str, Entry], label: str) -> Checkpoint:
        """``entries`` over the files of this checkpoint and of ``others``."""
        files = {path: file for part in (self, *others) for path, file in part._files.items()}
        return Checkpoint(entries, files, label, self.metadata)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, as stored."""
        return sum(e.nbytes for e in self._entries.values())
