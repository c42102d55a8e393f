"""Auto pipelines: the right class for a task, from a checkpoint or from another pipeline."""

from __future__ import annotations

import os
from typing import Any, ClassVar

from ..core.config import ConfigMixin
from .base import DiffusionPipeline
from .faces import face_for


class AutoPipeline(ConfigMixin):
    """Base of the Auto pipelines; never built itself. As such it loads whatever a checkpoint is for."""

    config_name = "model_index.json"
    task: ClassVar[str | None] = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise OSError(
            f"{type(self).__name__} is not built directly; use {type(self).__name__}.from_pretrained(path) "
            f"or {type(self).__name__}.from_pipe(pipeline)"
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """Load the pipeline of this task for the checkpoint; arguments as ``DiffusionPipeline.from_pretrained``.

        Raises:
            ValueError: the checkpoint's family has no pipeline for the task.
        """
        if cls.task is None:
            return DiffusionPipeline.from_pretrained(pretrained_model_or_path, **kwargs)
        index = cls.load_config(pretrained_model_or_path, **kwargs)
        return face_for(index.get("_class_name", ""), cls.task).from_pretrained(pretrained_model_or_path, **kwargs)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Any:
        """The pipeline of this task with the components of another one; no weight is copied."""
        if cls.task is None:
            return pipeline
        return face_for(type(pipeline).__name__, cls.task).from_pipe(pipeline, **kwargs)


class AutoPipelineForText2Image(AutoPipeline):
    """The text-to-image pipeline of any checkpoint."""

    task = "text2image"


class AutoPipelineForImage2Image(AutoPipeline):
    """The image-to-image pipeline of any checkpoint."""

    task = "image2image"


class AutoPipelineForInpainting(AutoPipeline):
    """The inpainting pipeline of any checkpoint."""

    task = "inpaint"
