"""Which class a pipeline or a component is of: ours, one of transformers, or somebody else's with consent."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..core import registry, remote
from ..core.errors import CheckpointError, MissingFile
from ..models.foreign import native_class
from .index import INDEX
from .options import PipelineOptions

# classes that the packages have renamed since files named them
_ALIASES = {
    "CLIPFeatureExtractor": "CLIPImageProcessor",
    "ChineseCLIPFeatureExtractor": "ChineseCLIPImageProcessor",
}


def pipeline_class(cls: Any, index: Mapping[str, Any], folder: Path, options: PipelineOptions) -> Any:
    """The class to build: ``cls``, or what the index names if ``cls`` is ``DiffusionPipeline`` itself."""
    name = index.get("_class_name")
    if options.custom_pipeline is not None:
        return custom_class(str(options.custom_pipeline), options)
    if isinstance(name, list):
        if len(name) != 2 or not all(isinstance(part, str) for part in name):
            raise CheckpointError(f"{folder / INDEX}: `_class_name` must be a name or [file, name], not {name!r}")
        remote.consent(f"the pipeline {name[1]!r} of {folder}", options.trust_remote_code)
        file, class_name = name
        own = remote.load_class(remote.read_folder(folder), file, class_name, trusted=options.trust_remote_code)
        if not hasattr(own, "register_modules"):
            raise CheckpointError(f"{folder / INDEX}: {class_name} of {file}.py is no pipeline class")
        return own
    if cls.__name__ != "DiffusionPipeline":
        return cls
    if not isinstance(name, str):
        raise CheckpointError(f"{folder / INDEX} names no `_class_name`")
    found = registry.find_class("diffusers", name)
    if not hasattr(found, "register_modules"):
        raise CheckpointError(f"{folder / INDEX}: {name} is no pipeline class")
    return found


def custom_class(place: str, options: PipelineOptions) -> type:
    """The pipeline class in ``place``: a Python file, a folder with ``pipeline.py``, a repository with one, or the
    name of one in the community's collection.

    Raises:
        UntrustedCode: no ``trust_remote_code=True``.
    """
    remote.consent(f"the custom pipeline {place!r}", options.trust_remote_code)
    path = Path(place)
    if path.is_file():
        return remote.load_class(remote.read_folder(path.parent), path.stem, None, options.trust_remote_code)
    if path.is_dir():
        return remote.load_class(remote.read_folder(path), "pipeline", None, options.trust_remote_code)
    where = options.base.where
    if place.isidentifier():
        code = remote.read_community(place, options.trust_remote_code, options.custom_revision, **where)
        return remote.load_class(code, place, None, options.trust_remote_code)
    if place.count("/") != 1:
        raise MissingFile(
            f"custom_pipeline={place!r}: give a file, a folder with pipeline.py, a repository `owner/name`, or the name "
            "of a pipeline in the community's collection"
        )
    code = remote.read_repository(place, options.trust_remote_code, **{**where, "revision": options.custom_revision})
    return remote.load_class(code, "pipeline", None, options.trust_remote_code)


def find_component_class(name: str, library: str, class_name: str, folder: Path, trusted: bool = False) -> Any:
    """The class of component ``name`` in ``folder``; :class:`CheckpointError` names it if there is none.

    ``library`` may be a Python file in the folder; that takes consent.
    """
    if library.isidentifier() and (folder / f"{library}.py").is_file():
        remote.consent(f"the component {name!r} ({library}.py in {folder})", trusted)
        return remote.load_class(remote.read_folder(folder), library, class_name, trusted)
    try:
        own = native_class(class_name, folder) if library == "transformers" else None
        if own is not None:
            return own
        class_name = _ALIASES.get(class_name, class_name)
        if library != "transformers":
            return registry.find_component(class_name, str(folder), library)
        return registry.find_class(library, class_name)
    except CheckpointError as error:
        raise CheckpointError(f"component {name!r}: {error}") from error
