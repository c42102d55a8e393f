"""The base of all pipelines: components under their names, and the run of a family's blocks."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn
from tqdm.auto import tqdm

from ..blocks import engine
from ..blocks.images import VaeImageProcessor
from ..core import log
from ..core.config import ConfigMixin
from ..core.publish import PushToHubMixin
from ..core.types import State, Step
from ..placement.pipeline_switches import PipelineSwitches
from . import downloading, loading, saving, sharing, single_file
from .callbacks import MultiPipelineCallbacks, PipelineCallback, read_tensor, write_tensors
from .components import component_entry, component_names
from .facts import LIVE, PipelineFacts
from .pending import PendingComponents

logger = log.get_logger(__name__)
Self = TypeVar("Self", bound="DiffusionPipeline")


class DiffusionPipeline(PipelineFacts, PendingComponents, PipelineSwitches, ConfigMixin, PushToHubMixin):
    """Components (networks, tokenizers, a scheduler) and a way to run them.

    Load any pipeline with :meth:`from_pretrained`; the folder says which class it is.

    Attributes:
        family: the record that the pipeline runs.
        task: which of the family's tasks it does.
    """

    config_name = "model_index.json"
    task: ClassVar[str] = "text2image"
    output_class: ClassVar[Any] = None
    model_cpu_offload_seq: ClassVar[str | None] = None
    _optional_components: ClassVar[list[str]] = []
    _exclude_from_cpu_offload: ClassVar[list[str]] = []
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents"]
    _load_connected_pipes: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self._blocks: engine.BlockList | None = None

    # -- components ------------------------------------------------------------------------------

    def _register(self, arguments: Mapping[str, Any]) -> None:
        """Take ``locals()`` of ``__init__``: components become attributes, the rest configuration."""
        names = component_names(type(self))
        given = {k: v for k, v in arguments.items() if k not in ("self", "__class__")}
        self.register_modules(**{k: v for k, v in given.items() if k in names})
        self.register_to_config(**{k: v for k, v in given.items() if k not in names})

    def register_modules(self, **components: Any) -> None:
        """Make ``components`` attributes of the pipeline, listed in its configuration as [library, class]."""
        for name, component in components.items():
            self.register_to_config(**{name: component_entry(component)})
            super().__setattr__(name, component)

    def __setattr__(self, name: str, value: Any) -> None:
        if self._has(name) and self._is_component(name):
            self.register_to_config(**{name: component_entry(value)})
        super().__setattr__(name, value)

    @property
    def components(self) -> dict[str, Any]:
        """All components by name; those that are not there are ``None``."""
        return {name: getattr(self, name, None) for name in component_names(type(self))}

    @property
    def parameters(self) -> dict[str, Any]:
        """What else the pipeline was built with: ``Other(**pipe.components, **pipe.parameters)``."""
        return sharing.parameters_of(self)

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The components that are networks."""
        return {name: c for name, c in self.components.items() if isinstance(c, nn.Module)}

    @property
    def name_or_path(self) -> str | None:
        return self.config.get("_name_or_path")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first network."""
        networks: Iterator[Any] = iter(self.modules.values())
        found: torch.dtype = next((m.dtype for m in networks), torch.float32)
        return found

    @property
    def device(self) -> torch.device:
        """Where the first network is."""
        networks: Iterator[Any] = iter(self.modules.values())
        found: torch.device = next((m.device for m in networks), torch.device("cpu"))
        return found

    # -- loading and saving ----------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls: type[Self], pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Self:
        """Load a pipeline from a folder or a repository on the hub; see :func:`~.loading.load_pipeline`."""
        return loading.load_pipeline(cls, pretrained_model_name_or_path, **kwargs)  # type: ignore[no-any-return]

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save every component and ``model_index.json``; see :func:`~.saving.save_pipeline`."""
        how = (safe_serialization, variant, max_shard_size, push_to_hub)
        saving.save_pipeline(self, save_directory, *how, **kwargs)

    @classmethod
    def from_single_file(cls: type[Self], pretrained_model_link_or_path: Any, **kwargs: Any) -> Self:
        """Load a pipeline out of one file in its original layout; see :func:`~.single_file.load_single`."""
        return single_file.load_single(cls, pretrained_model_link_or_path, **kwargs)  # type: ignore[no-any-return]

    def save_single_file(self, path: str | os.PathLike[str], **metadata: str) -> None:
        """Write the networks into one file in the original layout; see :func:`~.saving.save_single`."""
        saving.save_single(self, path, **metadata)

    @classmethod
    def download(cls, pretrained_model_name: str | os.PathLike[str], **kwargs: Any) -> str:
        """Fetch what a pipeline needs into the cache and return the folder."""
        return str(downloading.download(pretrained_model_name, **kwargs))

    @classmethod
    def from_pipe(cls: type[Self], pipeline: DiffusionPipeline, **kwargs: Any) -> Self:
        """A pipeline of this class, or ``custom_pipeline``, that shares the components of another one; ``kwargs`` replace
        some. See :func:`~.sharing.share`."""
        return sharing.share(cls, pipeline, kwargs)  # type: ignore[no-any-return]

    # -- progress --------------------------------------------------------------------------------

    def progress_bar(self, iterable: Any = None, total: int | None = None) -> Any:
        """A progress bar over ``iterable`` or of ``total`` steps, as :meth:`set_progress_bar_config` says."""
        if (iterable is None) == (total is None):
            raise ValueError("give `iterable` or `total`, one of them")
        config = dict(getattr(self, "_progress_bar_config", {}))
        config.setdefault("disable", not log.is_progress_bar_enabled())
        return tqdm(iterable, **config) if iterable is not None else tqdm(total=total, **config)

    def set_progress_bar_config(self, **kwargs: Any) -> None:
        """Options of ``tqdm`` for all runs; ``disable=True`` for none."""
        self._progress_bar_config = kwargs

    @staticmethod
    def numpy_to_pil(images: Any) -> Any:
        """Arrays (B, H, W, C) in [0, 1] to PIL images."""
        return VaeImageProcessor.numpy_to_pil(images)

    # -- running ---------------------------------------------------------------------------------

    @property
    def blocks(self) -> engine.BlockList:
        """The blocks of this pipeline, its own to edit."""
        if self._blocks is None:
            self._blocks = self.family.blocks(self.task)
        return self._blocks

    def _context(self) -> dict[str, Any]:
        """What blocks may ask for besides the state."""
        assigned = self._assigned()
        return {
            **assigned,
            **self.components,
            "components": self.components,
            "family": self._family_as_assigned(assigned),
            "task": self.task,
            "config": self.config,
            "device": self._execution_device,
            "image_processor": self.image_processor,
            "mask_processor": self.mask_processor,
        }

    def stream(self, **inputs: Any) -> Iterator[Step]:
        """Run, yielding each :class:`~effusion.core.types.Step`; stop early by leaving the loop.

        The last step's ``state`` has the result in ``images`` once the iterator is exhausted.
        """
        with self._as_planned(inputs) as run:
            yield from self._steps(self._begin(inputs), run)

    def _begin(self, inputs: Mapping[str, Any]) -> State:
        state = State()
        state.update({**self.family.defaults.get(self.task, {}), **self._with_assigned_size(inputs)})
        if state.get("output_type") not in (None, "latent") and self.components.get("vae", self) is None:
            raise ValueError("this pipeline has no `vae`: load one, or pass output_type='latent'")
        self._interrupt, self._current_timestep = False, None
        for name in LIVE:
            setattr(self, f"_{name}", state.get(name))
        return state

    def _generate(self, arguments: Mapping[str, Any]) -> Any:
        """Run with ``locals()`` of a face's ``__call__``; returns its output class, or a tuple."""
        inputs = {k: v for k, v in arguments.items() if k not in ("self", "kwargs", "__class__")}
        extra: dict[str, Any] = {k: inputs.pop(k) for k in ("callback", "callback_steps") if k in inputs}
        inputs |= self._legacy_callback({**extra, **(arguments.get("kwargs") or {})})
        with self._as_planned(inputs) as run:
            return self._result(self._run(inputs, run))

    def _run(self, inputs: Mapping[str, Any], run: Any) -> State:
        """The blocks in order; callbacks and the bar are told of each step."""
        state = self._begin(inputs)
        callback, names = self._callback_of(state)
        bar: Any = None

        def on_block(block: engine.Block, state: State) -> None:
            nonlocal bar
            if block.name == "denoise":
                self._num_timesteps, self._current_timestep = len(state.timesteps), state.timesteps[0]
                bar = self.progress_bar(total=-(-self._num_timesteps // self.components["scheduler"].order))

        try:
            with torch.no_grad():
                for step in self._steps(state, run, on_block):
                    self._after_step(step, callback, names, bar)
                    self._current_timestep = _next(state.timesteps, step.index)
        finally:
            self._current_timestep = None
            if bar is not None:
                bar.close()
        return state

    def _steps(self, state: State, run: Any, on_block: Any = None) -> Iterator[Step]:
        """The blocks in order, under a plan if ``run`` is one; gradients are off in them, not between steps."""

        def begins(block: engine.Block, state: State) -> None:
            self._meets(run, state)
            if on_block is not None:
                on_block(block, state)

        steps = engine.stream(self.blocks, state, {**self._context(), **self._guards(run)}, begins)
        try:
            while True:
                with torch.no_grad():
                    step = next(steps, _END)
                if step is _END:
                    return
                yield step
                if run is not None:
                    run.step()
        finally:
            self.maybe_free_model_hooks()

    def _after_step(self, step: Step, callback: Any, names: list[str], bar: Any) -> None:
        state = step.state
        self._current_timestep = step.timestep
        if callback is not None:
            given = {name: read_tensor(state, name) for name in names}
            scale = self._guidance_scale
            returned = callback(self, step.index, step.timestep, dict(given))
            write_tensors(state, given, returned or {})
            if self._guidance_scale != scale:
                self._follow_guidance(state)
        state.interrupted = state.interrupted or self._interrupt
        order = self.components["scheduler"].order
        if step.index == step.total - 1 or (step.index + 1) % order == 0:
            bar.update()

    def _follow_guidance(self, state: State) -> None:
        """A callback has set ``pipe._guidance_scale``: the rest of the run uses it."""
        scale = self._guidance_scale
        if hasattr(state.guider, "scale"):
            state.guider.scale = scale
        if scale <= 1 and state.conds is not None:
            state.conds = {"positive": state.conds["positive"]}

    def _callback_of(self, state: State) -> tuple[Any, list[str]]:
        callback = state.get("callback_on_step_end")
        names = state.get("callback_on_step_end_tensor_inputs") or ["latents"]
        if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
            names = list(callback.tensor_inputs)
        unknown = [name for name in names if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` has {unknown}; allowed are {self._callback_tensor_inputs}"
            )
        return callback, list(names)

    def _legacy_callback(self, extra: dict[str, Any]) -> dict[str, Any]:
        """``callback(step, timestep, latents)`` every ``callback_steps``, as scripts of old call it."""
        old, every = extra.pop("callback", None), extra.pop("callback_steps", None)
        every = 1 if every is None else every
        if extra:
            raise TypeError(f"{type(self).__name__}() got unexpected arguments {sorted(extra)}")
        if not isinstance(every, int) or every <= 0:
            raise ValueError(f"`callback_steps` has to be a positive integer, got {every!r}")
        if old is None:
            return {}

        def adapter(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if index % every == 0:
                old(index, timestep, tensors["latents"])
            return {}

        return {"callback_on_step_end": adapter}

    def _result(self, state: State) -> Any:
        values = (state.images,)
        if not state.get("return_dict", True):
            return values
        return self.output_class(*values)


_END: Any = object()  # of a run


def _next(timesteps: Any, index: int) -> Any:
    """The timestep after the one at ``index``, ``None`` at the end."""
    return timesteps[index + 1] if index + 1 < len(timesteps) else None
