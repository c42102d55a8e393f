"""Networks of ``transformers`` loaded our way: built without weights, and the mapped file assigned."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..core import hub, log
from ..core.config import read_json
from ..core.errors import CheckpointError, UntrustedCode
from ..placement import packing
from ..weights import assign
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
    closed = without_code(cls, str(path))
    if not issubclass(cls, torch.nn.Module):
        inside = Path(path) / (kwargs.get("subfolder") or "")
        for file in inside.iterdir() if inside.is_dir() else ():
            hub.check_inside(file, Path(path))
        return cls.from_pretrained(path, **closed, **kwargs)
    if kwargs.get("quantization_config") is not None or isinstance(kwargs.get("device_map"), Mapping):
        return cls.from_pretrained(path, use_safetensors=True, **closed, **kwargs)
    options = LoadOptions.take(kwargs)
    prepared = prepare_foreign(cls, path, options, **kwargs)
    model = prepared.build()
    return (model, prepared.match.as_info()) if options.output_loading_info else model


def without_code(cls: Any, label: str) -> dict[str, Any]:
    """Arguments with which a class reads files and runs no code in them; transformers asks at the terminal else.

    Raises:
        CheckpointError: something of transformers that does not come out of a folder.
    """
    if cls.__module__.split(".")[0] != "transformers":
        return {}
    if not any(base.__name__ == "PushToHubMixin" for base in cls.__mro__) and not cls.__name__.startswith("Auto"):
        raise CheckpointError(f"{label}: {cls.__name__} of transformers can't be a component of a pipeline")
    return {"trust_remote_code": False}


def prepare_foreign(cls: Any, path: str | os.PathLike[str], options: LoadOptions, **config_changes: Any) -> Any:
    """A network of transformers, ready to be built; by its own ``from_pretrained`` where names don't meet ours.

    Raises:
        CheckpointError: configuration or weights are missing or broken.
    """
    file = hub.resolve_file(path, "config.json", **options.where)
    raw, folder = read_json(file), file.parent
    refuse_fetched_code(raw, str(file))
    commit = hub.commit_of(file)
    where = {**options.where, "revision": commit} if commit else options.where
    checkpoint = options.open(path, ("model",), where)
    config = cls.config_class.from_pretrained(folder, **config_changes)
    if raw.get("quantization_config"):
        return Fallback(cls, config, options, checkpoint)
    config._name_or_path = str(path)
    model = _skeleton(cls, config, str(folder))
    fitted = assign.fit_prefix(checkpoint, assign.expected_tensors(model), _PREFIXES)
    if fitted is None or (options.dtype != torch.float32 and _computed_floats(model)):
        return Fallback(cls, config, options, checkpoint)
    return ForeignPrepared.of_model(cls, model, fitted, options)


def refuse_fetched_code(config: Any, label: str) -> None:
    """A configuration may name a repository whose kernels transformers would fetch and run; ours does not.

    Raises:
        UntrustedCode: it does.
    """
    for key, value in config.items() if isinstance(config, Mapping) else ():
        names = value.values() if isinstance(value, Mapping) else (value,)
        if str(key).endswith("_implementation") and any("/" in str(name) for name in names):
            raise UntrustedCode(f"{label}: {key}={value!r} is code from elsewhere; take it out to load the model")
        if isinstance(value, Mapping):
            refuse_fetched_code(value, label)


def _computed_floats(model: torch.nn.Module) -> list[str]:
    """Floating-point buffers that no file has; transformers computes them in the dtype asked for."""
    saved = assign.expected_tensors(model)
    return [n for n, b in model.named_buffers() if n not in saved and b.is_floating_point()]


def prepare_from(cls: Any, config: Mapping[str, Any], checkpoint: Checkpoint, options: LoadOptions) -> Any:
    """A network of transformers from a configuration and weights under its names.

    Raises:
        CheckpointError: they do not fit each other.
    """
    refuse_fetched_code(config, checkpoint.label)
    model = _skeleton(cls, cls.config_class.from_dict(dict(config)), checkpoint.label)
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
