"""Modular pipelines: a family's blocks with any components, run as they are or edited."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ..blocks import engine
from ..core.types import State
from ..families.base import Family
from .base import DiffusionPipeline
from .components import component_names


class ModularPipeline(DiffusionPipeline):
    """Runs an editable list of blocks.

    >>> pipe = ModularPipeline.from_pretrained("runwayml/stable-diffusion-v1-5")
    >>> pipe.blocks.insert_after("start", "mirror", lambda latents: {"latents": latents.flip(-1)})
    >>> images = pipe(prompt="a cat", output="images")

    Args:
        family: the record whose networks and rules the blocks use.
        task: which of its lists to start from.
        blocks: another list instead.
        components: by name; the blocks ask for them by these names.
    """

    def __init__(
        self,
        family: Family,
        task: str = "text2image",
        blocks: engine.BlockList | None = None,
        settings: Mapping[str, Any] | None = None,
        **components: Any,
    ) -> None:
        super().__init__()
        self.__dict__["family"], self.__dict__["task"] = family, task
        self._blocks = blocks if blocks is not None else family.blocks(task)
        self._names = list(components)
        self.register_modules(**components)
        self.register_to_config(**dict(settings or {}))

    @property
    def components(self) -> dict[str, Any]:
        return {name: getattr(self, name, None) for name in self._names}

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], task: str = "text2image", **kwargs: Any
    ) -> ModularPipeline:
        """Load the components of an ordinary checkpoint; arguments as ``DiffusionPipeline.from_pretrained``."""
        return cls.from_pipeline(DiffusionPipeline.from_pretrained(pretrained_model_name_or_path, **kwargs), task)

    @classmethod
    def from_pipeline(cls, pipeline: DiffusionPipeline, task: str | None = None) -> ModularPipeline:
        """The same components and blocks as a classic pipeline, free to edit."""
        names = component_names(type(pipeline))
        settings = {k: v for k, v in pipeline.config.items() if k not in names and not k.startswith("_")}
        return cls(pipeline.family, task or pipeline.task, settings=settings, **pipeline.components)

    def __call__(self, output: str | list[str] | None = None, **inputs: Any) -> Any:
        """Run the blocks on ``inputs``.

        Returns the :class:`~effusion.core.types.State`, or what ``output`` names of it.

        Raises:
            ValueError: an input that no block asks for.
        """
        known = {*self.blocks.inputs, "callback_on_step_end", "callback_on_step_end_tensor_inputs"}
        unknown = sorted(set(inputs) - known)
        if unknown:
            raise ValueError(f"no block asks for {unknown}; the blocks ask for {sorted(known)}")
        state: State = self._generate(inputs)
        if output is None:
            return state
        if isinstance(output, str):
            return state.get(output)
        return {name: state.get(name) for name in output}

    def _result(self, state: State) -> State:
        return state
