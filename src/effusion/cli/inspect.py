"""``effusion inspect MODEL``: components, classes, parameters and bytes; reads headers, never weights."""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from ..weights.names import EXTENSIONS, PICKLES, Named, parse
from .generate import model_path

_PICKLED = "not read: a torch file"


@dataclass
class Component:
    """One part of a model, as its files describe it."""

    name: str
    cls: str
    library: str = ""
    parameters: int = 0
    nbytes: int = 0
    dtypes: dict[str, int] = field(default_factory=dict)
    variants: list[str] = field(default_factory=list)
    note: str = ""


def add_parser(subparsers: Any) -> None:
    """The verb's arguments."""
    parser = subparsers.add_parser("inspect", help="what a model consists of, without loading its weights")
    parser.add_argument("model", help="`demo`, a folder, a weights file, or the name of a repository on the hub")
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> None:
    """Print the table of components."""
    found = components(model_path(args.model), args.revision)
    if args.json:
        print(json.dumps([asdict(c) for c in found], indent=2))
        return
    print("\n".join(table(found)))


def components(model: str, revision: str | None = None) -> list[Component]:
    """The components of a pipeline or network: a folder, one weights file, or a repository.

    Raises:
        CheckpointError: it is none of these, or a file in it is broken.
    """
    from ..core.config import read_json
    from ..core.errors import CheckpointError

    path = Path(model)
    if path.is_file():
        return _inside(path)
    source = _Folder(path) if path.is_dir() else _Repository(model, revision)
    names = source.names()
    if "model_index.json" in names:
        index = read_json(source.path("model_index.json"))
        parts = [_part(source, names, key, entry) for key, entry in index.items() if _is_component(entry)]
        return [Component("pipeline", str(index.get("_class_name", "?")), "diffusers"), *parts]
    here = [name for name in names if "/" not in name]
    if "config.json" in here or any(_weights_name(name) for name in here):
        config = read_json(source.path("config.json")) if "config.json" in here else {}
        return [_weights(Component(path.name, _class_of(config)), source, "", here)]
    raise CheckpointError(
        f"{model} has no model_index.json (a pipeline), no config.json and no weights (a network); "
        f"it holds {', '.join(sorted(here)[:8]) or 'nothing'}"
    )


def _inside(path: Path) -> list[Component]:
    """One weights file: what it is, told by its tensors, and the networks that are in it."""
    from ..weights import torch_file
    from ..weights.checkpoint import open_file
    from ..weights.recognise import recognise

    if torch_file.looks_like(path):
        return [Component(path.name, "", "file", nbytes=path.stat().st_size, note=_PICKLED)]
    checkpoint = open_file(path)
    verdict = recognise(checkpoint)
    whole = Component(path.name, verdict.pipeline or "", "file", note=verdict.describe())
    if len(verdict.parts) < 2:
        return [_counted(whole, checkpoint)]
    parts = ((Component(n, p.class_name, p.library), p.read(checkpoint)) for n, p in verdict.parts.items())
    return [whole, *(_counted(component, inside) for component, inside in parts)]


def _counted(component: Component, checkpoint: Any) -> Component:
    from ..weights.entries import Packed
    from ..weights.safetensors_file import DTYPE_NAMES

    dtypes: Counter[str] = Counter()
    for entry in checkpoint.values():
        dtypes[entry.codec.label if isinstance(entry, Packed) else DTYPE_NAMES[entry.dtype]] += prod(entry.shape)
    component.parameters, component.nbytes, component.dtypes = sum(dtypes.values()), checkpoint.nbytes, dict(dtypes)
    return component


def _is_component(entry: Any) -> bool:
    return isinstance(entry, list) and len(entry) == 2 and entry[1] is not None


def _class_of(config: dict[str, Any]) -> str:
    architectures = config.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else None
    return str(config.get("_class_name") or first or config.get("model_type", "?"))


def _weights_name(name: str) -> Named | None:
    """What the name of a file that can be counted or weighed says; ``None`` of any other."""
    found = parse(name)
    return found if found is not None and not found.index and found.extension != "gguf" else None


def _part(source: _Folder, names: list[str], key: str, entry: list[Any]) -> Component:
    files = [name.removeprefix(f"{key}/") for name in names if name.startswith(f"{key}/")]
    component = Component(key, str(entry[1]), str(entry[0]))
    if not files:
        component.note = "its folder is missing"
    return _weights(component, source, key, files)


def _weights(component: Component, source: _Folder, folder: str, files: Iterable[str]) -> Component:
    """Count what the headers of the weights in ``folder`` say; the ordinary weights, else the first variant."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name in sorted(files):
        if (found := _weights_name(name)) is not None:
            groups[found.variant or "", found.extension].append(name)
    kinds = {kind for _, kind in groups}
    kind = next((k for k in EXTENSIONS if k in kinds), "")
    variants = [variant for variant, k in groups if k == kind]
    if not variants:
        return component
    chosen = groups[min(variants), kind]
    component.variants = sorted(v for v in variants if v)
    dtypes: Counter[str] = Counter()
    for name in chosen:
        inside = f"{folder}/{name}" if folder else name
        if kind in PICKLES:
            component.note = _PICKLED
            component.nbytes += source.size(inside)
            continue
        for dtype, shape, nbytes in source.header(inside):
            dtypes[dtype] += prod(shape)
            component.nbytes += nbytes
    component.parameters, component.dtypes = sum(dtypes.values()), dict(dtypes)
    return component


class _Folder:
    """A folder on this machine."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def names(self) -> list[str]:
        found = (p.relative_to(self.root) for pattern in ("*", "*/*") for p in self.root.glob(pattern))
        return [p.as_posix() for p in found if (self.root / p).is_file()]

    def path(self, name: str) -> Path:
        return self.root / name

    def size(self, name: str) -> int:
        return self.path(name).stat().st_size

    def header(self, name: str) -> list[tuple[str, tuple[int, ...], int]]:
        """(dtype, shape, bytes) of every tensor in a safetensors file."""
        from ..weights.safetensors_file import SafetensorsFile

        entries = SafetensorsFile(self.path(name)).slices.values()
        return [(str(e.dtype).removeprefix("torch."), e.shape, e.nbytes) for e in entries]


class _Repository(_Folder):
    """A repository on the hub: small files are downloaded, of weights only the headers are asked for."""

    def __init__(self, repo: str, revision: str | None) -> None:
        self.repo, self.revision = repo, revision

    def names(self) -> list[str]:
        from ..core import hub

        commit, names = hub.repo_files(self.repo, revision=self.revision)
        self.revision = commit
        return [name for name in names if name.count("/") <= 1]

    def path(self, name: str) -> Path:
        from ..core import hub

        return hub.resolve_file(self.repo, name, revision=self.revision)

    def size(self, name: str) -> int:
        from huggingface_hub import HfApi

        found = HfApi().get_paths_info(self.repo, [name], revision=self.revision)
        return sum(getattr(entry, "size", 0) for entry in found)

    def header(self, name: str) -> list[tuple[str, tuple[int, ...], int]]:
        from huggingface_hub import HfApi

        tensors = HfApi().parse_safetensors_file_metadata(self.repo, name, revision=self.revision).tensors.values()
        return [(t.dtype.lower(), tuple(t.shape), t.data_offsets[1] - t.data_offsets[0]) for t in tensors]


def table(found: list[Component]) -> list[str]:
    """The components as lines of text, with a total."""
    rows = [("component", "class", "parameters", "bytes", "dtype", "")]
    for c in found:
        dtype = "+".join(sorted(c.dtypes, key=lambda name: -c.dtypes[name]))
        also = f"variants: {', '.join(c.variants)}" if c.variants else ""
        rows.append((c.name, c.cls, count(c.parameters), size(c.nbytes), dtype, c.note or also))
    if len(found) > 1:
        rows.append(("total", "", count(sum(c.parameters for c in found)), size(sum(c.nbytes for c in found)), "", ""))
    widths = [max(len(row[i]) for row in rows) for i in range(6)]
    right = (2, 3)
    return [
        "  ".join(
            cell.rjust(w) if i in right else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def count(n: int) -> str:
    """``859520964`` as ``859.5 M``."""
    return _scaled(n, 1000, ("", " k", " M", " G"))


def size(n: int) -> str:
    """Bytes as ``1.6 GiB``."""
    return _scaled(n, 1024, (" B", " KiB", " MiB", " GiB"))


def _scaled(n: float, base: int, units: tuple[str, ...]) -> str:
    if not n:
        return "-"
    for unit in units:
        if n < base or unit == units[-1]:
            break
        n /= base
    return f"{n:.0f}{unit}" if unit == units[0] else f"{n:.1f}{unit}"
