"""What all schedulers share: loading and saving, the position in a run, checks, linear combinations."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..core import log, registry
from ..core.config import ConfigMixin
from ..core.outputs import BaseOutput
from ..core.publish import PushToHubMixin
from . import spacing
from .noise import Array

logger = log.get_logger(__name__)
Self = TypeVar("Self", bound="SchedulerMixin")
Device = str | torch.device | None
MOST_STEPS = 1_000_000
SCHEDULER_CONFIG_NAME = "scheduler_config.json"


@dataclass
class SchedulerOutput(BaseOutput):
    """Result of a step: ``prev_sample``, the sample at the next lower noise level, shaped as the input."""

    prev_sample: Tensor


@dataclass
class DenoisedOutput(BaseOutput):
    """Result of a step that also has ``pred_original_sample``, the denoised estimate; both shaped as the input."""

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


class KarrasDiffusionSchedulers(Enum):
    """The schedulers that can replace each other in the pipelines of Stable Diffusion and its kin."""

    DDIMScheduler = 1
    DDPMScheduler = 2
    PNDMScheduler = 3
    LMSDiscreteScheduler = 4
    EulerDiscreteScheduler = 5
    HeunDiscreteScheduler = 6
    EulerAncestralDiscreteScheduler = 7
    DPMSolverMultistepScheduler = 8
    DPMSolverSinglestepScheduler = 9
    KDPM2DiscreteScheduler = 10
    KDPM2AncestralDiscreteScheduler = 11
    DEISMultistepScheduler = 12
    UniPCMultistepScheduler = 13
    DPMSolverSDEScheduler = 14
    EDMEulerScheduler = 15


KARRAS_COMPATIBLES = [member.name for member in KarrasDiffusionSchedulers]

# Sabour et al. (2024), "Align Your Steps": schedules optimised for single models
AysSchedules: dict[str, list[float]] = {
    "StableDiffusionTimesteps": [999, 850, 736, 645, 545, 455, 343, 233, 124, 24],
    "StableDiffusionSigmas": [14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.0],
    "StableDiffusionXLTimesteps": [999, 845, 730, 587, 443, 310, 193, 116, 53, 13],
    "StableDiffusionXLSigmas": [14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.0],
    "StableDiffusionVideoSigmas": [700.00, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.0],
}


def combine(*terms: tuple[float, Tensor]) -> Tensor:
    """``Σ c x`` over ``(c, x)`` in one new tensor of the first one's shape and dtype."""
    (scale, first), *rest = terms
    rest = [(c, x) for c, x in rest if c != 0]
    if scale == 1 and rest:
        c, x = rest.pop(0)
        out = torch.add(first, x, alpha=c)
    else:
        out = first * scale
    for c, x in rest:
        out.add_(x, alpha=c)
    return out


def like(values: Tensor, sample: Tensor) -> Tensor:
    """One value per item of the batch, ready to broadcast: ``(B,) -> (B, 1, …)``."""
    return values.reshape(-1, *([1] * (sample.ndim - 1)))


def one_of(name: str, value: Any, allowed: Sequence[Any]) -> None:
    """Raise :class:`ValueError` unless the option ``name`` has an allowed value."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: choose one of {', '.join(map(repr, allowed))}")


def at_most_one(**options: Any) -> None:
    """Raise :class:`ValueError` when more than one option is on."""
    given = [name for name, value in options.items() if value]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(f'`{g}`' for g in given)} contradict each other: set only one of them")


def exactly_one(**arguments: Any) -> None:
    """Raise :class:`ValueError` unless exactly one argument is given."""
    given = [f"`{name}`" for name, value in arguments.items() if value is not None]
    if len(given) != 1:
        names = ", ".join(f"`{name}`" for name in arguments)
        raise ValueError(f"give exactly one of {names}; got {' and '.join(given) if given else 'none'}")


class SchedulerMixin(ConfigMixin, PushToHubMixin):
    """Base of all schedulers: a noise schedule, a solver, and the memory of one run.

    Attributes:
        timesteps: what the network is called with, ``(S,)``, on the device given to :meth:`set_timesteps`.
        sigmas: the noise levels, ``(S + 1,)``; only schedulers that work with them have it.
        num_inference_steps: the number of steps asked for; ``None`` before :meth:`set_timesteps`.
        order: calls of the network per step of the solver.
        init_noise_sigma: standard deviation of the noise that a run starts from.
    """

    config_name = SCHEDULER_CONFIG_NAME
    has_compatibles = True
    _compatibles: ClassVar[list[str]] = []
    order: int = 1
    init_noise_sigma: Any = 1.0

    timesteps: Tensor
    sigmas: Tensor
    num_inference_steps: int | None = None
    _step_index: int | None = None
    _begin_index: int | None = None

    def register_to_config(self, **kwargs: Any) -> None:
        """Take the configuration, which comes before anything is computed: tables are as long as it says.

        Raises:
            ValueError: more training steps than any network has.
        """
        steps = kwargs.get("num_train_timesteps")
        if isinstance(steps, (int, float)) and not steps <= MOST_STEPS:
            raise ValueError(f"num_train_timesteps is more than {MOST_STEPS}; most networks have 1000")
        super().register_to_config(**kwargs)

    # -- files -----------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls: type[Self], pretrained_model_name_or_path: str | os.PathLike[str] | None = None,
        subfolder: str | None = None, return_unused_kwargs: bool = False, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """Build the scheduler that ``scheduler_config.json`` of a folder or hub repository describes.

        Raises:
            CheckpointError: there is no such file, or it is not a configuration.
        """
        if pretrained_model_name_or_path is None:
            raise ValueError("`pretrained_model_name_or_path` is missing: give a folder or the name of a repository")
        config, rest, _ = cls.load_config(
            pretrained_model_name_or_path,
            subfolder=subfolder,
            return_unused_kwargs=True,
            return_commit_hash=True,
            **kwargs,
        )
        return cls.from_config(config, return_unused_kwargs=return_unused_kwargs, **rest)

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write ``scheduler_config.json`` into a folder."""
        self.save_config(save_directory, push_to_hub=push_to_hub, **kwargs)

    @property
    def compatibles(self) -> list[type[ConfigMixin]]:
        """The scheduler classes that understand this one's configuration."""
        return self._get_compatibles()

    @classmethod
    def _get_compatibles(cls) -> list[type[ConfigMixin]]:
        known = registry.names_under("effusion.schedulers")
        names = dict.fromkeys([cls.__name__, *cls._compatibles])
        return [registry.find_class("diffusers", name) for name in names if name in known]

    def __copy__(self: Self) -> Self:
        return copy.deepcopy(self)

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)

    # -- position in a run -----------------------------------------------------------------------

    @property
    def step_index(self) -> int | None:
        """Index of the next step; ``None`` before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Index of the first step, where a pipeline has said it."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Say which step the run starts with, so that no step has to look for its timestep."""
        self._begin_index = begin_index

    def _begin(self, timesteps: Array | Tensor, sigmas: Array | Tensor | None, device: Device, dtype: Any) -> None:
        """Lay out a run: ``timesteps`` on ``device``, ``sigmas`` (float32) on the host, nothing remembered."""
        times = torch.as_tensor(np.ascontiguousarray(timesteps)).to(dtype)
        self._held: dict[tuple[str, Any], tuple[Tensor, Any]] = {}
        self.timesteps = times.to(device)
        self._held["timesteps", "list"] = (self.timesteps, times.tolist())
        if sigmas is not None:
            self.sigmas = torch.as_tensor(np.ascontiguousarray(sigmas)).to(torch.float32)
        self._step_index = None
        self._begin_index = None

    def _derived(self, name: str, form: Any, make: Callable[[Tensor], Any]) -> Any:
        """``make`` of a tensor attribute, made again only when the attribute was replaced."""
        tensor = getattr(self, name)
        held = self._held.get((name, form))
        if held is None or held[0] is not tensor:
            held = self._held[name, form] = (tensor, make(tensor))
        return held[1]

    def _list(self, name: str) -> list[float]:
        """The values of a tensor attribute on the host."""
        listed: list[float] = self._derived(name, "list", Tensor.tolist)
        return listed

    def _near(self, name: str, sample: Tensor) -> Tensor:
        """A tensor attribute with the device and dtype of ``sample``."""
        near: Tensor = self._derived(name, (sample.device, sample.dtype), lambda tensor: tensor.to(sample))
        return near

    def _time(self, timestep: Any) -> float:
        """A timestep as a number, without asking the accelerator where it is one of ``self.timesteps``."""
        if not isinstance(timestep, Tensor):
            return float(timestep)
        times = self.timesteps
        if (
            timestep.device.type != "cpu"
            and timestep.dtype == times.dtype
            and timestep.numel() == 1
            and timestep.untyped_storage().data_ptr() == times.untyped_storage().data_ptr()
        ):
            return self._list("timesteps")[(timestep.storage_offset() - times.storage_offset()) // times.stride(0)]
        return float(timestep.item())

    def index_for_timestep(self, timestep: Any, schedule_timesteps: Tensor | None = None) -> int:
        """Index of ``timestep`` in the run; of its second occurrence where it has two.

        A solver of second order visits a timestep twice, and a run that starts in the middle (image to
        image) must start with the second visit.

        Raises:
            ValueError: the run has no such timestep.
        """
        times = self._list("timesteps") if schedule_timesteps is None else schedule_timesteps.tolist()
        value = self._time(timestep)
        found = [i for i, t in enumerate(times) if t == value]
        if not found:
            return self._index_of_unknown(value)
        return found[1] if len(found) > 1 else found[0]

    def _index_of_unknown(self, value: float) -> int:
        raise ValueError(
            f"timestep {value:g} is not in this run; pass one of `scheduler.timesteps` ({len(self.timesteps)} values)"
        )

    def _enter(self, timestep: Any, model_output: Tensor, sample: Tensor) -> int:
        """Index of this step, after checking that it can be done.

        Raises:
            ValueError: no :meth:`set_timesteps` before, shapes that differ, a run that is over.
        """
        self._check_run()
        self._check_shapes(model_output, sample)
        if self._step_index is None:
            self._init_step_index(timestep)
        index = self._step_index
        assert index is not None
        if index >= len(self.timesteps):
            raise ValueError(f"all {len(self.timesteps)} steps are done; call `set_timesteps` to begin another run")
        return index

    def _init_step_index(self, timestep: Any) -> None:
        """Begin at ``timestep``, or where a pipeline has said."""
        self._step_index = self.index_for_timestep(timestep) if self._begin_index is None else self._begin_index

    def _check_run(self) -> None:
        if self.num_inference_steps is None:
            raise ValueError(
                f"`num_inference_steps` is None: call {type(self).__name__}.set_timesteps(…) before `step`"
            )

    def _check_shapes(self, model_output: Tensor, sample: Tensor) -> None:
        if model_output.shape != sample.shape:
            raise ValueError(
                f"`model_output` has shape {tuple(model_output.shape)}, `sample` {tuple(sample.shape)}; "
                f"{type(self).__name__}.step needs the same shape for both"
            )

    def _advance(self) -> None:
        assert self._step_index is not None
        self._step_index += 1

    def _positions(self, timesteps: Tensor) -> list[int]:
        """The index of each timestep of a batch: looked up, or where the run is once a pipeline has set it."""
        if self._begin_index is None:
            return [self.index_for_timestep(t) for t in timesteps.tolist()]
        here = self._begin_index if self._step_index is None else self._step_index
        return [here] * timesteps.shape[0]

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """What the network is given for ``sample``: itself, for most schedulers."""
        return sample

    def _check_custom(self, timesteps: Any, below: float | None = None) -> None:
        spacing.check_descending("timesteps", timesteps, below)
