"""Loading pipelines: every component is found, opened and checked before any weights are read."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..core import hub, log
from ..core.errors import CheckpointError, MissingFile
from ..models.foreign import Fallback, prepare_foreign, small_component
from ..weights.prepare import LoadOptions, Prepared
from . import downloading
from .classes import find_component_class, pipeline_class
from .components import component_names
from .index import INDEX, read_index
from .members import has_members, prepare_members
from .options import PipelineOptions, place

logger = log.get_logger(__name__)
# arguments that scripts pass to any pipeline class, whether it has them or not
_HARMLESS = {"safety_checker", "feature_extractor", "requires_safety_checker", "image_encoder", "add_watermarker"}
_HARMLESS |= {"use_flash_attention_2"}  # the attention backend is chosen by `attention_backend`


def load_pipeline(cls: Any, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
    """Load a pipeline of class ``cls`` (or of the class that the folder names, for ``DiffusionPipeline`` itself).

    Args:
        pretrained_model_name_or_path: a folder with ``model_index.json``, or a repository on the hub.
        kwargs: location and loading options as :meth:`ModelMixin.from_pretrained` takes them;
            ``torch_dtype`` may be a dictionary by component with a ``"default"``; components by name
            replace those of the folder (``None`` leaves an optional one out); configuration entries.

    Raises:
        CheckpointError: the folder is no pipeline, or a part of it is missing, broken or does not fit;
            found from headers, before weights are read.
        ValueError: an argument that this pipeline does not have, or a component that it lacks.
        UntrustedCode: the pipeline is code from elsewhere and ``trust_remote_code`` is not given.
    """
    options = PipelineOptions.take(kwargs)
    path = pretrained_model_name_or_path
    _refuse_single_file(path, cls)
    folder = Path(path)
    if not folder.is_dir():
        passed = list(kwargs)
        folder = downloading.download(path, passed=passed, **_download_options(options))
    index = read_index(folder)
    cls = pipeline_class(cls, index, folder, options)
    check_arguments(cls, kwargs, options)
    components, settings = _gather(cls, folder, index, kwargs, options)
    pipe = assemble(cls, components, settings)
    pipe.register_to_config(_name_or_path=str(path))
    return place(pipe, options)


def assemble(cls: Any, components: Mapping[str, Any], settings: Mapping[str, Any]) -> Any:
    """The pipeline of class ``cls``; what is prepared and sure to fit gets its weights when somebody asks for it.

    First what can still fail is read, because transformers checks while it reads. Classes of other people are given
    whole networks: their constructors may look at weights.
    """
    own = cls.__module__.split(".")[0] == __name__.split(".")[0]
    waiting = {n: c for n, c in components.items() if own and isinstance(c, Prepared) and c.sure}
    order = sorted(components, key=lambda name: not isinstance(components[name], Fallback))
    ready = {n: components[n] for n in order if n not in waiting}
    built = {n: c.build() if isinstance(c, (Prepared, Fallback)) else c for n, c in ready.items()}
    pipe = cls(**built, **{n: c.model for n, c in waiting.items()}, **settings)
    pipe._hold_back(waiting)
    return pipe


def _refuse_single_file(path: str | os.PathLike[str], cls: Any) -> None:
    if Path(path).is_file():
        raise CheckpointError(f"{path} is a single file: load it with `{cls.__name__}.from_single_file`")


def _download_options(options: PipelineOptions) -> dict[str, Any]:
    base = options.base
    return {
        **base.where,
        "variant": base.variant,
        "use_safetensors": base.use_safetensors,
        "custom_pipeline": options.custom_pipeline,
        "trust_remote_code": options.trust_remote_code,
    }


def check_arguments(cls: Any, kwargs: dict[str, Any], options: PipelineOptions) -> None:
    """Refuse arguments that the class doesn't have, after dropping those that any script may pass."""
    known = set(inspect.signature(cls.__init__).parameters) - {"self"} | {"_name_or_path"}
    components = component_names(cls)
    strange = [n for n in kwargs if n not in known]
    for name in strange:
        if kwargs[name] is None or name in _HARMLESS:
            logger.warning("%s has no `%s`; the argument is ignored", cls.__name__, name)
            kwargs.pop(name)
    strange = [n for n in strange if n in kwargs]
    if strange:
        raise ValueError(f"{cls.__name__} has no {strange}; its components are {components}")
    unknown = sorted(set(options.dtypes) - set(components))
    if unknown:
        raise ValueError(f"torch_dtype names {unknown}; the components of {cls.__name__} are {components}")


def _gather(
    cls: Any, folder: Path, index: Mapping[str, Any], kwargs: Mapping[str, Any], options: PipelineOptions
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Components (ready or prepared) and settings for ``cls.__init__``; everything is checked here."""
    names = component_names(cls)
    entries = {n: v for n, v in index.items() if not n.startswith("_") and isinstance(v, list) and len(v) == 2}
    extra = [n for n, v in entries.items() if n not in names and v[0] is not None]
    if extra:
        logger.warning("%s has no components %s; those of %s are left out", cls.__name__, extra, folder)
    wanted = {n: entries[n] for n in names if n in entries and n not in kwargs and entries[n][1] is not None}
    _check_lacking(cls, names, set(entries) | set(kwargs), folder)
    variants = _variants(folder, wanted, options.base)
    trusted = options.trust_remote_code
    classes = {n: find_component_class(n, entry[0], entry[1], folder / n, trusted) for n, entry in wanted.items()}
    ready = {n: prepare(classes[n], folder, n, options.for_component(n, variants[n])) for n in wanted}
    components = {n: kwargs.get(n, ready.get(n)) for n in names}
    parameters = inspect.signature(cls.__init__).parameters
    settings = {n: v for n, v in {**index, **kwargs}.items() if n in parameters and n not in names}
    return components, settings


def _check_lacking(cls: Any, names: list[str], there: set[str], folder: Path) -> None:
    parameters = inspect.signature(cls.__init__).parameters
    free = {n for n in names if parameters[n].default is not inspect.Parameter.empty} | set(cls._optional_components)
    lacking = [n for n in names if n not in there and n not in free]
    if lacking:
        raise ValueError(
            f"{cls.__name__} needs {names}, and {folder} has no {lacking}: pass them, as in "
            f"`from_pretrained(path, {lacking[0]}=...)`, or use the class that its {INDEX} names"
        )


def _variants(folder: Path, wanted: Mapping[str, Any], base: LoadOptions) -> dict[str, str | None]:
    """For each component the variant to load: the one asked for where it exists, else the ordinary weights."""
    variant = base.variant
    if variant is None:
        return dict.fromkeys(wanted)
    has = {n: downloading.has_variant(_names_in(folder / n), variant) for n in wanted}
    if not any(has.values()):
        raise CheckpointError(f"{folder}: no component has weights of the variant {variant!r}; leave `variant` out")
    return {n: variant if there else None for n, there in has.items()}


def _names_in(folder: Path) -> list[str]:
    return os.listdir(folder) if folder.is_dir() else []


def prepare(cls: Any, folder: Path, name: str, options: LoadOptions) -> Any:
    """A component of ``folder``, or something whose ``build()`` gives it; files are opened and checked only."""
    root = folder / name
    if not root.is_dir():
        raise MissingFile(f"{folder}: {INDEX} lists the component {name!r}, but there is no folder of this name")
    hub.check_inside(root, folder)
    if has_members(cls):
        return prepare_members(cls, root, options)
    if hasattr(cls, "_prepare"):
        return cls._prepare(root, options)
    if isinstance(cls, type) and issubclass(cls, nn.Module):
        return prepare_foreign(cls, root, options)
    return small_component(cls, root)
