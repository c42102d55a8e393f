"""Saving pipelines: every component in a folder of its own and an index, or all in one file."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..core import publish
from ..weights import names, saving, single_file


def save_pipeline(
    pipe: Any,
    save_directory: str | os.PathLike[str],
    safe_serialization: bool = True,
    variant: str | None = None,
    max_shard_size: int | str | None = None,
    push_to_hub: bool = False,
    **kwargs: Any,
) -> None:
    """Write every component into its own folder, and ``model_index.json``.

    All of it is written aside first and then moved into place file by file, ``model_index.json`` last:
    an interrupted save leaves the old pipeline as it was.
    """
    if max_shard_size is not None:
        saving.parse_size(max_shard_size)
    folder = Path(save_directory)
    wanted = {
        "safe_serialization": safe_serialization,
        "variant": variant,
        **({"max_shard_size": max_shard_size} if max_shard_size else {}),
    }
    written: dict[str, list[str]] = {}
    with saving.staged(folder) as aside:
        for name, component in pipe.components.items():
            if component is not None:
                _save_component(getattr(component, "_orig_mod", component), aside / name, wanted)
                written[name] = [path.name for path in (aside / name).iterdir()]
        pipe.save_config(aside)
    for name, files in written.items():
        for stem in names.STEMS:
            if any(file.startswith(stem) for file in files):
                saving.remove_stale(folder / name, files, stem, variant)
    if push_to_hub:
        publish.upload(pipe, folder, **kwargs)


def _save_component(component: Any, folder: Path, wanted: Mapping[str, Any]) -> None:
    save: Callable[..., Any] = component.save_pretrained
    accepted = inspect.signature(save).parameters
    save(folder, **{k: v for k, v in wanted.items() if k in accepted})


# -- one file in the original layout ---------------------------------------------------------------

_CLASSIC = (("unet", "model.diffusion_model.", "network"), ("vae", "first_stage_model.", "network"))
_TEXT = {
    "clip": (("text_encoder", "cond_stage_model.transformer.", "clip"),),
    "open_clip": (("text_encoder", "cond_stage_model.model.", "open_clip"),),
    "xl": (
        ("text_encoder", "conditioner.embedders.0.transformer.", "clip"),
        ("text_encoder_2", "conditioner.embedders.1.model.", "open_clip"),
    ),
    "refiner": (("text_encoder_2", "conditioner.embedders.0.model.", "open_clip"),),
}
# main network -> (component, prefix, kind) of everything that such files have
_WHOLE = {
    "FluxTransformer2DModel": (
        ("transformer", "model.diffusion_model.", "network"), ("vae", "vae.", "network"),
        ("text_encoder", "text_encoders.clip_l.transformer.", "clip"),
        ("text_encoder_2", "text_encoders.t5xxl.transformer.", "t5"),
    ),
    "SD3Transformer2DModel": (
        ("transformer", "model.diffusion_model.", "network"), ("vae", "first_stage_model.", "network"),
        ("text_encoder", "text_encoders.clip_l.transformer.", "clip"),
        ("text_encoder_2", "text_encoders.clip_g.transformer.", "clip"),
        ("text_encoder_3", "text_encoders.t5xxl.transformer.", "t5"),
    ),
    "PixArtTransformer2DModel": (
        ("transformer", "model.diffusion_model.", "network"), ("vae", "first_stage_model.", "network"),
        ("text_encoder", "text_encoders.t5xxl.transformer.", "t5"),
    ),
}  # fmt: skip


def save_single(pipe: Any, path: str | os.PathLike[str], **metadata: str) -> None:
    """Write networks and text encoders of a pipeline into one file in the original layout of its family.

    Raises:
        ValueError: a pipeline whose family has none.
    """
    single_file.write_single(path, original_state(pipe), metadata)


def original_state(pipe: Any) -> dict[str, Tensor]:
    """The weights of a pipeline under the names of its family's original layout."""
    components = pipe.components
    transformer = type(components.get("transformer")).__name__
    if transformer in _WHOLE:
        parts = _WHOLE[transformer]
    elif "unet" not in components or "vae" not in components:
        raise ValueError(f"{type(pipe).__name__} has no single-file layout that is known here; use `save_pretrained`")
    else:
        parts = (*_CLASSIC, *_TEXT[_text_kind(components)])
    return single_file.pipeline_state(components, parts)


def _text_kind(components: Mapping[str, Any]) -> str:
    if components.get("text_encoder_2") is not None:
        return "refiner" if components.get("text_encoder") is None else "xl"
    return "open_clip" if components["unet"].config.use_linear_projection else "clip"
