"""Which files of a repository a pipeline needs, and fetching them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..core import hub, remote
from ..core.errors import HubSilent
from ..weights import names
from .index import INDEX, present, read_index
from .members import folders_to_fetch

_SMALL = (".json", ".txt", ".model", ".jinja", ".vocab", ".merges")


def _kind(name: str) -> tuple[str, str | None] | None:
    """(extension, variant) of the name of a weights or index file, ``None`` of any other."""
    found = names.parse(name)
    known = found is not None and found.stem in names.STEMS and found.extension in ("safetensors", "bin")
    return (found.extension, found.variant) if found is not None and known else None


def has_variant(files: Iterable[str], variant: str) -> bool:
    """Whether some of ``files`` are weights of ``variant``."""
    return any(kind[1] == variant for name in files if (kind := _kind(name)))


def choose_files(
    files: Iterable[str], component: str, variant: str | None = None, use_safetensors: bool | None = None
) -> list[str]:
    """The files of the folder ``component`` to fetch: all small ones, and one form of the weights."""
    inside = [f for f in files if f.rpartition("/")[0] == component]
    kinds = {f: _kind(f.rpartition("/")[2]) for f in inside}
    small = [f for f in inside if kinds[f] is None and f.endswith(_SMALL)]
    extensions = {True: ("safetensors",), False: ("bin",), None: ("safetensors", "bin")}[use_safetensors]
    for wanted in dict.fromkeys((variant, None)):
        for extension in extensions:
            weights = [f for f in inside if kinds[f] == (extension, wanted)]
            if weights:
                return small + weights
    return small


def download(
    pretrained_model_name: str | os.PathLike[str],
    *,
    passed: Iterable[str] | None = None,
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
    path = hub.resolve_file(repo, INDEX, **where)
    where["revision"] = hub.commit_of(path)
    index = read_index(path.parent)
    if isinstance(index.get("_class_name"), list):
        remote.consent(f"the pipeline {index['_class_name']!r} of {repo}", trust_remote_code)
    files = _listing(repo, where)
    if files is None:  # nothing but the cache to go by
        return path.parent
    parts = [name for name in present(index) if name not in set(passed or ())]
    wanted = [*parts, *folders_to_fetch(files, index, parts)]
    chosen = [INDEX, *(f for part in wanted for f in choose_files(files, part, variant, use_safetensors))]
    if trust_remote_code:  # code that the index names: the pipeline's, and that of components
        folders = {"", *parts}
        chosen += [f for f in files if f.endswith(".py") and f.rpartition("/")[0] in folders]
    return hub.snapshot(repo, chosen, **where)


def _listing(repo: str, where: dict[str, Any]) -> list[str] | None:
    """The files of ``repo`` at the commit in ``where``; ``None`` if the hub is not to be asked or can't say."""
    if not where.get("local_files_only"):
        with suppress(HubSilent):
            return hub.repo_files(repo, revision=where["revision"], token=where.get("token"))[1]
    return None
