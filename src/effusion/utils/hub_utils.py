"""Small questions about files of the hub."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from .. import __version__
from ..core.publish import PushToHubMixin as PushToHubMixin


def http_user_agent(user_agent: dict[str, Any] | str | None = None) -> str:
    """How a program that uses this library introduces itself."""
    agent = f"effusion/{__version__}; python/{sys.version.split()[0]}"
    if isinstance(user_agent, dict):
        user_agent = "; ".join(f"{k}/{v}" for k, v in user_agent.items())
    return f"{agent}; {user_agent}" if user_agent else agent


def extract_commit_hash(resolved_file: str | None, commit_hash: str | None = None) -> str | None:
    """``commit_hash``, or the commit that a file of the hub's cache belongs to."""
    if resolved_file is None or commit_hash is not None:
        return commit_hash
    found = re.search(r"snapshots/([0-9a-f]{40})/", Path(resolved_file).as_posix())
    return found[1] if found is not None else None


def _add_variant(weights_name: str, variant: str | None = None) -> str:
    """``model.safetensors`` with a variant: ``model.fp16.safetensors``."""
    stem, _, ending = weights_name.rpartition(".")
    return weights_name if variant is None else f"{stem}.{variant}.{ending}"
