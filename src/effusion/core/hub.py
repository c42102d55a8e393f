"""Where files come from: a folder, the cache, or a repository on the hub.

``huggingface_hub`` is imported when a repository is asked for, not before.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from .errors import CheckpointError, HubSilent, MissingFile

# the arguments that say where a file is, as every `from_pretrained` takes them
LOCATION = (
    "subfolder",
    "revision",
    "cache_dir",
    "token",
    "local_files_only",
    "force_download",
    "proxies",
)


def split_location(kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split keyword arguments into those that say where a file is, and the rest."""
    kwargs = dict(kwargs)
    legacy = kwargs.pop("use_auth_token", None)
    if legacy is not None and kwargs.get("token") is None:
        kwargs["token"] = legacy
    kwargs.pop("user_agent", None)
    where = {k: kwargs.pop(k) for k in LOCATION if k in kwargs}
    return where, kwargs


def confine(name: str, what: str) -> PurePosixPath:
    """``name`` as a relative path that can't leave its root; :class:`CheckpointError` otherwise."""
    path = PurePosixPath(name.replace("\\", "/"))
    if not name or path.is_absolute() or ".." in path.parts or ":" in name or "\0" in name:
        raise CheckpointError(f"{what} names {name!r}, which lies outside of its folder")
    return path


def resolve_file(
    repo: str | os.PathLike[str],
    filename: str,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool | None = False,
    force_download: bool = False,
    proxies: Any = None,
) -> Path:
    """The local path of ``filename`` in a folder or hub repository, downloaded if need be.

    Raises:
        MissingFile: the file is not there.
        CheckpointError: the repository can't be reached or does not let us in.
    """
    inside = confine(f"{subfolder}/{filename}" if subfolder else filename, "the request")
    root = Path(repo)
    if root.is_file():
        return root
    if root.is_dir():
        path = root / inside
        if path.is_file():
            check_inside(path, root)
            return path
        raise MissingFile(f"{root} has no file {inside}; it holds {_listing(path.parent, root)}")
    return _download(
        str(repo),
        str(inside),
        revision=revision,
        cache_dir=cache_dir,
        token=token,
        local_files_only=bool(local_files_only),
        force_download=force_download,
    )


def dataset_file(repo: str, filename: str, **where: Any) -> Path:
    """The local path of ``filename`` in a data set on the hub; never that of a folder here which is called like it."""
    inside = str(confine(filename, "the request"))
    return _download(repo, inside, repo_type="dataset", **{k: v for k, v in where.items() if k != "subfolder"})


def try_file(repo: str | os.PathLike[str], filename: str, **where: Any) -> Path | None:
    """:func:`resolve_file`, or ``None`` if the file is not there."""
    try:
        return resolve_file(repo, filename, **where)
    except MissingFile:
        return None


def sibling_files(
    path: Path, names: Iterable[str], repo: str | os.PathLike[str] | None = None, **where: Any
) -> dict[str, Path]:
    """The files ``names`` that lie beside ``path``, by name; fetched from ``repo`` if ``path`` came from there.

    Raises:
        CheckpointError: a name that leaves the folder, or a file that is not there.
    """
    names = list(names)
    parts = {name: confine(name, str(path)) for name in names}
    commit = commit_of(path)
    if commit and repo is not None and not Path(repo).exists():
        prefix = f"{where['subfolder']}/" if where.get("subfolder") else ""
        snapshot(str(repo), [prefix + name for name in names], **{**where, "revision": commit})
    found = {name: path.parent / part for name, part in parts.items()}
    for name, file in found.items():
        if not file.is_file():
            raise MissingFile(f"{path} lists {name}, which is missing in {path.parent}")
        check_inside(file, path.parent)
    return found


def check_inside(file: Path, root: Path) -> None:
    """Refuse a ``file`` that symbolic links lead out of ``root`` (or of the hub cache that ``root`` is in)."""
    allowed = [root.resolve()]
    cached = _in_cache(root.absolute() / "x")
    if cached:
        allowed.append(cached[0].resolve())
    real = file.resolve()
    if not any(real.is_relative_to(folder) for folder in allowed):
        raise CheckpointError(f"{file} is a link to {real}, outside of {root}")


def _listing(folder: Path, root: Path) -> str:
    folder = folder if folder.is_dir() else root
    names = sorted(p.name for p in folder.iterdir())
    return ", ".join(names[:12]) + (", …" if len(names) > 12 else "") if names else "nothing"


def _download(repo: str, inside: str, **where: Any) -> Path:
    from huggingface_hub import hf_hub_download

    with _hub_errors(repo, inside, where.get("revision")):
        return Path(hf_hub_download(repo, inside, **where))


def snapshot(
    repo: str,
    patterns: Iterable[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool | None = False,
    force_download: bool = False,
    literal: bool = True,
    **ignored: Any,
) -> Path:
    """The files ``patterns`` of ``repo``, downloaded in parallel; returns their folder in the cache.

    With ``literal`` they are names, otherwise shell patterns.
    """
    from huggingface_hub import snapshot_download

    with _hub_errors(repo, "", revision):
        folder = snapshot_download(
            repo,
            revision=revision,
            cache_dir=str(cache_dir) if cache_dir else None,
            token=token,
            local_files_only=bool(local_files_only),
            force_download=force_download,
            allow_patterns=[_literal(p) if literal else p for p in patterns],
        )
    return Path(str(folder))


def _literal(name: str) -> str:
    """``name`` as a pattern that matches it alone."""
    return re.sub(r"[*?\[]", r"[\g<0>]", name)


def repo_files(
    repo: str, *, revision: str | None = None, token: str | bool | None = None, **ignored: Any
) -> tuple[str, list[str]]:
    """The commit that ``revision`` of ``repo`` is now, and the names of all files in it.

    Raises:
        HubSilent: the hub is not to be asked, or does not answer.
    """
    from huggingface_hub import HfApi

    with _hub_errors(repo, "", revision):
        info = HfApi().model_info(repo, revision=revision, token=token)
    return str(info.sha), [entry.rfilename for entry in info.siblings or []]


@contextlib.contextmanager
def _hub_errors(repo: str, inside: str, revision: str | None) -> Iterator[None]:
    """Turn what ``huggingface_hub`` raises into errors that say what to do."""
    try:
        yield
    except Exception as error:
        # a failed `force_download` arrives as a ValueError around the reason
        reason = error.__cause__ if type(error) is ValueError and isinstance(error.__cause__, Exception) else error
        explained = _explain(reason, repo, inside, revision)
        if explained is None:
            raise
        raise explained from error


def _explain(error: Exception, repo: str, inside: str, revision: str | None) -> CheckpointError | None:
    from huggingface_hub import errors

    what = f"{repo}/{inside}" if inside else repo
    if isinstance(error, errors.HFValidationError):
        return CheckpointError(f"{repo!r} is neither a folder on this machine nor the name of a repository")
    if isinstance(error, errors.GatedRepoError):
        return CheckpointError(f"{repo} is gated: ask for access on its page, then log in or pass `token=`")
    if isinstance(error, errors.RepositoryNotFoundError):
        hint = "if it is private, log in or pass `token=`"
        return CheckpointError(f"{repo!r} is no folder here and no repository on the hub; {hint}")
    if isinstance(error, errors.RevisionNotFoundError):
        return CheckpointError(f"{repo} has no revision {revision!r}")
    if isinstance(error, errors.LocalEntryNotFoundError):
        return HubSilent(f"{what} is not in the cache, and the hub was not asked or did not answer: {error}")
    if isinstance(error, errors.EntryNotFoundError):
        return MissingFile(f"{repo} has no file {inside} at revision {revision or 'main'}")
    if isinstance(error, _client_errors(*_NO_ANSWER)):
        return HubSilent(f"the hub was not asked for {what}, or did not answer: {error}")
    if isinstance(error, (errors.HfHubHTTPError, OSError, *_client_errors("HTTPError"))):
        return CheckpointError(f"the hub could not deliver {what}: {error}")
    return None


_NO_ANSWER = ("ConnectionError", "TimeoutError", "ConnectError", "TimeoutException", "ReadTimeout")


def _client_errors(*names: str) -> tuple[type[Exception], ...]:
    """The errors called so of the HTTP client behind ``huggingface_hub``, if it is loaded, and of Python."""
    clients = (sys.modules.get(name) for name in ("builtins", "httpx", "httpx2", "requests"))
    return tuple(getattr(client, name) for client in clients for name in names if hasattr(client, name))


_CACHED = ("models--", "datasets--", "spaces--")


def _in_cache(path: Path) -> tuple[Path, str] | None:
    """The folder of the repository in the hub's cache that ``path`` lies in, and its commit there."""
    parts = path.parts
    for i in range(1, len(parts) - 1):
        if parts[i] == "snapshots" and parts[i - 1].startswith(_CACHED):
            return Path(*parts[:i]), parts[i + 1]
    return None


def commit_of(path: Path) -> str | None:
    """The commit that a file of the hub's cache belongs to, or ``None`` for other files."""
    found = _in_cache(path)
    return found[1] if found else None


CARD = """---
library_name: diffusers
---
"""


def upload_folder(
    folder: Path,
    repo_id: str,
    *,
    message: str,
    private: bool | None = None,
    token: str | None = None,
    create_pr: bool = False,
    subfolder: str | None = None,
) -> str:
    """Create the repository ``repo_id`` if need be and upload ``folder`` to it; returns the URL of the commit.

    A repository without a ``README.md`` gets one which says what its files are for; without it they are not found.

    Raises:
        CheckpointError: the hub refuses, or can't be reached.
    """
    from huggingface_hub import HfApi

    api, card = HfApi(token=token), folder / "README.md"
    with _hub_errors(repo_id, "", None):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if not subfolder and not card.exists() and not api.file_exists(repo_id, card.name):
            card.write_text(CARD)
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=folder, path_in_repo=subfolder, commit_message=message, create_pr=create_pr
        )
    return str(commit.commit_url)
