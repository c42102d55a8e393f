"""Publishing on the hub: one mixin for everything that has ``save_pretrained``."""

from __future__ import annotations

import inspect
import tempfile
from pathlib import Path
from typing import Any

from . import hub


class PushToHubMixin:
    """For networks, schedulers and pipelines: save into a temporary folder and upload that."""

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        subfolder: str | None = None,
    ) -> str:
        """Upload to the repository ``repo_id``, which is made if it is not there; returns the URL of the commit.

        Args:
            commit_message: what the commit says; "Upload model" or the like if not given.
            private: whether a new repository is private; ``None``: as the organisation's default says.
            token: instead of the one that one is logged in with.
            create_pr: propose the files instead of committing them.
            safe_serialization: safetensors, not torch files.
            variant: ``"fp16"`` writes ``….fp16.safetensors``.
            subfolder: where in the repository.

        Raises:
            CheckpointError: the hub refuses, or can't be reached.
        """
        save: Any = self.save_pretrained  # type: ignore[attr-defined]
        taken = inspect.signature(save).parameters
        wanted = {"safe_serialization": safe_serialization, "variant": variant}
        with tempfile.TemporaryDirectory() as folder:
            save(folder, **{k: v for k, v in wanted.items() if k in taken})
            return upload(self, Path(folder), repo_id, commit_message, private, token, create_pr, subfolder)


def upload(
    saved: Any,
    folder: Path,
    repo_id: str | None = None,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    create_pr: bool = False,
    subfolder: str | None = None,
    **ignored: Any,
) -> str:
    """Upload ``folder``, into which ``saved`` was written; to the repository of that name, if ``repo_id`` says none."""
    kind = next((k for k in ("Model", "Scheduler") if k in type(saved).__name__), None)
    return hub.upload_folder(
        folder,
        repo_id or folder.absolute().name,
        message=commit_message or f"Upload {kind.lower() if kind else type(saved).__name__}",
        private=private,
        token=token,
        create_pr=create_pr,
        subfolder=subfolder,
    )
