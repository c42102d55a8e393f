"""Loading and saving pipelines: every component is found, opened and checked before any weights are read."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..core import hub, log, registry, remote
from ..core.config import read_json
from ..core.errors import CheckpointError, MissingFile
from ..models.foreign import Fallback, native_class, prepare_foreign, without_code
from ..placement.machine import check_device
from ..weights import saving
from ..weights.prepare import LoadOptions, Prepared, parse_dtype
from . import downloading
from .components import component_names
from .members import folders_to_fetch, has_members, prepare_members

logger = log.get_logger(__name__)
INDEX = "model_index.json"
# arguments that scripts pass to any pipeline class, whether it has them or not
_HARMLESS = {"safety_checker", "feature_extractor", "requires_safety_checker", "image_encoder", "add_watermarker"}
_HARMLESS |= {"use_flash_attention_2"}  # the attention backend is chosen by `attention_backend`
_IGNORED = {"provider", "sess_options", "return_cached_folder", "load_connected_pipeline", "mirror"}
_CUSTOM = ("custom_pipeline", "custom_revision")


@dataclass
class PipelineOptions:
    """The arguments of a pipeline's ``from_pretrained`` that are neither components nor configuration."""

    base: LoadOptions
    dtypes: dict[str, torch.dtype | None] = field(default_factory=dict)
    default_dtype: torch.dtype | None = torch.float32
    device_map: Any = None
    max_memory: Any = None
    memory: Any = None
    ram: Any = None
    quality: str | None = None
    custom_pipeline: str | None = None
    custom_revision: str | None = None
    trust_remote_code: bool = False

    @classmethod
    def take(cls, kwargs: dict[str, Any]) -> PipelineOptions:
        """Pop what belongs here out of ``kwargs``; components and configuration stay."""
        if kwargs.get("quantization_config") is not None:
            raise ValueError("`quantization_config`: quantise a component by itself, then pass it to the pipeline")
        dtypes, default = _split_dtypes(kwargs)
        own = {n: kwargs.pop(n, None) for n in ("device_map", "max_memory", "memory", "ram", "quality", *_CUSTOM)}
        trusted = kwargs.pop("trust_remote_code", False) is True
        for name in _IGNORED:
            kwargs.pop(name, None)
        base = LoadOptions.take(kwargs)
        return cls(base, dtypes, default, trust_remote_code=trusted, **own)

    def for_component(self, name: str, variant: str | None) -> LoadOptions:
        """The options to load the component ``name`` with, from a folder of its own."""
        dtype = self.dtypes.get(name, self.default_dtype)
        device = self.device_map if isinstance(self.device_map, (str, torch.device, int)) else None
        single = check_device(device) if device is not None and device not in _STRATEGIES else None
        return replace(self.base, where={}, dtype=dtype, variant=variant, device=single)


_STRATEGIES = ("balanced", "auto", "sequential", "balanced_low_0")


def _split_dtypes(kwargs: dict[str, Any]) -> tuple[dict[str, torch.dtype | None], torch.dtype | None]:
    """``torch_dtype`` / ``dtype`` as (per component, default)."""
    old, new = kwargs.pop("torch_dtype", None), kwargs.pop("dtype", None)
    given = new if new is not None else old
    if given is None:
        return {}, torch.float32
    if not isinstance(given, Mapping):
        return {}, parse_dtype(given)
    table = {name: parse_dtype(value) for name, value in given.items()}
    return table, table.pop("default", torch.float32)


# -- loading -------------------------------------------------------------------------------------


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
        folder = download(path, passed=passed, **_download_options(options))
    index = read_index(folder)
    cls = pipeline_class(cls, index, folder, options)
    _check_arguments(cls, kwargs, options)
    components, settings = _gather(cls, folder, index, kwargs, options)
    pipe = assemble(cls, components, settings)
    pipe.register_to_config(_name_or_path=str(path))
    return _place(pipe, options)


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


def read_index(folder: Path) -> dict[str, Any]:
    """``model_index.json`` of ``folder``, checked: component names are plain, entries are [library, class]."""
    path = folder / INDEX
    if not path.is_file():
        hint = (
            "a single network is loaded with `AutoModel.from_pretrained`" if (folder / "config.json").is_file() else ""
        )
        raise MissingFile(f"{folder} has no {INDEX}, so it is no pipeline" + (f"; {hint}" if hint else ""))
    index = read_json(path)
    for name, value in index.items():
        if not name.startswith("_") and isinstance(value, list) and len(value) == 2:
            if not name.isidentifier():
                raise CheckpointError(f"{path}: {name!r} can't be the name of a component")
            if not all(part is None or isinstance(part, str) for part in value):
                raise CheckpointError(f"{path}: component {name!r} must be [library, class], not {value!r}")
    return index


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


def _check_arguments(cls: Any, kwargs: dict[str, Any], options: PipelineOptions) -> None:
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
        return registry.find_class(library, downloading.CLASS_ALIASES.get(class_name, class_name))
    except CheckpointError as error:
        raise CheckpointError(f"component {name!r}: {error}") from error


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


def small_component(cls: Any, root: Path) -> Any:
    """A scheduler, tokenizer or processor in the folder ``root``.

    Raises:
        CheckpointError: it can't be read.
    """
    closed = without_code(cls, str(root))
    for file in root.iterdir():
        hub.check_inside(file, root.parent)
    try:
        return cls.from_pretrained(root, **closed)
    except CheckpointError:
        raise
    except Exception as error:  # tokenizers and processors raise anything on damaged files
        raise CheckpointError(f"{root}: no {cls.__name__} could be read from it: {error}") from error


def _place(pipe: Any, options: PipelineOptions) -> Any:
    """Apply a budget or a ``device_map`` strategy; weights are still unread in the mapped files."""
    if (options.memory, options.ram, options.quality) != (None, None, None):
        pipe.fit(options.memory, ram=options.ram, quality=options.quality or "exact")
    elif isinstance(options.device_map, Mapping) or options.device_map in _STRATEGIES:
        pipe._apply_device_map(options.device_map, options.max_memory)
    elif options.device_map is not None:  # components were loaded there
        pipe.__dict__["_device_map"] = str(options.device_map)
    return pipe


def download(
    pretrained_model_name: str | os.PathLike[str],
    *,
    passed: list[str] | None = None,
    variant: str | None = None,
    use_safetensors: bool | None = None,
    custom_pipeline: str | None = None,
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> Path:
    """Fetch into the cache what a pipeline needs, and only that; returns the folder.

    That is ``model_index.json``, the small files of each component, and one form of its weights:
    the variant if there is one, safetensors if there are any. Components named in ``passed`` are
    left out. All files are of one commit.

    Raises:
        CheckpointError: no such repository, revision or pipeline; the hub does not answer.
    """
    where, _ = hub.split_location(kwargs)
    where.pop("subfolder", None)
    if Path(pretrained_model_name).is_dir():
        return Path(pretrained_model_name)
    repo = str(pretrained_model_name)
    index_path = hub.resolve_file(repo, INDEX, **where)
    commit = hub.commit_of(index_path)
    index = read_index(index_path.parent)
    class_name = index.get("_class_name")
    if isinstance(class_name, list):
        remote.consent(f"the pipeline {class_name!r} of {repo}", trust_remote_code)
    where["revision"] = commit
    skip = set(passed or ())
    parts = [n for n, v in index.items() if _is_present(n, v) and n not in skip]
    files: list[str] | None = None
    if not where.get("local_files_only"):
        with suppress(MissingFile):
            _, files = hub.repo_files(repo, revision=commit, token=where.get("token"))
    if files is None:  # nothing but the cache to go by
        return index_path.parent
    chosen = [INDEX]
    for part in [*parts, *folders_to_fetch(files, index, parts)]:
        chosen += downloading.choose_files(files, part, variant, use_safetensors)
    if trust_remote_code:  # code that the index names: the pipeline's, and that of components
        folders = {"", *parts}
        chosen += [f for f in files if f.endswith(".py") and f.rpartition("/")[0] in folders]
    return hub.snapshot(repo, chosen, **where)


def _is_present(name: str, value: Any) -> bool:
    return not name.startswith("_") and isinstance(value, list) and len(value) == 2 and value[1] is not None


# -- saving --------------------------------------------------------------------------------------


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
                written[name] = _names_in(aside / name)
        pipe.save_config(aside)
    for name, files in written.items():
        for stem in ("diffusion_pytorch_model", "model", "pytorch_model"):
            if any(file.startswith(stem) for file in files):
                saving.remove_stale(folder / name, files, stem, variant)
    if push_to_hub:
        hub.upload_folder(folder, **kwargs)


def _save_component(component: Any, folder: Path, wanted: Mapping[str, Any]) -> None:
    save: Callable[..., Any] = component.save_pretrained
    accepted = inspect.signature(save).parameters
    save(folder, **{k: v for k, v in wanted.items() if k in accepted})
