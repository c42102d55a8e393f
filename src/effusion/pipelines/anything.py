"""``load``: anything, recognised by what is in it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..core import hub, registry
from ..core.config import read_json
from ..core.errors import CheckpointError, MissingFile
from ..models.auto_model import AutoModel
from ..models.foreign import small_component
from ..weights import names, recognise, single_file
from ..weights.entries import Checkpoint
from ..weights.verdict import Part
from . import loading
from .components import component_names
from .index import INDEX
from .single_file import load_single, prepare_part, single_options


def load(source: single_file.Source, **kwargs: Any) -> Any:
    """Load anything: a pipeline's folder or repository, one network, or a single file, recognised by its content.

    Args:
        source: a folder, a repository (``owner/name``), a file, a link to a file on the hub.
        kwargs: what the ``from_pretrained`` or ``from_single_file`` that fits takes.

    Returns:
        A pipeline or a network.

    Raises:
        CheckpointError: it is something that can't stand alone (a LoRA, an embedding), or unknown: says what.
    """
    if not isinstance(source, Mapping):
        path, text = Path(source), str(source)
        if path.is_dir():
            return _load_folder(path, **kwargs)
        if not path.is_file() and text.count("/") <= 1 and "://" not in text:
            if names.is_weights(text):
                raise MissingFile(f"{text}: there is no such file here")
            return _load_repository(text, **kwargs)
    return _load_file(source, **kwargs)


def _load_file(source: single_file.Source, **kwargs: Any) -> Any:
    where, _ = hub.split_location(kwargs)
    checkpoint = single_file.open_source(source, kwargs.get("use_safetensors") is not True, **where)
    verdict = recognise.recognise(checkpoint)
    if verdict.pipeline is not None:
        cls = registry.find_class("diffusers", verdict.pipeline)
        if verdict.kind == "pipeline" or kwargs.keys() & set(component_names(cls)):
            return load_single(cls, source, **kwargs)
    if verdict.kind != "model" or len(verdict.parts) != 1:
        raise CheckpointError(f"{checkpoint.label} is {verdict.describe()}")
    part = next(iter(verdict.parts.values()))
    if part.library == "transformers":
        return _load_encoder(part, checkpoint, **kwargs)
    return registry.find_class(part.library, part.class_name).from_single_file(source, **kwargs)


def _load_encoder(part: Part, checkpoint: Checkpoint, **kwargs: Any) -> Any:
    """A text encoder alone in a file; ``config`` is a dictionary, or a folder or repository with ``config.json``."""
    config: Any = kwargs.pop("config", None)
    options = single_options(kwargs)
    if kwargs:
        raise ValueError(f"{part.class_name} is loaded without {sorted(kwargs)}")
    if config is None:
        config = part.configuration(checkpoint)
    elif not isinstance(config, Mapping):
        config = read_json(hub.resolve_file(config, "config.json", **options.base.where))
    return prepare_part(part, config, checkpoint, options.for_component("", None)).build()


def _load_folder(folder: Path, **kwargs: Any) -> Any:
    subfolder = kwargs.get("subfolder")
    if subfolder is None and (folder / INDEX).is_file():
        return loading.load_pipeline(registry.find_class("diffusers", "DiffusionPipeline"), folder, **kwargs)
    inside = folder / hub.confine(subfolder, "`subfolder`") if subfolder else folder
    hub.check_inside(inside, folder)
    if not inside.is_dir():
        raise MissingFile(f"{folder} has no folder {subfolder}")
    if (inside / "config.json").is_file():
        return AutoModel.from_pretrained(folder, **kwargs)
    if (inside / "scheduler_config.json").is_file():
        config = hub.resolve_file(folder, "scheduler_config.json", subfolder=subfolder)
        return small_component(
            registry.find_component(read_json(config).get("_class_name"), str(inside)), inside, folder
        )
    files = sorted(p.name for p in inside.iterdir() if names.is_weights(p.name))
    if len(files) == 1:
        kwargs.pop("subfolder", None)
        return _load_file(hub.resolve_file(folder, files[0], subfolder=subfolder), **kwargs)
    raise MissingFile(f"{folder} has neither {INDEX} nor config.json; its weights are {files}: name one")


def _load_repository(repo: str, **kwargs: Any) -> Any:
    """All files are of the commit that the first one asked for is of."""
    where, _ = hub.split_location(kwargs)
    subfolder = where.pop("subfolder", None)
    index = hub.try_file(repo, INDEX, **where) if subfolder is None else None
    if index is not None:
        cls = registry.find_class("diffusers", "DiffusionPipeline")
        return loading.load_pipeline(cls, repo, **_pinned(kwargs, hub.commit_of(index)))
    config = hub.try_file(repo, "config.json", **where, subfolder=subfolder)
    if config is not None:
        return AutoModel.from_pretrained(repo, **_pinned(kwargs, hub.commit_of(config)))
    commit, there = _listing(repo, where)
    files = [n for n in there if names.is_weights(n) and n.startswith(f"{subfolder}/" if subfolder else "")]
    if len(files) == 1:  # where it is has been told; what else is fetched, for `config`, is of another place
        kwargs = {n: v for n, v in kwargs.items() if n not in ("revision", "subfolder")}
        return _load_file(f"{repo}/resolve/{commit}/{files[0]}", **kwargs)
    raise MissingFile(f"{repo} has neither {INDEX} nor config.json; name one of its files: {files[:10]}")


def _pinned(kwargs: dict[str, Any], commit: str | None) -> dict[str, Any]:
    return {**kwargs, "revision": commit} if commit else kwargs


def _listing(repo: str, where: dict[str, Any]) -> tuple[str, list[str]]:
    """The commit that is asked for and its files; those in the cache, if the hub is not to be asked."""
    if not where.get("local_files_only"):
        return hub.repo_files(repo, revision=where.get("revision"), token=where.get("token"))
    folder = hub.snapshot(repo, ["*"], literal=False, **where)
    return folder.name, [p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*")) if p.is_file()]
