"""The child process that reads torch files: limits itself, then turns pickles into safetensors."""

from __future__ import annotations

import contextlib
import json
import pickle
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def main() -> None:
    """Read an order from standard input, do it, and answer with one line of JSON."""
    order = json.loads(sys.stdin.read())
    answer: dict[str, Any] = {"kind": "done"}
    import torch

    torch.set_num_threads(1)
    _limit(int(order["memory"]), int(order["written"]), int(order["seconds"]))
    path = ""
    try:
        for path, target in order["jobs"]:
            _convert(Path(path), Path(target))
    except pickle.UnpicklingError as error:
        answer = {"kind": "code", "path": path, "text": str(error).splitlines()[0][:200]}
    except Exception as error:  # torch raises anything, from EOFError to AttributeError, on damaged files
        answer = {"kind": "damaged", "path": path, "text": f"{type(error).__name__}: {str(error)[:200]}"}
    print(json.dumps(answer))  # noqa: T201


def _limit(memory: int, written: int, seconds: int) -> None:
    """From now on at most ``memory`` bytes more than there are, files of ``written`` bytes, and ``seconds`` of work."""
    try:
        import resource
    except ImportError:  # Windows has none
        return
    limits = {"CORE": 0, "CPU": seconds, "FSIZE": written}
    with contextlib.suppress(OSError, ValueError):  # where the system doesn't say how much there is, none can be set
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limits["AS"] = memory + pages * resource.getpagesize()
    for what, limit in limits.items():
        with contextlib.suppress(AttributeError, OSError, ValueError):  # each for itself: a system may lack one
            name = getattr(resource, f"RLIMIT_{what}")
            most = resource.getrlimit(name)[1]
            limit = limit if most == resource.RLIM_INFINITY else min(limit, most)
            resource.setrlimit(name, (limit, limit))


def _check_archive(path: Path) -> None:
    """Torch stores its records without compression, so an archive can't be larger inside than outside."""
    with zipfile.ZipFile(path) as archive:
        inside = sum(info.file_size for info in archive.infolist())
    if inside > path.stat().st_size:
        raise ValueError(f"unpacks to {inside} bytes from {path.stat().st_size}: not a file torch wrote")


def _convert(path: Path, target: Path) -> None:
    import torch

    from . import safetensors_file

    if zipfile.is_zipfile(path):
        _check_archive(path)
    value = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    tensors = {k: v.detach() for k, v in _tensors(value).items()}
    safetensors_file.write(target, tensors, {"format": "pt"})


def _tensors(value: Any) -> dict[str, Any]:
    """The dictionary of tensors in a torch file, out of the wrappings that training programs put around it."""
    import torch

    for name in ("state_dict", "module", "params_ema", "params"):
        nested = value.get(name) if isinstance(value, Mapping) else None
        value = nested if isinstance(nested, Mapping) else value
    if isinstance(value, Mapping) and isinstance(value.get("string_to_param"), Mapping):
        value = {"emb_params": next(iter(value["string_to_param"].values()))}  # a textual inversion of the first kind
    if not isinstance(value, Mapping):
        raise ValueError(f"holds a {type(value).__name__}, expected a dictionary of tensors")
    value = {**value, **_flat(value)}
    found = {k: v for k, v in value.items() if isinstance(k, str) and isinstance(v, torch.Tensor)}
    if not found:
        raise ValueError("holds no tensors by name")
    return found


def _flat(value: Mapping[Any, Any]) -> dict[str, Any]:
    """The two dictionaries that an IP-Adapter is made of, as one with dotted names, as its safetensors have them."""
    tables = {k: value[k] for k in ("image_proj", "ip_adapter") if isinstance(value.get(k), Mapping)}
    return {f"{k}.{n}": tensor for k, table in tables.items() for n, tensor in table.items()}
