"""Putting a checkpoint's tensors into a network: matched strictly by name and shape, assigned and not copied."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import CheckpointError
from ..quant.codec import Codec
from .entries import Checkpoint
from .slices import TensorSlice


@dataclass
class Match:
    """How a checkpoint's names meet a network's; lists are empty where all is well."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)  # name, file, network

    def as_info(self) -> dict[str, list[Any]]:
        """The dictionary that ``output_loading_info=True`` answers with."""
        return {
            "missing_keys": self.missing,
            "unexpected_keys": self.unexpected,
            "mismatched_keys": self.mismatched,
            "error_msgs": [],
        }

    def check(self, what: str, label: str, ignore_mismatched: bool = False) -> None:
        """Raise :class:`CheckpointError` listing every difference, if there are any."""
        lines = []
        if self.missing:
            lines.append(f"{len(self.missing)} missing in the file: {_some(self.missing)}")
        if self.unexpected:
            lines.append(f"{len(self.unexpected)} that {what} does not have: {_some(self.unexpected)}")
        if self.mismatched and not ignore_mismatched:
            shapes = [f"{n} is {list(a)} in the file, {list(b)} here" for n, a, b in self.mismatched]
            lines.append(f"{len(shapes)} of another shape: {_some(shapes)} (`ignore_mismatched_sizes=True` skips them)")
        if lines:
            raise CheckpointError(f"{label} does not fit {what}:\n  " + "\n  ".join(lines))


def _some(names: Sequence[str], most: int = 40) -> str:
    more = f", … and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def expected_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers of ``model`` by name, tied ones under each of their names."""
    return model.state_dict(keep_vars=True)


def match(model: nn.Module, checkpoint: Checkpoint, ignore: Sequence[str] = ()) -> Match:
    """Compare the names and shapes of ``checkpoint`` with those of ``model``, before anything is read.

    Args:
        ignore: patterns (``fnmatch``) of names that may be absent from the model.

    Raises:
        CheckpointError: a tensor of whole numbers where the network has floating-point weights.
    """
    wanted = expected_tensors(model)
    present = {id(wanted[name]) for name in checkpoint if name in wanted}
    found = Match()
    found.missing = [n for n, t in wanted.items() if n not in checkpoint and id(t) not in present]
    found.unexpected = [n for n in checkpoint if n not in wanted and not any(fnmatchcase(n, p) for p in ignore)]
    for name, target in wanted.items():
        if name not in checkpoint:
            continue
        entry = checkpoint[name]
        if tuple(entry.shape) != tuple(target.shape):
            found.mismatched.append((name, tuple(entry.shape), tuple(target.shape)))
        elif target.is_floating_point() and not (entry.dtype.is_floating_point or entry.dtype.is_complex):
            raise CheckpointError(f"{checkpoint.label}: {name} is {entry.dtype}, expected floating-point weights")
    return found


def assign(
    model: nn.Module,
    checkpoint: Checkpoint,
    dtype: torch.dtype | None = None,
    keep_in_fp32: Sequence[str] = (),
    device: torch.device | str | None = None,
    mapped: bool = True,
    packed: dict[str, tuple[Codec, torch.dtype]] | None = None,
) -> dict[str, TensorSlice]:
    """Give every tensor of ``model`` that ``checkpoint`` has to it; anything else is left as it is.

    A tensor that needs no conversion is the mapped file itself (copy-on-write, so writing to it
    never reaches the file). One that does is converted alone and its pages are given back: the peak
    is the weights plus one tensor, of each shard that is read at the same time.

    Args:
        dtype: what floating-point weights become; ``None`` keeps what is stored.
        keep_in_fp32: parts of module paths whose weights become float32 whatever ``dtype`` says.
        device: where the tensors go.
        mapped: read into memory instead of mapping, if false.
        packed: what is stored packed is assigned so, as bytes, and noted here with its codec and the dtype that it
            is to be unpacked to; unpacked at once if ``None``.

    Returns:
        For every name, where its values lie in the files (as stored), for those that want to read them again.
    """
    wanted = expected_tensors(model)
    jobs: dict[int, _Job] = {}
    for name, old in wanted.items():
        if id(old) not in jobs:
            source = name if name in checkpoint else next(iter(_tied(model, old, checkpoint)), None)
            if source is not None and tuple(checkpoint[source].shape) == tuple(old.shape):
                jobs[id(old)] = _Job(source, old, _target_dtype(name, old, dtype, keep_in_fp32))
    _carry_out(list(jobs.values()), checkpoint, device, mapped, packed is not None)
    slices: dict[str, TensorSlice] = {}
    for name, old in wanted.items():
        job = jobs.get(id(old))
        if job is None:
            continue
        if packed is not None and job.codec is not None:
            packed[name] = job.codec, job.dtype or torch.float32
        entry = checkpoint[job.source]
        if isinstance(entry, TensorSlice):
            slices[name] = entry
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        table: dict[str, Any] = module._parameters if leaf in module._parameters else module._buffers
        table[leaf] = job.value
    return slices


@dataclass
class _Job:
    """One tensor of a network: where it comes from, what it becomes."""

    source: str
    old: Tensor
    dtype: torch.dtype | None
    value: Tensor | None = None
    codec: Codec | None = None

    def run(self, checkpoint: Checkpoint, device: torch.device | str | None, mapped: bool, packed: bool) -> None:
        raw = checkpoint.packed(self.source, mapped) if packed and isinstance(self.old, nn.Parameter) else None
        if raw is None:
            self.value = _fresh(checkpoint, self.source, self.old, self.dtype, device, mapped)
        else:
            self.value, self.codec = nn.Parameter(raw[0].to(device), requires_grad=False), raw[1]


def _carry_out(
    jobs: Sequence[_Job], checkpoint: Checkpoint, device: torch.device | str | None, mapped: bool, packed: bool
) -> None:
    """Do ``jobs`` in order; where copies are made, those of different shards at the same time."""
    shards: dict[Path | None, list[_Job]] = {}
    for job in jobs:
        shards.setdefault(checkpoint.place(job.source), []).append(job)

    def one(shard: list[_Job]) -> None:
        for job in shard:
            job.run(checkpoint, device, mapped, packed)

    copies = device is not None or not mapped or any(j.dtype not in (None, checkpoint[j.source].dtype) for j in jobs)
    workers = min(len(shards), os.cpu_count() or 1)
    if workers < 2 or not copies:
        one(list(jobs))
        return
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(one, shards.values()))


def _tied(model: nn.Module, tensor: Tensor, checkpoint: Checkpoint) -> list[str]:
    return [n for n, t in expected_tensors(model).items() if t is tensor and n in checkpoint]


def _target_dtype(name: str, old: Tensor, dtype: torch.dtype | None, keep_in_fp32: Sequence[str]) -> torch.dtype | None:
    if not old.is_floating_point():
        return old.dtype
    if keep_in_fp32 and set(name.split(".")) & set(keep_in_fp32):
        return torch.float32
    return dtype


def _fresh(
    checkpoint: Checkpoint,
    name: str,
    old: Tensor,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    mapped: bool,
) -> Tensor:
    stored = checkpoint.tensor(name, mapped)
    value = stored.to(device=device, dtype=dtype)
    if value is not stored:
        checkpoint.release(name)
    if isinstance(old, nn.Parameter):
        return nn.Parameter(value, requires_grad=old.requires_grad and value.is_floating_point())
    return value


def meta_tensors(model: nn.Module) -> list[str]:
    """Names of the tensors of ``model`` that still have no values, buffers that are not saved included."""
    tensors: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return [name for name, tensor in tensors.items() if tensor.is_meta]


def rename(checkpoint: Checkpoint, table: Mapping[str, str], wanted: Mapping[str, Any]) -> Checkpoint:
    """``checkpoint`` with the old names in ``table`` replaced.

    A table maps a part of a dotted name to its successor (``"key": "to_k"``,
    ``"query.bias": "to_q.bias"``); a name that the network has already is never touched.
    """
    names: dict[str, str] = {}
    taken = set()
    for name in checkpoint:
        new = name if name in wanted else _renamed(name, table, wanted)
        if new in taken:
            raise CheckpointError(f"{checkpoint.label}: {name} and another tensor are both an old form of {new}")
        names[name] = new
        taken.add(new)
    return checkpoint.renamed(names)


def _renamed(name: str, table: Mapping[str, str], wanted: Mapping[str, Any]) -> str:
    dotted = f".{name}."
    for old, new in table.items():
        candidate = dotted.replace(f".{old.strip('.')}.", f".{new.strip('.')}.").strip(".")
        if candidate != name:
            dotted = f".{candidate}."
    result = dotted.strip(".")
    return result if result in wanted else name


def fit_prefix(checkpoint: Checkpoint, wanted: Mapping[str, Tensor], prefixes: Sequence[str]) -> Checkpoint | None:
    """``checkpoint`` with one of ``prefixes`` dropped from, or put before, its names, so that ``wanted`` is complete.

    ``None`` if neither the names as they are nor any such change gives all of them. Names that mean
    nothing to the network stay as they are.
    """
    drop = [(prefix, "") for prefix in prefixes]
    for old_prefix, new_prefix in (("", ""), *drop, *((new, old) for old, new in drop)):
        changed = {name: new_prefix + name.removeprefix(old_prefix) for name in checkpoint}
        known = {old: new for old, new in changed.items() if new in wanted}
        present = {id(wanted[new]) for new in known.values()}
        if len(set(known.values())) == len(known) and all(id(t) in present for t in wanted.values()):
            return checkpoint.renamed({**{n: n for n in checkpoint if n not in known}, **known})
    return None
