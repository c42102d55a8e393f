"""From a configuration and a checkpoint to a network: what to load how, checked before it is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from ..core import hub, log
from ..core.errors import CheckpointError, EffusionError
from . import assign
from .checkpoint import open_checkpoint
from .entries import Checkpoint
from .skeleton import Skeleton

logger = log.get_logger(__name__)
Model = TypeVar("Model", bound=nn.Module)
# accepted for the ecosystem's sake; the way we load, they change nothing
_NO_EFFECT = ("low_cpu_mem_usage", "offload_state_dict", "mirror", "resume_download", "use_onnx", "_from_auto")
_ABSENT = {
    "quantization_config": "quantising while loading",
    "use_flashpack": "flashpack files",
    "parallel_config": "parallel inference",
}


@dataclass
class LoadOptions:
    """The arguments of ``from_pretrained`` that are not part of a configuration, checked."""

    where: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype | None = torch.float32  # None: as stored
    variant: str | None = None
    use_safetensors: bool | None = None
    device: torch.device | None = None
    ignore_mismatched_sizes: bool = False
    output_loading_info: bool = False
    mapped: bool = True
    packed: bool = False  # what is stored packed stays so, and is unpacked layer by layer

    @classmethod
    def take(cls, kwargs: dict[str, Any]) -> LoadOptions:
        """Pop what belongs here out of ``kwargs``; the rest stays.

        Raises:
            ValueError: a value that can't be, or a feature that is not there.
        """
        where, rest = hub.split_location(kwargs)
        kwargs.clear()
        kwargs.update(rest)
        for name, what in _ABSENT.items():
            if kwargs.pop(name, None):
                raise ValueError(f"`{name}`: {what} is not available for this class; load it without, then convert")
        for name in (*_NO_EFFECT, "max_memory", "offload_folder", "flashpack_kwargs"):
            kwargs.pop(name, None)
        use_safetensors = kwargs.pop("use_safetensors", None)
        if use_safetensors not in (True, False, None):
            raise ValueError(f"use_safetensors={use_safetensors!r}: give True, False or None")
        return cls(
            where=where,
            dtype=take_dtype(kwargs),
            variant=kwargs.pop("variant", None),
            use_safetensors=use_safetensors,
            device=_single_device(kwargs.pop("device_map", None)),
            ignore_mismatched_sizes=bool(kwargs.pop("ignore_mismatched_sizes", False)),
            output_loading_info=bool(kwargs.pop("output_loading_info", False)),
            mapped=not kwargs.pop("disable_mmap", False),
        )

    def open(self, path: Any, stems: tuple[str, ...], where: Mapping[str, Any]) -> Checkpoint:
        return open_checkpoint(path, stems=stems, variant=self.variant, use_safetensors=self.use_safetensors, **where)


def take_dtype(kwargs: dict[str, Any], default: torch.dtype | None = torch.float32) -> torch.dtype | None:
    """Pop ``dtype`` or its older spelling ``torch_dtype``: a dtype, its name, or ``"auto"`` (as stored, ``None``)."""
    given = [kwargs.pop(name) for name in ("dtype", "torch_dtype") if kwargs.get(name) is not None]
    for name in ("dtype", "torch_dtype"):
        kwargs.pop(name, None)
    return parse_dtype(given[0]) if given else default


def parse_dtype(value: Any) -> torch.dtype | None:
    """A floating-point dtype from itself or its name; ``"auto"`` is ``None``."""
    if isinstance(value, str):
        if value == "auto":
            return None
        found = getattr(torch, value.removeprefix("torch."), None)
        value = found if isinstance(found, torch.dtype) else value
    if not isinstance(value, torch.dtype) or not value.is_floating_point:
        raise ValueError(f"dtype {value!r}: give a floating-point torch.dtype such as torch.float16, or 'auto'")
    return value


def _single_device(device_map: Any) -> torch.device | None:
    if isinstance(device_map, Mapping) and set(device_map) == {""}:
        device_map = device_map[""]
    if device_map is None or device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        return (
            None
            if device_map is None or not torch.accelerator.is_available()
            else torch.accelerator.current_accelerator()
        )
    if isinstance(device_map, (str, int, torch.device)):
        return torch.device(device_map)
    raise ValueError(
        f"device_map={device_map!r}: give one device here; to spread a model over several, load it and "
        "place it with `enable_group_offload`, or give the pipeline a `device_map`"
    )


@dataclass
class Prepared(Generic[Model]):
    """A network without weights and the checkpoint that fits it: checked, and ready to :meth:`build`."""

    model: Model
    checkpoint: Checkpoint
    match: assign.Match
    options: LoadOptions

    @classmethod
    def of(
        cls,
        model_class: Any,
        config: Mapping[str, Any],
        checkpoint: Checkpoint,
        options: LoadOptions,
        config_changes: Mapping[str, Any] | None = None,
        name: str = "",
    ) -> Prepared[Any]:
        """Build ``model_class`` from ``config`` on ``meta`` and compare it with ``checkpoint``, strictly."""
        with building(model_class, checkpoint.label):
            model, unused = model_class.from_config(config, return_unused_kwargs=True, **config_changes or {})
        strange = sorted(set(config_changes or ()) & set(unused))
        if strange:
            logger.warning(
                "%s.from_pretrained: the arguments %s are unknown and ignored", model_class.__name__, strange
            )
        version = {"_diffusers_version": config["_diffusers_version"]} if "_diffusers_version" in config else {}
        model.register_to_config(_name_or_path=name, **version)
        return cls.over(model, checkpoint, options, model_class)

    @classmethod
    def over(cls, model: Any, checkpoint: Checkpoint, options: LoadOptions, model_class: Any = None) -> Prepared[Any]:
        """The same for a network that is there already, on ``meta``."""
        model_class = model_class or type(model)
        legacy, prefixes = getattr(model_class, "_legacy_keys", None), getattr(model_class, "_key_prefixes", ())
        if prefixes:
            checkpoint = assign.fit_prefix(checkpoint, assign.expected_tensors(model), prefixes) or checkpoint
        if legacy:
            checkpoint = assign.rename(checkpoint, legacy, assign.expected_tensors(model))
        found = assign.match(model, checkpoint, getattr(model_class, "_keys_to_ignore_on_load_unexpected", None) or ())
        found.check(model_class.__name__, checkpoint.label, options.ignore_mismatched_sizes)
        return cls(model, checkpoint, found, options)

    @property
    def sure(self) -> bool:
        """Whether :meth:`build` may wait: nothing can fail, is random, or goes where memory may be short."""
        unsaved = (m._buffers[name] for m in self.model.modules() for name in m._non_persistent_buffers_set)
        lacking = any(buffer is not None and buffer.is_meta for buffer in unsaved)
        return self.options.mapped and self.options.device is None and not (self.match.mismatched or lacking)

    def build(self) -> Model:
        """Give the network its weights; in ``eval`` mode."""
        keep = getattr(self.model, "_keep_in_fp32_modules", None) or ()
        options = self.options
        packed: dict[str, Any] | None = {} if options.packed else None
        slices = assign.assign(self.model, self.checkpoint, options.dtype, keep, options.device, options.mapped, packed)
        fill_rest(self.model, options.dtype, options.device)
        object.__setattr__(self.model, "_weight_slices", slices)
        if packed:
            self.model._unpack_in_calls(packed)  # type: ignore[operator]
        return self.model.eval()


# what constructors raise about entries that they did not expect
_REASONS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass
class Several(Prepared[Model]):
    """A network that is made of others, each with a checkpoint of its own."""

    parts: tuple[Prepared[Any], ...] = ()

    @classmethod
    def together(cls, model: Any, parts: Sequence[Prepared[Any]]) -> Several[Any]:
        """``model``, of which the models of ``parts`` are parts; all were prepared with the same options."""
        first = parts[0]
        return cls(model, first.checkpoint, first.match, first.options, tuple(parts))

    @property
    def sure(self) -> bool:
        return all(part.sure for part in self.parts)

    def build(self) -> Model:
        for part in self.parts:
            part.options = self.options
            part.build()
        return self.model.eval()


@contextmanager
def building(model_class: Any, label: str) -> Iterator[None]:
    """The network is built without weights; what its constructor raises about a configuration says whose it was."""
    try:
        with Skeleton():
            yield
    except CheckpointError as error:
        raise CheckpointError(f"{label}: {error}") from error
    except EffusionError:  # UntrustedCode is a ValueError too
        raise
    except _REASONS as error:
        raise CheckpointError(
            f"{label}: its configuration does not build a {model_class.__name__}: {error!r}"
        ) from error


def fill_rest(model: nn.Module, dtype: torch.dtype | None, device: torch.device | None) -> None:
    """Weights that the checkpoint had in another shape are initialised anew; buffers follow to the device."""
    left = set() if device == torch.device("meta") else set(assign.meta_tensors(model))
    for path, module in model.named_modules():
        own = [n for n in (*module._parameters, *module._buffers) if f"{path}.{n}".lstrip(".") in left]
        if own:
            _initialise(module, own, f"{type(model).__name__}: {path}", dtype, device)
    if device is not None:
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.device != device:
                    module._buffers[name] = buffer.to(device)


def _initialise(
    module: nn.Module, names: list[str], where: str, dtype: torch.dtype | None, device: torch.device | None
) -> None:
    """Give the parameters ``names`` of a layer what its own ``reset_parameters`` gives, and leave the others."""
    reset = getattr(module, "reset_parameters", None)
    if reset is None or any(n not in module._parameters for n in names):
        raise CheckpointError(f"{where}: {names} have no values in the file and no way to get any")
    before = dict(module._parameters)
    for name, old in before.items():
        if old is not None:
            module._parameters[name] = nn.Parameter(torch.empty_like(old, dtype=dtype, device=device or "cpu"))
    reset()
    module._parameters.update({n: p for n, p in before.items() if n not in names})
