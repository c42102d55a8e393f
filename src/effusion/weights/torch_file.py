"""Torch's own files (``.bin``, ``.pt``, ``.ckpt``): read with ``weights_only``, so that no code in them runs."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import CheckpointError, UntrustedCode

_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"


def looks_like(path: Path) -> bool:
    """Whether ``path`` starts like a torch file: a zip archive or a bare pickle."""
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: there is no such file") from error
    return head.startswith(_ZIP) or (
        head.startswith(_PICKLE) and head[1:2] in b"\x02\x03\x04\x05" and head[8:9] != b"{"
    )


def load(path: Path) -> dict[str, Tensor]:
    """The tensors of a torch file, mapped where its format allows.

    Raises:
        UntrustedCode: the file holds anything but tensors and plain containers.
        CheckpointError: it is damaged, or holds no dictionary of tensors.
    """
    zipped = zipfile.is_zipfile(path)
    if zipped:
        _check_archive(path)
    try:
        value = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        raise UntrustedCode(
            f"{path}: a pickle with more than tensors in it, which could run code; not loaded. "
            f"Ask for a safetensors version of it. ({str(error).splitlines()[0][:200]})"
        ) from error
    except Exception as error:  # torch raises anything, from EOFError to AttributeError, on damaged files
        raise CheckpointError(f"{path}: a damaged torch file ({type(error).__name__}: {str(error)[:200]})") from error
    return _tensors(value, path)


def _check_archive(path: Path) -> None:
    """Torch stores its records without compression, so an archive can't be larger inside than outside."""
    with zipfile.ZipFile(path) as archive:
        inside = sum(info.file_size for info in archive.infolist())
    if inside > path.stat().st_size:
        raise CheckpointError(f"{path}: unpacks to {inside} bytes from {path.stat().st_size}: not a file torch wrote")


def _tensors(value: Any, path: Path) -> dict[str, Tensor]:
    nested = value.get("state_dict") if isinstance(value, Mapping) else None
    value = nested if isinstance(nested, Mapping) else value
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{path}: holds a {type(value).__name__}, expected a dictionary of tensors")
    found = {k: v for k, v in value.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if not found:
        raise CheckpointError(f"{path}: holds no tensors by name")
    return found
