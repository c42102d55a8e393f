"""The configurations of Stable Diffusion's first programs (Rombach et al., 2022): what they say and shapes don't."""

from __future__ import annotations

import os
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..core.errors import CheckpointError
from ..core.optional import require

Source = str | os.PathLike[str] | Mapping[str, Any]
_MOST, _SECONDS = 1 << 20, 30
SCHEDULER, _VAE, _UNET, _CONTROLNET = "scheduler", "AutoencoderKL", "UNet2DConditionModel", "ControlNetModel"
# (name below model.params, class, entry of its configuration)
_NUMBERS = (
    ("linear_start", SCHEDULER, "beta_start"),
    ("linear_end", SCHEDULER, "beta_end"),
    ("timesteps", SCHEDULER, "num_train_timesteps"),
    ("scale_factor", _VAE, "scaling_factor"),
)
_NETWORKS = (("unet_config", _UNET), ("network_config", _UNET), ("control_stage_config", _CONTROLNET))


def _params(source: Source, local: bool) -> Mapping[str, Any]:
    """``model.params`` of a configuration: a YAML file, a link to one, or a dictionary."""
    value: Any = source
    if not isinstance(source, Mapping):
        yaml = require("yaml", "reading `original_config`")
        try:
            value = yaml.safe_load(_bytes(str(source), local))
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            raise CheckpointError(f"original_config={str(source)!r} can't be read: {error}") from error
    for key in ("model", "params"):
        value = value.get(key) if isinstance(value, Mapping) else None
    if not isinstance(value, Mapping):
        raise CheckpointError(f"original_config={source!r}: a configuration of this kind has `model: params:`")
    return value


def _bytes(source: str, local: bool) -> bytes:
    if source.startswith(("https://", "http://")):
        if local:
            raise ValueError("it is a link, and `local_files_only=True` fetches nothing; give a file")
        with urllib.request.urlopen(source, timeout=_SECONDS) as answer:
            data: bytes = answer.read(_MOST + 1)
    else:
        with Path(source).open("rb") as file:
            data = file.read(_MOST + 1)
    if len(data) > _MOST:
        raise ValueError(f"more than {_MOST} bytes")
    return data


def entries(source: Source | None, local_files_only: bool = False) -> dict[str, dict[str, Any]]:
    """Entries of our configurations by the class of the network, and under :data:`SCHEDULER`; none of ``None``.

    Args:
        local_files_only: follow no link.

    Raises:
        CheckpointError: ``source`` is not there, too large, or no such configuration.
    """
    found: dict[str, dict[str, Any]] = {SCHEDULER: {}, _VAE: {}, _UNET: {}, _CONTROLNET: {}}
    params = _params(source, local_files_only) if source is not None else {}
    for key, name, entry in _NUMBERS:
        if isinstance(params.get(key), (int, float)):
            found[name][entry] = params[key]
    if params.get("parameterization") in ("eps", "v"):
        found[SCHEDULER]["prediction_type"] = {"eps": "epsilon", "v": "v_prediction"}[params["parameterization"]]
    for key, name in _NETWORKS:
        section = params.get(key)
        inside = section.get("params") if isinstance(section, Mapping) else None
        heads = _heads(inside) if isinstance(inside, Mapping) else None
        if heads is not None:
            found[name]["attention_head_dim"] = heads
    return found


def _heads(params: Mapping[str, Any]) -> int | list[int] | None:
    """How many heads attention has at each width."""
    size, width, factors = params.get("num_head_channels"), params.get("model_channels"), params.get("channel_mult")
    whole = isinstance(factors, list) and all(isinstance(factor, int) for factor in factors)
    if isinstance(size, int) and size > 0 and isinstance(width, int) and isinstance(factors, list) and whole:
        return [width * factor // size for factor in factors]
    heads = params.get("num_heads")
    return heads if isinstance(heads, int) and heads > 0 else None
