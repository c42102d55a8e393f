"""The one gate for foreign code: nothing outside of this file runs code that came with a checkpoint.

Whoever wants a class out of a folder or repository reads the files once (:func:`read_folder`,
:func:`read_repository`), as bytes of one commit, and :func:`load_class` runs exactly those bytes, if the
caller consents. No entry of a configuration can consent; only the argument ``trust_remote_code=True`` of
the person who loads.
"""

from __future__ import annotations

import builtins
import contextlib
import hashlib
import importlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from . import hub
from .config import FORMAT_VERSION
from .errors import CheckpointError, HubSilent, MissingFile, UntrustedCode

MAX_FILE, MAX_FILES = 4 << 20, 200
COMMUNITY = "diffusers/community-pipelines-mirror"
_ROOT = "effusion_foreign_"
_THEIRS, _OURS = "diffusers", __name__.split(".")[0]


@dataclass(frozen=True)
class Code:
    """The Python files of one place at one moment: ``files`` by module name."""

    where: str
    files: Mapping[str, bytes]

    @property
    def package(self) -> str:
        """A module name that stands for these bytes and no others."""
        digest = hashlib.sha256()
        for name in sorted(self.files):
            digest.update(f"{name}\0{len(self.files[name])}\0".encode() + self.files[name])
        return _ROOT + digest.hexdigest()


def consent(what: str, trusted: bool) -> None:
    """Raise :class:`UntrustedCode` unless the caller trusts ``what``."""
    if trusted is not True:
        raise UntrustedCode(
            f"{what} is code of its own, which would run on this machine; read it, and if you trust it load with "
            "`trust_remote_code=True` (and a `revision`, so that it stays what you read)"
        )


# entries by which a configuration makes transformers (or timm) fetch what nobody asked for, when it is not empty
_FETCHED = ("auto_map", "configuration_files", "audio_tokenizer", "audio_tokenizer_class")
# those that do so if they name a repository
_REPOSITORIES = ("backbone", "backbone_kwargs", "architecture", "model_args")


def refuse_fetched(config: Any, label: str) -> None:
    """A configuration may name code, kernels, or files that transformers would fetch; ours does not, however deep.

    An ``auto_map`` on top only says which classes the repository would have liked; who names an installed class
    leaves it out.

    Raises:
        UntrustedCode: it does.
    """
    inside: list[tuple[Any, bool]] = [(config, True)]
    while inside:
        value, top = inside.pop()
        if isinstance(value, (list, tuple)):
            inside += [(entry, False) for entry in value]
        for key, entry in value.items() if isinstance(value, Mapping) else ():
            names = str(key).endswith("_implementation") or key in _REPOSITORIES
            if (names and _slashed(entry)) or (key in _FETCHED and entry and not (top and key == "auto_map")):
                raise UntrustedCode(f"{label}: {key}={entry!r} is code from elsewhere; take it out to load the model")
            inside.append((entry, False))


def _slashed(value: Any) -> bool:
    """Whether there is a text in ``value`` that may be the name of a repository."""
    if isinstance(value, (list, tuple)):
        return any(_slashed(entry) for entry in value)
    if isinstance(value, Mapping):
        return any(_slashed(entry) for entry in value.values())
    return isinstance(value, str) and "/" in value


def read_folder(folder: Path) -> Code:
    """The Python files directly in ``folder``; a file that links lead out of it is refused."""
    files: dict[str, bytes] = {}
    for path in sorted(folder.glob("*.py")):
        hub.check_inside(path, folder)
        if path.stat().st_size > MAX_FILE or len(files) >= MAX_FILES:
            raise CheckpointError(f"{folder}: more code than is plausible ({path.name})")
        files[path.stem] = path.read_bytes()
    return Code(str(folder), files)


def read_repository(repo: str, trusted: bool, subfolder: str | None = None, **where: Any) -> Code:
    """The Python files in a repository, all of one commit; fetched only with consent."""
    consent(f"the repository {repo}", trusted)
    where = {k: v for k, v in where.items() if k not in ("subfolder", "revision")} | {"revision": where.get("revision")}
    if not where.get("local_files_only"):
        with contextlib.suppress(HubSilent):  # then the cache is all there is
            where["revision"], _ = hub.repo_files(repo, revision=where["revision"], token=where.get("token"))
    pattern = f"{subfolder}/*.py" if subfolder else "*.py"
    folder = hub.snapshot(repo, [pattern], literal=False, **where)
    return read_folder(folder / subfolder if subfolder else folder)


def read_community(name: str, trusted: bool, version: str | None = None, **where: Any) -> Code:
    """A pipeline of the community's collection, by name; fetched only with consent.

    Args:
        version: of the collection: ``"main"``, or a release such as ``"v0.42.1"`` (the one whose names we speak).
    """
    consent(f"the community pipeline {name}", trusted)
    version = version or f"v{FORMAT_VERSION}"
    where = {k: v for k, v in where.items() if k != "revision"}
    path = hub.dataset_file(COMMUNITY, f"{version}/{name}.py", **where)
    return Code(f"{COMMUNITY}/{version}", {name: path.read_bytes()})


def load_class(code: Code, module: str, class_name: str | None, trusted: bool) -> type:
    """Run ``module`` of ``code`` and return its class ``class_name`` (the only pipeline in it, if ``None``).

    Imports of ``diffusers`` in it mean this library; relative imports mean its own files.

    Raises:
        UntrustedCode: no consent.
        MissingFile: there is no such module.
        CheckpointError: there is no such class in it.
    """
    consent(f"{module}.py of {code.where}", trusted)
    if module not in code.files:
        raise MissingFile(f"{code.where} has no {module}.py; its code is {sorted(code.files) or 'nothing'}")
    _install(code)
    loaded = importlib.import_module(f"{code.package}.{module}")
    found = _pipelines(loaded) if class_name is None else [getattr(loaded, class_name, None)]
    if len(found) != 1 or not isinstance(found[0], type):
        names = [c.__name__ for c in found if isinstance(c, type)]
        raise CheckpointError(
            f"{code.where}/{module}.py: expected a class {class_name or 'of a pipeline'}, found {names}"
        )
    return found[0]


def _pipelines(module: ModuleType) -> list[Any]:
    own = [v for v in vars(module).values() if isinstance(v, type) and v.__module__ == module.__name__]
    return [v for v in own if any(base.__name__ == "DiffusionPipeline" for base in v.__mro__[1:])]


_known: dict[str, Code] = {}


def _install(code: Code) -> None:
    _known[code.package] = code
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())


class _Finder(MetaPathFinder, Loader):
    """Imports from the bytes that were read, and never from a disk where they may have changed."""

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        if package not in _known or (name and name not in _known[package].files):
            return None
        return ModuleSpec(fullname, self, is_package=not name)

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        package, _, name = module.__name__.partition(".")
        module.__dict__["__builtins__"] = {**vars(builtins), "__import__": _import}
        if name:
            source = _known[package].files[name]
            exec(compile(source, f"<{_known[package].where}/{name}.py>", "exec"), module.__dict__)


def _import(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
    """``import`` as foreign code sees it: the ecosystem's library is this one."""
    if level == 0 and (name == _THEIRS or name.startswith(_THEIRS + ".")):
        name = _OURS + name[len(_THEIRS) :]
    return builtins.__import__(name, globals, locals, fromlist, level)
