"""AutoModel: the class is what the configuration says."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..core import hub, registry, remote
from ..core.config import ConfigMixin, read_json
from ..core.errors import CheckpointError, MissingFile
from .foreign import from_config, load_foreign


class AutoModel(ConfigMixin):
    """Loads a network without being told its class; the configuration says it (ours, or one of transformers)."""

    config_name = "config.json"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError("AutoModel is not built itself: use `AutoModel.from_pretrained` or `AutoModel.from_config`")

    @classmethod
    def from_pretrained(cls, pretrained_model_or_path: str | os.PathLike[str] | None = None, **kwargs: Any) -> Any:
        """Load whatever network is there; takes the arguments of :meth:`ModelMixin.from_pretrained`.

        If ``subfolder`` has no configuration, or one without a class in it, the class comes from the
        ``model_index.json`` above it; so schedulers and tokenizers of a pipeline are found too.

        Raises:
            CheckpointError: no configuration, or one that names no class that we have.
            UntrustedCode: the configuration wants code of its own to be run.
        """
        path = kwargs.pop("pretrained_model_name_or_path", pretrained_model_or_path)
        if path is None:
            raise ValueError("AutoModel.from_pretrained needs a folder or the name of a repository")
        trusted = kwargs.pop("trust_remote_code", False) is True
        where, _ = hub.split_location(kwargs)
        found, commit = _class_of(path, where, trusted)
        if commit is not None and not Path(path).exists():  # weights are those of the same commit
            kwargs["revision"] = commit
        if found.__module__.split(".")[0] == "transformers":
            return load_foreign(found, path, **kwargs)
        return found.from_pretrained(path, **kwargs)

    @classmethod
    def from_config(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path_or_dict: str | os.PathLike[str] | Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Build the network that a configuration (a dictionary, or where one lies) describes, with random weights."""
        source = pretrained_model_name_or_path_or_dict
        if source is None:
            raise ValueError("AutoModel.from_config needs a configuration, a folder or the name of a repository")
        trusted = kwargs.pop("trust_remote_code", False) is True
        where, rest = hub.split_location(kwargs)
        if isinstance(source, Mapping):
            config, label = dict(source), "the configuration"
        else:
            config, label = read_json(hub.resolve_file(source, cls.config_name, **where)), str(source)
        return from_config(class_from_config(config, label, trusted), config, label, **rest)


def _class_of(path: str | os.PathLike[str], where: Mapping[str, Any], trusted: bool) -> tuple[Any, str | None]:
    """The class of what is in ``path``, and the commit of the file that says so."""
    config_file = hub.try_file(path, AutoModel.config_name, **where)
    config = read_json(config_file) if config_file is not None else {}
    if "_class_name" not in config and where.get("subfolder"):
        index = hub.try_file(path, "model_index.json", **{**where, "subfolder": None})
        entry = read_json(index).get(str(where["subfolder"])) if index else None
        if isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str) for part in entry):
            library, name = entry
            theirs = library == "transformers"
            found = registry.find_class(library, name) if theirs else registry.find_component(name, str(index), library)
            return found, hub.commit_of(index) if index else None
    if config_file is None:
        raise MissingFile(f"{Path(path) / (where.get('subfolder') or '')}: no {AutoModel.config_name} there")
    commit = hub.commit_of(config_file)
    if "auto_map" in config and trusted and commit and not Path(path).exists():
        remote.read_repository(str(path), trusted, **{**where, "revision": commit})  # fetches the code beside it
    return class_from_config(config, str(config_file), trusted), commit


def class_from_config(config: Mapping[str, Any], label: str, trusted: bool = False) -> Any:
    """The class that a network's configuration names.

    Raises:
        UntrustedCode: it has an ``auto_map`` (code in the repository) and no class that is installed.
    """
    name = config.get("_class_name")
    if isinstance(name, str) and name in registry.public_names():
        return registry.find_component(name, label)
    architectures = config.get("architectures")
    if isinstance(config.get("model_type"), str) and isinstance(architectures, list) and len(architectures) == 1:
        return registry.find_class("transformers", str(architectures[0]))
    if "auto_map" in config:
        return _foreign(config["auto_map"], label, trusted)
    if isinstance(name, str):
        return registry.find_class("diffusers", name)  # raises, naming the class
    raise CheckpointError(f"{label} names no class: neither `_class_name` nor `model_type` with `architectures`")


def _foreign(table: Any, label: str, trusted: bool) -> Any:
    """The class that an ``auto_map`` names, as ``file.Class``, beside the configuration; takes consent."""
    entry = table.get("AutoModel") if isinstance(table, Mapping) else None
    remote.consent(f"the class {entry!r} of {label}", trusted)
    if not isinstance(entry, str) or entry.count(".") != 1 or not all(p.isidentifier() for p in entry.split(".")):
        raise CheckpointError(f"{label}: `auto_map` must name an AutoModel as 'file.Class', not {table!r}")
    if not Path(label).is_file():
        raise CheckpointError(f"{label} names code ({entry}) but comes from no folder that could hold it")
    module, _, class_name = entry.partition(".")
    return remote.load_class(remote.read_folder(Path(label).parent), module, class_name, trusted)
