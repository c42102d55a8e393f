"""One file with everything: opening it wherever it is, and writing networks in their original layout."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from torch import Tensor

from ..core import hub
from ..core.errors import CheckpointError, MissingFile
from ..quant.codec import Codec
from ..quant.ggml import GGML
from . import gguf_writing, safetensors_file
from .checkpoint import from_dict, open_file
from .entries import Checkpoint
from .layouts import stable_diffusion
from .layouts.known import layout_of
from .layouts.table import Table, to_theirs, translate

Source = str | os.PathLike[str] | Mapping[str, Tensor]
_LINK = re.compile(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/(.+)")
_INSIDE = re.compile(r"(?P<repo>[^/]+/[^/]+)/(?:(?:blob|resolve|raw)/(?P<revision>[^/]+)/)?(?P<name>.+\.\w+)")


def open_source(source: Source, pickles: bool = True, **where: Any) -> Checkpoint:
    """Open a file, a file of a hub repository (a link, or ``owner/name/path/file``), or a dictionary of tensors.

    Args:
        pickles: torch files too, which a child process reads.
        where: location arguments of :func:`effusion.core.hub.resolve_file`.

    Raises:
        CheckpointError: it is nowhere to be found, or not what it should be.
    """
    if isinstance(source, Mapping):
        return from_dict(source)
    path = Path(source)
    if path.is_file():
        return open_file(path, pickles)
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; name the file in it, or use `from_pretrained`")
    text = str(source)
    link = _LINK.fullmatch(text)
    found = _INSIDE.fullmatch(re.split("[?#]", link[1])[0] if link else text)
    if found is None or ("://" in text and link is None):
        raise MissingFile(f"{text} is no file here, and no link to a file on the hub (`owner/name/file.safetensors`)")
    where = {k: v for k, v in where.items() if k != "subfolder"}
    if found["revision"] is not None:
        where["revision"] = unquote(found["revision"])
    name = unquote(found["name"]) if link else found["name"]
    return open_file(hub.resolve_file(found["repo"], name, **where), pickles)


# the prefix that lone networks have in their own files
LONE = {"UNet2DConditionModel": "model.diffusion_model.", "ControlNetModel": "control_model."}


# what GGUF files call their architecture
ARCHITECTURES = {
    "FluxTransformer2DModel": "flux",
    "SD3Transformer2DModel": "sd3",
    "PixArtTransformer2DModel": "pixart",
    "QwenImageTransformer2DModel": "qwen_image",
}


def write_gguf(
    path: str | os.PathLike[str], model: Any, packing: str | None, codec_of: Callable[[str], Codec | None]
) -> None:
    """Write a network as GGUF in its original layout; what rests packed is written as it is.

    Raises:
        ValueError: no such layout, or packed weights whose names there stand for differently packed ones.
    """
    name = type(model).__name__
    state = original_state(model, "")
    table = Table(layout_of(name, model.config) or ())
    ours = {n: codec for n in model.state_dict() if (codec := codec_of(n)) is not None}
    codecs: dict[str, Codec] = {}
    for own, codec in ours.items():
        hit = translate(table, own, reverse=True)
        if hit is None:
            continue
        together = [ours.get(n) for n in hit.fused or (own,)]
        kinds = {c.label if c is not None else "plain" for c in together}
        if len(kinds) > 1 or hit.op in ("pixel", "transpose"):
            raise ValueError(f"{hit.names[0]}: its parts rest as {sorted(kinds)}; `dequantize()` first")
        rows = sum(c.shape[0] for c in together if c is not None)
        whole = (rows, *codec.shape[1:])
        codecs[hit.names[0]] = replace(codec, shape=whole) if isinstance(codec, GGML) else codec
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    gguf_writing.write(target, state, ARCHITECTURES.get(name, name), packing, codecs)


def original_state(model: Any, prefix: str | None = None) -> dict[str, Tensor]:
    """The weights of a network under the names of its original layout, below ``prefix`` (its usual one if ``None``).

    Raises:
        ValueError: there is no such layout, or it has no name for one of the weights.
    """
    name = type(model).__name__
    table = layout_of(name, model.config)
    if table is None:
        raise ValueError(f"{name} has no original layout that is known here; use `save_pretrained`")
    return to_theirs(model.state_dict(), table, LONE.get(name, "") if prefix is None else prefix)


def text_state(model: Any, prefix: str, kind: str) -> dict[str, Tensor]:
    """The weights of a text encoder as single files have them.

    Args:
        kind: ``"clip"`` (names of transformers), ``"open_clip"`` (names of OpenCLIP) or ``"t5"``.
    """
    state = model.state_dict()
    if kind == "t5":
        return {prefix + name: tensor for name, tensor in state.items() if name != "encoder.embed_tokens.weight"}
    named = {("" if n.startswith("text_") else "text_model.") + n: t for n, t in state.items()}
    if kind == "open_clip":
        return to_theirs(named, stable_diffusion.OPEN_CLIP, prefix)
    return {prefix + name: tensor for name, tensor in named.items()}


def write_single(path: str | os.PathLike[str], state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write one safetensors file in one step, the folder created if need be."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    safetensors_file.write(target, state, {"format": "pt", **metadata})


def pipeline_state(components: Mapping[str, Any], prefixes: Sequence[tuple[str, str, str]]) -> dict[str, Tensor]:
    """The weights of several components in one dictionary; ``prefixes`` are (component, prefix, kind)."""
    state: dict[str, Tensor] = {}
    for name, prefix, kind in prefixes:
        component = components.get(name)
        if component is not None:
            network = kind == "network"
            state.update(original_state(component, prefix) if network else text_state(component, prefix, kind))
    return state
