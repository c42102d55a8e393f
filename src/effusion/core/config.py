"""Configurations: recorded at construction, saved as JSON, read back into the same object.

The format is the ecosystem's: one flat JSON object with ``_class_name`` and ``_diffusers_version``
(the version of the format, not of this library) beside the arguments of ``__init__``.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from . import hub, log, publish
from .errors import CheckpointError
from .files import parse_json, write_atomically

FORMAT_VERSION = "0.42.1"
logger = log.get_logger(__name__)
Self = TypeVar("Self", bound="ConfigMixin")
Init = TypeVar("Init", bound=Callable[..., None])


class FrozenDict(OrderedDict[str, Any]):
    """A configuration: read as ``config.key`` or ``config["key"]``, never written."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"this config has no field {name!r}; it has {sorted(self)}") from None

    def _frozen(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("a config can't be changed; build a new object with `from_config(config, key=value)`")

    __setitem__ = __delitem__ = __setattr__ = setdefault = pop = update = clear = popitem = _frozen

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        for key, value in dict(*args, **kwargs).items():
            OrderedDict.__setitem__(self, key, value)

    def __reduce__(self) -> Any:
        return FrozenDict, (dict(self),)

    def copy(self) -> FrozenDict:
        return FrozenDict(self)


class ConfigMixin:
    """Mixin of everything that is built from a flat, saved configuration.

    Attributes:
        config_name: name of the file that :meth:`save_config` writes.
        ignore_for_config: arguments of ``__init__`` that are not part of the configuration.
    """

    config_name: ClassVar[str | None] = None
    ignore_for_config: ClassVar[list[str]] = []
    has_compatibles: ClassVar[bool] = False
    _auto_class: ClassVar[str | None] = None
    _internal_dict: FrozenDict

    @property
    def config(self) -> FrozenDict:
        """The arguments that the object was built with."""
        return self._internal_dict

    if not TYPE_CHECKING:  # for scripts: our own code says `.config`, and a type checker holds it to that

        def __getattr__(self, name: str) -> Any:
            """An entry of the configuration under its own name; deprecated, as in the ecosystem."""
            config = self.__dict__.get("_internal_dict", {})  # none while the object is copied or unpickled
            if name not in config:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            message = f"`{type(self).__name__}.{name}` is an entry of its configuration: read `.config.{name}` instead"
            warnings.warn(f"{message}; reading it from the object is deprecated", FutureWarning, stacklevel=2)
            return config[name]

    def register_to_config(self, **kwargs: Any) -> None:
        """Add ``kwargs`` to the configuration, replacing entries of the same name."""
        kwargs.pop("kwargs", None)
        before = dict(self.__dict__.get("_internal_dict", {}))
        object.__setattr__(self, "_internal_dict", FrozenDict({**before, **kwargs}))

    # -- reading ---------------------------------------------------------------------------------

    @classmethod
    def from_config(
        cls: type[Self],
        config: Mapping[str, Any] | None = None,
        return_unused_kwargs: bool = False,
        **kwargs: Any,
    ) -> Self | tuple[Self, dict[str, Any]]:
        """Build an object from ``config``; ``kwargs`` replace entries of it.

        A configuration of a compatible class (a scheduler's, say) is understood: what that class
        had left at its default is taken from the defaults here, and what this class does not know
        is kept in the new configuration, so that converting back restores it.

        Raises:
            ValueError: ``config`` is not a mapping.
        """
        config = kwargs.pop("pretrained_model_name_or_path", config)
        if not isinstance(config, Mapping):
            raise ValueError(
                f"`{cls.__name__}.from_config` takes a configuration (a mapping), not {type(config).__name__} "
                f"{config!r}; to read one from a folder or the hub use `{cls.__name__}.load_config(path)`"
            )
        init, unused, hidden = cls.extract_init_dict(config, **kwargs)
        obj = cls(**init)
        if hidden:
            obj.register_to_config(**hidden)
        if return_unused_kwargs:
            return obj, {**unused, **hidden}
        return obj

    @classmethod
    def load_config(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        return_unused_kwargs: bool = False,
        return_commit_hash: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Read the configuration file of a folder or hub repository as a dictionary.

        Takes the location arguments of the hub (``subfolder``, ``revision``, ``cache_dir``,
        ``token``, ``local_files_only``, ``force_download``, ``proxies``).

        Raises:
            CheckpointError: there is no such file, or it is not a JSON object.
        """
        assert cls.config_name is not None, f"{cls.__name__} defines no config_name"
        where, rest = hub.split_location(kwargs)
        path = hub.resolve_file(pretrained_model_name_or_path, cls.config_name, **where)
        config = read_json(path)
        answer: tuple[Any, ...] = (config,)
        if return_unused_kwargs:
            answer += (rest,)
        if return_commit_hash:
            answer += (hub.commit_of(path),)
        return answer[0] if len(answer) == 1 else answer

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> Any:
        return cls.load_config(*args, **kwargs)

    @classmethod
    def extract_init_dict(
        cls, config_dict: Mapping[str, Any], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Split ``config_dict`` and ``kwargs`` into (arguments of ``__init__``, unused, hidden)."""
        own = cls._init_names() - set(cls.ignore_for_config)
        defaults_there = set(config_dict.get("_use_default_values", ()))
        stored = {k: v for k, v in config_dict.items() if k not in defaults_there and k != "_use_default_values"}
        public = {k: v for k, v in stored.items() if not k.startswith("_")}
        init = {k: v for k, v in {**public, **kwargs}.items() if k in own}
        unused = {k: v for k, v in kwargs.items() if k not in own}
        hidden = {k: v for k, v in public.items() if k not in init}
        strange = sorted(set(hidden) - cls._names_of_relatives()) if hidden else []
        if strange:
            logger.warning("%s: unknown configuration entries %s are kept but have no effect", cls.__name__, strange)
        return init, unused, hidden

    @classmethod
    def _init_names(cls) -> set[str]:
        parameters = inspect.signature(cls.__init__).parameters.values()
        skip = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        return {p.name for p in parameters if p.kind not in skip} - {"self"}

    @classmethod
    def _names_of_relatives(cls) -> set[str]:
        """Arguments of the classes that this one's configuration can go on to: it carries theirs along."""
        return {name for other in cls._get_compatibles() for name in other._init_names()}

    @classmethod
    def _get_compatibles(cls) -> list[type[ConfigMixin]]:
        return []

    def __repr__(self) -> str:
        """The class and its configuration; networks show their layers instead."""
        return f"{type(self).__name__} {self.to_json_string()}"

    @classmethod
    def register_for_auto_class(cls, auto_class: str | type = "AutoModel") -> None:
        """Have saved configurations say that ``AutoModel`` finds this class in the file that it is written in.

        Raises:
            ValueError: another ``auto_class``.
        """
        name = auto_class if isinstance(auto_class, str) else auto_class.__name__
        if name != "AutoModel":
            raise ValueError(f"auto_class={name!r}: classes can be registered for AutoModel only")
        cls._auto_class = name

    # -- writing ---------------------------------------------------------------------------------

    def save_config(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write the configuration to ``save_directory/config_name``, replacing it in one step."""
        assert self.config_name is not None, f"{type(self).__name__} defines no config_name"
        folder = Path(save_directory)
        if folder.is_file():
            raise CheckpointError(f"{folder} is a file; `save_directory` must be a folder")
        folder.mkdir(parents=True, exist_ok=True)
        self.to_json_file(folder / self.config_name)
        if push_to_hub:
            publish.upload(self, folder, **kwargs)

    def to_json_string(self) -> str:
        """The configuration as JSON text, as written to disk."""
        skip = {"_ignore_files", "_use_default_values"}
        body = {k: _plain(v) for k, v in self.__dict__.get("_internal_dict", {}).items() if k not in skip}
        head: dict[str, Any] = {"_class_name": type(self).__name__, "_diffusers_version": FORMAT_VERSION}
        if self._auto_class is not None:
            place = f"{type(self).__module__.rpartition('.')[2]}.{type(self).__name__}"
            head["auto_map"] = {**body.get("auto_map", {}), self._auto_class: place}
        return json.dumps({**body, **head}, indent=2, sort_keys=True) + "\n"

    def to_json_file(self, json_file_path: str | os.PathLike[str]) -> None:
        write_atomically(Path(json_file_path), self.to_json_string().encode())


def register_to_config(init: Init) -> Init:
    """Decorator of ``__init__``: its arguments and defaults become the object's configuration.

    Arguments whose name starts with an underscore, and those in ``ignore_for_config``, are left out.
    """
    signature = inspect.signature(init)
    positional = [n for n in signature.parameters if n != "self"]
    defaults = {n: p.default for n, p in signature.parameters.items() if p.default is not inspect.Parameter.empty}

    @functools.wraps(init)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
        if not isinstance(self, ConfigMixin):
            raise TypeError(f"`@register_to_config` is for ConfigMixin classes; {type(self).__name__} is none")
        given = {**dict(zip(positional, args, strict=False)), **kwargs}
        passed = {k: v for k, v in given.items() if not k.startswith("_") and k not in self.ignore_for_config}
        config = {k: v for k, v in {**defaults, **passed}.items() if k not in self.ignore_for_config}
        config = {k: v for k, v in config.items() if not k.startswith("_")}
        config["_use_default_values"] = sorted(set(config) - set(passed))
        self.register_to_config(**config)
        init(self, *args, **{k: v for k, v in kwargs.items() if not k.startswith("_") or k in positional})

    return wrapper  # type: ignore[return-value]


def read_json(path: Path, limit: int = 64 << 20) -> dict[str, Any]:
    """Read one JSON object; :class:`CheckpointError` if it is too large, broken or no object."""
    if path.stat().st_size > limit:
        raise CheckpointError(f"{path}: {path.stat().st_size} bytes of JSON, more than the {limit} allowed")
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); download or save it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found a {type(value).__name__}")
    return value


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):  # tensors and numpy arrays
        return value.tolist()
    if isinstance(value, os.PathLike):
        return Path(value).as_posix()
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if hasattr(value, "dtype") or type(value).__module__ == "torch":
        return str(value)
    return value
