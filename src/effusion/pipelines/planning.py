"""A pipeline without weights: enough to plan with, from configurations and a few small files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..core import hub
from ..core.config import read_json
from ..core.errors import CheckpointError, HubSilent
from ..models.foreign import config_of
from ..weights.prepare import LoadOptions, building
from . import classes, loading
from .components import component_names
from .index import INDEX, read_index
from .members import build_members, has_members
from .options import PipelineOptions

SMALL = (".json", ".txt", ".model", ".jinja")  # what configurations, tokenizers and schedulers are made of


def skeleton(
    path: str | os.PathLike[str], dtype: torch.dtype = torch.float32, revision: str | None = None, cls: Any = None
) -> Any:
    """The pipeline in ``path`` with its networks on ``meta``: it can be planned with, not run.

    Args:
        path: a folder with ``model_index.json``, or a repository on the hub, of which no weights are fetched.
        cls: a pipeline class, if not the one that the folder names.

    Raises:
        CheckpointError: no pipeline, or a component whose configuration is missing or broken.
    """
    from .base import DiffusionPipeline

    folder = Path(path) if Path(path).is_dir() else _fetch(str(path), revision)
    options = PipelineOptions(LoadOptions())
    index = read_index(folder)
    found = classes.pipeline_class(cls or DiffusionPipeline, index, folder, options)
    components: dict[str, Any] = {}
    for name in component_names(found):
        entry = index.get(name)
        if isinstance(entry, list) and len(entry) == 2 and entry[1] is not None:
            components[name] = _component(folder, name, entry, dtype)
        else:
            components[name] = None
    settings = {n: v for n, v in index.items() if n not in components and not n.startswith("_")}
    pipe = found(**components, **{n: v for n, v in settings.items() if not isinstance(v, list)})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _component(folder: Path, name: str, entry: list[str], dtype: torch.dtype) -> Any:
    cls: Any = classes.find_component_class(name, entry[0], entry[1], folder / name)
    if nn.Module not in getattr(cls, "__mro__", ()):
        return loading.prepare(cls, folder, name, LoadOptions())
    label = str(folder / name)
    if not (folder / name / "config.json").is_file():
        raise CheckpointError(f"{label} has no config.json")
    with building(cls, label):
        if has_members(cls):
            model: Any = build_members(cls, folder / name)
        elif hasattr(cls, "load_config"):
            model = cls.from_config(cls.load_config(folder, subfolder=name))
        else:
            model = cls(config_of(cls, read_json(folder / name / "config.json"), label)[0])
            model.tie_weights()
    return model.to(dtype).eval()


def _fetch(repo: str, revision: str | None) -> Path:
    """The small files of ``repo``, in the cache."""
    try:
        commit, names = hub.repo_files(repo, revision=revision)
    except HubSilent:
        return hub.resolve_file(repo, INDEX, revision=revision, local_files_only=True).parent
    if INDEX not in names:
        raise CheckpointError(f"{repo} has no {INDEX}, so it is no pipeline")
    small = [n for n in names if n.count("/") <= 1 and n.endswith(SMALL) and not n.endswith(".index.json")]
    return hub.snapshot(repo, small, revision=commit)
