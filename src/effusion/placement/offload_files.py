"""Folders that weights are offloaded to: files that this process writes, and removes again."""

from __future__ import annotations

import contextlib
import os
import struct
import tempfile
from pathlib import Path

from torch import Tensor

from ..core.errors import CheckpointError
from ..core.files import runs
from .sources import flat_bytes


def check_folder(folder: str | os.PathLike[str], nbytes: int) -> Path:
    """``folder``, made if need be; raises before anything is moved if it can't take ``nbytes``.

    Raises:
        CheckpointError: not a folder, not writable, or not enough room.
    """
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path, prefix=f".effusion-{os.getpid()}-", suffix=".part") as probe:
            probe.write(b"1")
        stat = os.statvfs(path) if hasattr(os, "statvfs") else None
    except OSError as error:
        raise CheckpointError(
            f"weights can't be offloaded to {path}: {error.strerror or error}. Give a folder that can be written to"
        ) from error
    if stat is not None and stat.f_bavail * stat.f_frsize < nbytes:
        raise CheckpointError(
            f"weights can't be offloaded to {path}: {nbytes} bytes are needed, {stat.f_bavail * stat.f_frsize} are free. "
            f"Give a folder on a disk with more room"
        )
    _sweep(path)
    return path


def _sweep(folder: Path) -> None:
    """Remove what processes that were killed left behind; their files carry their process id."""
    for pattern in ("effusion-*-*.safetensors", ".effusion-*.part"):
        for file in folder.glob(pattern):
            owner = file.name.split("-")[1]
            if owner.isdecimal() and not runs(int(owner)):
                with contextlib.suppress(OSError):  # another process sweeps too, or has it open where that matters
                    file.unlink()


def write_offload_file(path: Path, tensors: list[Tensor]) -> list[Tensor]:
    """Write dense ``tensors`` to ``path``; the same tensors again, as views of a mapping of it.

    The order of dimensions in memory (channels last, say) is kept: bytes are written as they lie.
    Tensors start at multiples of 64 bytes, as they do in memory.

    Raises:
        CheckpointError: the disk is full or the folder not writable; nothing is left behind.
    """
    from ..weights.slices import MappedFile, TensorSlice

    header, offsets = _offload_header(tensors)
    beside = path.with_name(f".{path.stem}.part")
    try:
        with beside.open("wb") as file:
            file.write(header)
            for tensor, at in zip(tensors, offsets, strict=True):
                file.write(b"\0" * (at - file.tell()))
                if tensor.numel():
                    file.write(memoryview(flat_bytes(tensor).cpu().numpy()))
            file.flush()
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise CheckpointError(f"offloading weights to {path} failed: {error.strerror or error}") from error
    mapped = MappedFile(path)
    out = []
    for tensor, at in zip(tensors, offsets, strict=True):
        part = TensorSlice(path, at, tensor.numel() * tensor.element_size(), tensor.dtype, (tensor.numel(),))
        out.append(mapped.tensor(part).as_strided(tensor.shape, tensor.stride()))
    return out


def _offload_header(tensors: list[Tensor]) -> tuple[bytes, list[int]]:
    """A safetensors header in which every tensor is bytes; gaps between tensors are tensors of padding."""
    entries, offsets, at = [], [], 0
    for index, tensor in enumerate(tensors):
        pad = -at % 64
        if pad:
            entries.append(f'"pad.{index}":{{"dtype":"U8","shape":[{pad}],"data_offsets":[{at},{at + pad}]}}')
            at += pad
        nbytes = tensor.numel() * tensor.element_size()
        entries.append(f'"{index}":{{"dtype":"U8","shape":[{nbytes}],"data_offsets":[{at},{at + nbytes}]}}')
        offsets.append(at)
        at += nbytes
    text = ("{" + ",".join(entries) + "}").encode()
    text += b" " * (-(len(text) + 8) % 64)
    head = struct.pack("<Q", len(text)) + text
    return head, [len(head) + offset for offset in offsets]
