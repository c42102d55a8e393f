"""Where files come from: a folder, the cache, or a repository on the hub.

``huggingface_hub`` is imported when a repository is asked for, not before.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from .errors import CheckpointError

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
        CheckpointError: the file is not there, or can't be reached.
    """
    inside = confine(f"{subfolder}/{filename}" if subfolder else filename, "the request")
    root = Path(repo)
    if root.is_file():
        return root
    if root.is_dir():
        path = root / inside
        if path.is_file():
            return path
        raise CheckpointError(f"{root} has no file {inside}; it holds {_listing(path.parent, root)}")
    return _download(
        str(repo),
        str(inside),
        revision=revision,
        cache_dir=cache_dir,
        token=token,
        local_files_only=bool(local_files_only),
        force_download=force_download,
    )


def _listing(folder: Path, root: Path) -> str:
    folder = folder if folder.is_dir() else root
    names = sorted(p.name for p in folder.iterdir())
    return ", ".join(names[:12]) + (", …" if len(names) > 12 else "") if names else "nothing"


def _download(repo: str, inside: str, **where: Any) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(hf_hub_download(repo, inside, **where))
    except HFValidationError as error:
        raise CheckpointError(f"{repo!r} is neither a folder on this machine nor the name of a repository") from error
    except GatedRepoError as error:
        raise CheckpointError(f"{repo} is gated: ask for access on its page, then log in or pass `token=`") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{repo!r} is no folder here and no repository on the hub; if it is private, log in or pass `token=`"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{repo} has no revision {where.get('revision')!r}") from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{repo}/{inside} is not in the cache, and the hub was not asked or did not answer ({error})"
        ) from error
    except EntryNotFoundError as error:
        raise CheckpointError(f"{repo} has no file {inside} at revision {where.get('revision') or 'main'}") from error
    except HfHubHTTPError as error:
        raise CheckpointError(f"the hub could not deliver {repo}/{inside}: {error}") from error


def commit_of(path: Path) -> str | None:
    """The commit that a file of the hub's cache belongs to, or ``None`` for other files."""
    parts = path.parts
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts[:-1] else None


def upload_folder(folder: Path, repo_id: str | None = None, **kwargs: Any) -> str:
    """Create a repository on the hub and upload ``folder`` to it; returns the URL of the commit."""
    from huggingface_hub import HfApi

    api = HfApi(token=kwargs.pop("token", None))
    private = kwargs.pop("private", None)
    create_pr = kwargs.pop("create_pr", False)
    message = kwargs.pop("commit_message", None)
    url = api.create_repo(repo_id or folder.name, private=private, exist_ok=True)
    return str(
        api.upload_folder(repo_id=url.repo_id, folder_path=folder, commit_message=message, create_pr=create_pr)
    )
