"""The configurations of Stable Diffusion's first programs (Rombach et al., 2022): what they say and shapes don't."""

from __future__ import annotations

import os
import urllib.request
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..core.errors import CheckpointError
from ..core.optional import require
from .verdict import Verdict

Source = str | os.PathLike[str] | Mapping[str, Any]
_MOST, _SECONDS = 1 << 20, 30
# (path below model.params, component, entry of its configuration)
_NUMBERS = (
    ("linear_start", "scheduler", "beta_start"),
    ("linear_end", "scheduler", "beta_end"),
    ("timesteps", "scheduler", "num_train_timesteps"),
    ("scale_factor", "vae", "scaling_factor"),
)
_NETWORKS = (("unet_config", "unet"), ("network_config", "unet"), ("control_stage_config", "controlnet"))


def read(source: Source) -> Mapping[str, Any]:
    """``model.params`` of a configuration: a YAML file, a link to one, or a dictionary.

    Raises:
        CheckpointError: it is not there, too large, or no such configuration.
    """
    value: Any = source
    if not isinstance(source, Mapping):
        yaml = require("yaml", "reading `original_config`")
        try:
            value = yaml.safe_load(_bytes(str(source)))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise CheckpointError(f"original_config={str(source)!r} can't be read: {error}") from error
    for key in ("model", "params"):
        value = value.get(key) if isinstance(value, Mapping) else None
    if not isinstance(value, Mapping):
        raise CheckpointError(f"original_config={source!r}: a configuration of this kind has `model: params:`")
    return value


def _bytes(source: str) -> bytes:
    if source.startswith(("https://", "http://")):
        with urllib.request.urlopen(source, timeout=_SECONDS) as answer:
            data: bytes = answer.read(_MOST + 1)
    else:
        with Path(source).open("rb") as file:
            data = file.read(_MOST + 1)
    if len(data) > _MOST:
        raise ValueError(f"more than {_MOST} bytes")
    return data


def told(params: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Entries of configurations by component."""
    found: dict[str, dict[str, Any]] = {"scheduler": {}, "vae": {}, "unet": {}, "controlnet": {}}
    for key, component, entry in _NUMBERS:
        if isinstance(params.get(key), (int, float)):
            found[component][entry] = params[key]
    if params.get("parameterization") in ("eps", "v"):
        found["scheduler"]["prediction_type"] = {"eps": "epsilon", "v": "v_prediction"}[params["parameterization"]]
    for key, component in _NETWORKS:
        section = params.get(key)
        inside = section.get("params") if isinstance(section, Mapping) else None
        heads = _heads(inside) if isinstance(inside, Mapping) else None
        if heads is not None:
            found[component]["attention_head_dim"] = heads
    return found


def _heads(params: Mapping[str, Any]) -> int | list[int] | None:
    """How many heads attention has at each width."""
    size, width, factors = params.get("num_head_channels"), params.get("model_channels"), params.get("channel_mult")
    if isinstance(size, int) and size > 0 and isinstance(width, int) and isinstance(factors, list):
        return [width * factor // size for factor in factors]
    heads = params.get("num_heads")
    return heads if isinstance(heads, int) and heads > 0 else None


def follow(verdict: Verdict, source: Source) -> Verdict:
    """``verdict`` with the configurations of its parts as the original one says."""
    entries = told(read(source))
    parts = {n: replace(p, config={**p.config, **entries.get(n, {})}) for n, p in verdict.parts.items()}
    settings = dict(verdict.settings)
    if "scheduler" in settings:
        sampler = dict(settings["scheduler"])
        if sampler["_class_name"] == "PNDMScheduler":  # came later; those programs sampled with DDIM
            sampler["_class_name"] = "DDIMScheduler"
        settings["scheduler"] = {**sampler, **entries["scheduler"]}
    return replace(verdict, parts=parts, settings=settings)
