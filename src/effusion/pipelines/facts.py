"""What scripts read from a pipeline: facts about its components, and the settings of the run that is going on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Generic, TypeVar, overload

from ..blocks.images import VaeImageProcessor
from ..core.types import LatentFormat
from ..families.base import Family, setting

T = TypeVar("T")


class fact(Generic[T]):
    """An attribute that is worked out whenever it is read, until somebody assigns a value: that one stays.

    The peer assigns such attributes in ``__init__``. Here a network may not have been read then, or be replaced later.
    """

    def __init__(self, find: Callable[[Any], T]) -> None:
        self.find = find
        self.__doc__ = find.__doc__

    @overload
    def __get__(self, pipe: None, owner: Any = None) -> fact[T]: ...

    @overload
    def __get__(self, pipe: object, owner: Any = None) -> T: ...

    def __get__(self, pipe: object | None, owner: Any = None) -> Any:
        return self if pipe is None else self.find(pipe)


def live(name: str, doc: str) -> Any:
    """A property with what the argument ``name`` of the current call is; ``None`` before the first call."""
    return property(lambda pipe: getattr(pipe, f"_{name}", None), doc=doc)


current_timestep: Any = property(
    lambda pipe: getattr(pipe, "_current_timestep", None),
    doc="The timestep of the step that is being done; ``None`` outside of the loop.",
)

# arguments of a call that can be read from the pipeline while it runs
LIVE = (
    "guidance_scale",
    "guidance_rescale",
    "clip_skip",
    "cross_attention_kwargs",
    "joint_attention_kwargs",
    "attention_kwargs",
    "denoising_start",
    "denoising_end",
    "skip_guidance_layers",
)


def native_size(component: str, default: int = 128) -> fact[Any]:
    """The fact ``default_sample_size``: the side, in latents, that the network ``component`` was made for."""

    def default_sample_size(pipe: Any) -> Any:
        """Side in latents of the pictures that are made when the call names no size."""
        return _entry(pipe, component, "sample_size", default)

    return fact(default_sample_size)


def _entry(pipe: Any, component: str, name: str, default: Any) -> Any:
    """An entry of a component's configuration, ``default`` if the pipeline was made without the component."""
    found = pipe.components.get(component)
    return default if found is None else setting(found, name, default)


@fact
def tokenizer_max_length(pipe: Any) -> int:
    """Tokens that the first text encoder reads."""
    tokenizer = pipe.components.get("tokenizer")
    return 77 if tokenizer is None else int(tokenizer.model_max_length)


@fact
def latent_channels(pipe: Any) -> int:
    """Channels of the VAE's latents."""
    has_vae = pipe.components.get("vae") is not None
    return pipe.family.latent_format(pipe.components).channels if has_vae else 16


@fact
def patch_size(pipe: Any) -> int:
    """Side, in latents, of the square that makes a token."""
    return int(_entry(pipe, "transformer", "patch_size", 2))


class PipelineFacts:
    """What all pipelines tell about themselves, and how assigned facts come to act in a call."""

    family: ClassVar[Family]
    components: Any
    _guidance_scale: Any = None
    _current_timestep: Any = None
    _num_timesteps: int = 0
    _interrupt: bool = False

    # -- of the components -----------------------------------------------------------------------

    @fact
    def vae_scale_factor(self) -> int:
        """Pixels per latent along one side."""
        return self._format().downscale

    @fact
    def image_processor(self) -> VaeImageProcessor:
        """What reads the caller's pictures and makes pictures of the result."""
        return self._processor()

    @fact
    def mask_processor(self) -> VaeImageProcessor:
        """What reads the caller's mask."""
        return self._processor(do_normalize=False, do_binarize=True, do_convert_grayscale=True)

    def _format(self) -> LatentFormat:
        if self.family.denoiser not in self.components:
            raise AttributeError(f"{type(self).__name__} has no latents")
        return self.family.latent_format(self.components)

    def _processor(self, **options: Any) -> VaeImageProcessor:
        """The processor with ``options`` for the pipeline's VAE, the same one as long as the VAE is."""
        f = self._format()
        options |= {"vae_scale_factor": self.vae_scale_factor * self.family.packing, "vae_latent_channels": f.channels}
        made: dict[Any, VaeImageProcessor] = self.__dict__.setdefault("_processors", {})
        key = tuple(sorted(options.items()))
        if key not in made:
            made[key] = VaeImageProcessor(**options)
        return made[key]

    def _assigned(self, *names: str) -> dict[str, Any]:
        """The facts (of ``names``, if any are given) that somebody has assigned; blocks ask for them by name."""
        own = {k: v for k, v in self.__dict__.items() if not names or k in names}
        return {name: value for name, value in own.items() if isinstance(_of(type(self), name), fact)}

    def _family_as_assigned(self, assigned: Mapping[str, Any]) -> Family:
        """The family; its latents are as large as an assigned ``vae_scale_factor`` says."""
        factor, family = assigned.get("vae_scale_factor"), self.family
        if factor is None or factor == family.latent_format(self.components).downscale:
            return family
        return replace(family, format=lambda vae: replace(family.format(vae), downscale=int(factor)))

    def _with_assigned_size(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """``inputs`` with the sizes that an assigned ``default_sample_size`` means where the call names none."""
        side = self._assigned("default_sample_size").get("default_sample_size")
        if side is None:
            return dict(inputs)
        pixels = int(side) * self.vae_scale_factor
        return {k: pixels if k in ("height", "width") and v is None else v for k, v in inputs.items()}

    # -- of the current run, for callbacks -------------------------------------------------------

    guidance_scale = live("guidance_scale", "Weight of the prompt.")
    guidance_rescale = live("guidance_rescale", "How far guided predictions are brought back to their usual spread.")
    clip_skip = live("clip_skip", "Layers of the text encoder that are left out at its end.")
    cross_attention_kwargs = live("cross_attention_kwargs", "What attention processors are given.")

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the current run has a negative branch."""
        return self._guidance_scale is not None and self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        """Steps of the current run."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Set ``pipe._interrupt = True`` in a callback to stop after the current step."""
        return self._interrupt


def _of(cls: type, name: str) -> Any:
    """What ``cls`` has under ``name``, descriptors as they are."""
    return next((vars(base)[name] for base in cls.__mro__ if name in vars(base)), None)
