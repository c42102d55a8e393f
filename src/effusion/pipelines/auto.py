"""Auto pipelines: the right class for a task, from a checkpoint or from another pipeline."""

from __future__ import annotations

import os
from typing import Any, ClassVar

from ..core.config import ConfigMixin
from ..core.errors import UnsupportedTask
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

        With ``controlnet=`` it is the pipeline with control networks.

        Raises:
            ValueError: the checkpoint's family has no pipeline for the task.
        """
        if cls.task is None:
            return DiffusionPipeline.from_pretrained(pretrained_model_or_path, **kwargs)
        _check_guidance(kwargs)
        index = cls.load_config(pretrained_model_or_path, **kwargs)
        face = face_for(index.get("_class_name", ""), cls.task, _controlnet(kwargs))
        return face.from_pretrained(pretrained_model_or_path, **kwargs)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Any:
        """The pipeline of this task with the components of another one; no weight is copied.

        With ``controlnet=`` it is the pipeline with control networks, with ``controlnet=None`` the one without.
        """
        if cls.task is None:
            return pipeline
        _check_guidance(kwargs)
        return face_for(type(pipeline).__name__, cls.task, _controlnet(kwargs)).from_pipe(pipeline, **kwargs)


def _check_guidance(kwargs: dict[str, Any]) -> None:
    """Take ``enable_pag`` out of ``kwargs``; there is nothing to enable.

    Raises:
        UnsupportedTask: it is true.
    """
    if kwargs.pop("enable_pag", None):
        raise UnsupportedTask("`enable_pag`: perturbed-attention guidance is not there; leave it out, or pass False")


def _controlnet(kwargs: dict[str, Any]) -> bool | None:
    """Whether a pipeline with control networks is asked for; an explicit ``None`` asks for one without."""
    if "controlnet" not in kwargs:
        return None
    if kwargs["controlnet"] is None:
        del kwargs["controlnet"]
        return False
    return True


class AutoPipelineForText2Image(AutoPipeline):
    """The text-to-image pipeline of any checkpoint."""

    task = "text2image"


class AutoPipelineForImage2Image(AutoPipeline):
    """The image-to-image pipeline of any checkpoint."""

    task = "image2image"


class AutoPipelineForInpainting(AutoPipeline):
    """The inpainting pipeline of any checkpoint."""

    task = "inpaint"
