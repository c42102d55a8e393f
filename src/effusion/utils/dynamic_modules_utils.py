"""Classes out of code that is not ours, through the one gate for it (``core/remote.py``)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..core import remote


def get_class_from_dynamic_module(
    pretrained_model_name_or_path: str | os.PathLike[str],
    module_file: str,
    subfolder: str | None = None,
    class_name: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    force_download: bool = False,
    proxies: dict[str, str] | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    local_dir: str | None = None,
    trust_remote_code: bool = False,
) -> type[Any]:
    """The class ``class_name`` of ``module_file`` in a folder or repository, or of a pipeline of the community.

    Args:
        local_dir: not used: code runs from the bytes that were read, there is no copy of it.

    Raises:
        UntrustedCode: without ``trust_remote_code=True``, for code of any origin.
        CheckpointError: no such file, or no such class in it.
    """
    where: dict[str, Any] = {
        "cache_dir": cache_dir,
        "force_download": force_download,
        "token": token,
        "local_files_only": local_files_only,
    }
    place, module = str(pretrained_model_name_or_path), Path(module_file).stem
    folder = Path(place, subfolder or "")
    if Path(place).is_file():
        code, module = remote.read_folder(Path(place).parent), Path(place).stem
    elif folder.is_dir():
        code = remote.read_folder(folder)
    elif "/" not in place:
        code, module = remote.read_community(place, trust_remote_code, revision, **where), place
    else:
        code = remote.read_repository(place, trust_remote_code, subfolder, revision=revision, **where)
    return remote.load_class(code, module, class_name, trust_remote_code)
