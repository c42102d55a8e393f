"""Networks of ``transformers`` loaded our way: built without weights, and the mapped file assigned."""

from __future__ import annotations

import copy
import importlib
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..core import hub, log, remote
from ..core.config import ConfigMixin, read_json
from ..core.errors import CheckpointError, EffusionError, MissingFile
from ..placement import packing
from ..weights import assign
from ..weights.checkpoint import open_checkpoint
from ..weights.entries import Checkpoint
from ..weights.prepare import LoadOptions, Prepared, building

logger = log.get_logger(__name__)
# prefixes that versions of transformers have put before, or taken from, the names of weights
_PREFIXES = ("text_model.", "vision_model.", "model.")
_IGNORABLE = ("*position_ids", "*.attn.masked_bias", "*rotary_emb.inv_freq")


def load_foreign(cls: Any, path: str | os.PathLike[str], **kwargs: Any) -> Any:
    """What the ``from_pretrained`` of a class of transformers gives: its code asked for nothing, its pickles not opened.

    Networks are loaded our way, except where transformers quantises or spreads them: then from safetensors only.

    Raises:
        CheckpointError: something is missing, broken or does not fit.
    """
    if not issubclass(cls, torch.nn.Module):
        where, rest = hub.split_location(kwargs)
        return small_component(cls, *_small_files(path, **where), **rest)
    if kwargs.get("quantization_config") is not None or isinstance(kwargs.get("device_map"), Mapping):
        return _load_their_way(cls, path, **kwargs)
    options = LoadOptions.take(kwargs)
    prepared = prepare_foreign(cls, path, options, **kwargs)
    model = prepared.build()
    return (model, prepared.match.as_info()) if options.output_loading_info else model


def _load_their_way(cls: Any, path: str | os.PathLike[str], **kwargs: Any) -> Any:
    """Quantised or spread by transformers, which is given the configuration, and a folder whose files were checked."""
    where, rest = hub.split_location(kwargs)
    file = hub.resolve_file(path, "config.json", **where)
    commit = hub.commit_of(file)
    checkpoint = open_checkpoint(
        path, stems=("model",), variant=rest.get("variant"), use_safetensors=True,
        **{**where, "revision": commit} if commit else where,
    )  # fmt: skip
    closed = without_code(cls, checkpoint.label)
    names = ("quantization_config", "device_map", "dtype", "torch_dtype")
    own = {name: rest.pop(name) for name in names if name in rest}
    config, left = config_of(cls, read_json(file), str(file), **rest)
    config._name_or_path = str(path)
    return cls.from_pretrained(file.parent, config=config, use_safetensors=True, **closed, **own, **left)


_SMALL = (".json", ".txt", ".model", ".jinja", ".vocab", ".merges")


def _small_files(path: str | os.PathLike[str], **where: Any) -> tuple[Path, Path]:
    """The folder ``path`` (of a repository: its small files, of one commit), with ``subfolder``; and by itself."""
    root, inside = Path(path), str(hub.confine(where.get("subfolder") or ".", "the request"))
    if not root.is_dir():
        prefix = "" if inside == "." else f"{inside}/"
        root = hub.snapshot(str(path), [f"{prefix}*{end}" for end in _SMALL], literal=False, **where)
    if not (root / inside).is_dir():
        raise MissingFile(f"{root} has no folder {inside}")
    return root / inside, root


def small_component(cls: Any, folder: Path, root: Path | None = None, **kwargs: Any) -> Any:
    """A scheduler, tokenizer or processor in ``folder``, which lies in ``root`` (if not given, right in it).

    Raises:
        UntrustedCode: a configuration makes transformers fetch code.
        CheckpointError: it can't be read.
    """
    closed = without_code(cls, str(folder))
    for file in sorted(folder.rglob("*")):
        hub.check_inside(file, root or folder.parent)
        if closed and file.name.endswith("config.json") and file.is_file():
            remote.refuse_fetched(read_json(file), str(file))
    try:
        return cls.from_pretrained(folder, **closed, **kwargs)
    except EffusionError:
        raise
    except Exception as error:  # tokenizers and processors raise anything on damaged files
        raise CheckpointError(f"{folder}: no {cls.__name__} could be read from it: {error}") from error


# of the automatic classes those that read small files: the others load networks their way, pickles too
_AUTO = ("AutoTokenizer", "AutoProcessor", "AutoImageProcessor", "AutoVideoProcessor", "AutoFeatureExtractor")


def without_code(cls: Any, label: str) -> dict[str, Any]:
    """Arguments with which a class reads files and runs no code in them; transformers asks at the terminal else.

    Raises:
        CheckpointError: something of transformers that does not come out of a folder.
    """
    if cls.__module__.split(".")[0] != "transformers":
        return {}
    if not any(base.__name__ == "PushToHubMixin" for base in cls.__mro__) and cls.__name__ not in _AUTO:
        raise CheckpointError(f"{label}: {cls.__name__} of transformers can't be a component of a pipeline")
    return {"trust_remote_code": False}


def config_of(cls: Any, raw: Mapping[str, Any], label: str, **changes: Any) -> tuple[Any, dict[str, Any]]:
    """The configuration object of a network of transformers out of what was read, and what of ``changes`` is none of it.

    Nothing is read again: ``raw`` is what was checked. It may be that of a larger model, with this one's in it.

    Raises:
        UntrustedCode: it makes transformers fetch code.
        CheckpointError: it is no configuration of this class.
    """
    remote.refuse_fetched(raw, label)
    without_code(cls, label)
    own: Any = getattr(cls, "config_class", None)
    if own is None:
        raise CheckpointError(f"{label}: {cls.__name__} is not built from a configuration")
    kind, part = getattr(own, "model_type", None), raw.get(getattr(own, "base_config_key", None) or "")
    found = dict(part) if isinstance(part, Mapping) else {k: v for k, v in raw.items() if k != "auto_map"}
    if "model_type" in found and found["model_type"] != kind:
        inner = [v for v in found.values() if isinstance(v, Mapping) and v.get("model_type") == kind]
        found = dict(inner[-1]) if inner else found
    try:
        config, left = own.from_dict(copy.deepcopy(found), return_unused_kwargs=True, **changes)
    except Exception as error:  # its checks raise classes of their own
        raise CheckpointError(f"{label}: no configuration of a {cls.__name__}: {error}") from error
    return config, dict(left)


def from_config(cls: Any, config: Mapping[str, Any], label: str, **changes: Any) -> Any:
    """A network with random weights, ours or of transformers; first without weights, so that its size is sane.

    Raises:
        UntrustedCode: the configuration makes transformers fetch code.
        CheckpointError: it builds no such network.
    """
    if issubclass(cls, ConfigMixin):
        with building(cls, label):
            cls.from_config(config, **changes)
        return cls.from_config(config, **changes)
    _skeleton(cls, config_of(cls, config, label)[0], label)
    return cls(config_of(cls, config, label)[0])


def prepare_foreign(cls: Any, path: str | os.PathLike[str], options: LoadOptions, **config_changes: Any) -> Any:
    """A network of transformers, ready to be built; by its own ``from_pretrained`` where names don't meet ours.

    Raises:
        CheckpointError: configuration or weights are missing or broken.
    """
    file = hub.resolve_file(path, "config.json", **options.where)
    raw = read_json(file)
    config, _ = config_of(cls, raw, str(file), **config_changes)
    commit = hub.commit_of(file)
    where = {**options.where, "revision": commit} if commit else options.where
    checkpoint = options.open(path, ("model",), where)
    if raw.get("quantization_config"):
        return Fallback(cls, config, options, checkpoint)
    config._name_or_path = str(path)
    model = _skeleton(cls, config, str(file.parent))
    fitted = assign.fit_prefix(checkpoint, assign.expected_tensors(model), _PREFIXES)
    if fitted is None or (options.dtype != torch.float32 and _computed_floats(model)):
        return Fallback(cls, config, options, checkpoint)
    return ForeignPrepared.of_model(cls, model, fitted, options)


def _computed_floats(model: torch.nn.Module) -> list[str]:
    """Floating-point buffers that no file has; transformers computes them in the dtype asked for."""
    saved = assign.expected_tensors(model)
    return [n for n, b in model.named_buffers() if n not in saved and b.is_floating_point()]


def prepare_from(cls: Any, config: Mapping[str, Any], checkpoint: Checkpoint, options: LoadOptions) -> Any:
    """A network of transformers from a configuration and weights under its names.

    Raises:
        CheckpointError: they do not fit each other.
    """
    model = _skeleton(cls, config_of(cls, config, checkpoint.label)[0], checkpoint.label)
    fitted = assign.fit_prefix(checkpoint, assign.expected_tensors(model), _PREFIXES) or checkpoint
    return ForeignPrepared.of_model(cls, model, fitted, options)


def _skeleton(cls: Any, config: Any, label: str) -> Any:
    with building(cls, label):
        model = cls(config)
        model.tie_weights()
    return model


class ForeignPrepared(Prepared[Any]):
    """A prepared network of transformers, with its rules about float32."""

    @classmethod
    def of_model(cls, model_class: Any, model: Any, checkpoint: Checkpoint, options: LoadOptions) -> ForeignPrepared:
        found = assign.match(model, checkpoint, _IGNORABLE)
        found.check(model_class.__name__, checkpoint.label, options.ignore_mismatched_sizes)
        return cls(model, checkpoint, found, options)

    def build(self) -> Any:
        """Give the network its weights."""
        options, model = self.options, self.model
        keep = _kept_in_float32(type(model), options.dtype)
        packed: dict[str, Any] | None = {} if options.packed else None
        slices = assign.assign(model, self.checkpoint, options.dtype, keep, options.device, options.mapped, packed)
        model.tie_weights()
        left = assign.meta_tensors(model)
        if left and options.device != torch.device("meta"):
            raise CheckpointError(f"{self.checkpoint.label}: {type(model).__name__} has no values for {left[:10]}")
        if options.device is not None:
            model.to(options.device)
        if packed:
            packing.unpack_in_calls(model, packed)
        if options.dtype is not None:
            model.config.dtype = options.dtype
        object.__setattr__(model, "_weight_slices", slices)
        return model.eval()


def _kept_in_float32(cls: Any, dtype: torch.dtype | None) -> tuple[str, ...]:
    keep: list[str] = []
    if dtype == torch.float16:
        keep += getattr(cls, "_keep_in_fp32_modules", None) or ()
    if dtype in (torch.float16, torch.bfloat16):
        keep += getattr(cls, "_keep_in_fp32_modules_strict", None) or ()
    return tuple(keep)


NATIVE = {
    "CLIPTextModel": ("effusion.models.clip_text", "transformers.models.clip.modeling_clip"),
    "CLIPTextModelWithProjection": ("effusion.models.clip_text", "transformers.models.clip.modeling_clip"),
    "CLIPTokenizer": ("effusion.models.clip_tokenizer", "transformers.models.clip.tokenization_clip"),
}


def native_class(name: str, folder: Path) -> Any:
    """Our own class for a component of transformers, or ``None``.

    Importing that package takes seconds, more than making a small picture. So CLIP's text models and tokenizer
    are ours, number for number, unless the program has imported theirs already (it may want to know
    them by type) or ``EFFUSION_NATIVE_TEXT=0`` says otherwise (``1``: ours in any case).
    """
    ours, theirs = NATIVE.get(name, ("", ""))
    wish = os.environ.get("EFFUSION_NATIVE_TEXT", "")
    if not ours or wish == "0" or (theirs in sys.modules and wish != "1"):
        return None
    found = getattr(importlib.import_module(ours), name)
    return found if not hasattr(found, "supports") or found.supports(folder) else None


@dataclass
class Fallback:
    """A network that transformers loads itself; it is given the tensors, so that it opens no pickle."""

    cls: Any
    config: Any
    options: LoadOptions
    checkpoint: Checkpoint
    match: assign.Match = field(default_factory=assign.Match)

    def build(self) -> Any:
        """Load it with its own ``from_pretrained``; strict about missing weights like everything here."""
        options = self.options
        model, info = self.cls.from_pretrained(
            None,
            config=self.config,
            state_dict={name: self.checkpoint.tensor(name, options.mapped) for name in self.checkpoint},
            dtype=options.dtype or "auto",
            output_loading_info=True,
        )
        self.match = assign.Match(sorted(info["missing_keys"]), sorted(info["unexpected_keys"]))
        if self.match.missing:
            raise CheckpointError(
                f"{self.checkpoint.label}: weights missing for {self.cls.__name__}: {self.match.missing}"
            )
        return model.to(options.device) if options.device is not None else model
