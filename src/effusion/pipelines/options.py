"""The arguments of a pipeline's ``from_pretrained`` that are neither components nor configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..placement.machine import check_device
from ..weights.prepare import LoadOptions, parse_dtype

_IGNORED = {"provider", "sess_options", "return_cached_folder", "load_connected_pipeline", "mirror"}
_CUSTOM = ("custom_pipeline", "custom_revision")


@dataclass
class PipelineOptions:
    """The arguments of a pipeline's ``from_pretrained`` that are neither components nor configuration."""

    base: LoadOptions
    dtypes: dict[str, torch.dtype | None] = field(default_factory=dict)
    default_dtype: torch.dtype | None = torch.float32
    device_map: Any = None
    max_memory: Any = None
    memory: Any = None
    ram: Any = None
    quality: str | None = None
    custom_pipeline: str | None = None
    custom_revision: str | None = None
    trust_remote_code: bool = False

    @classmethod
    def take(cls, kwargs: dict[str, Any]) -> PipelineOptions:
        """Pop what belongs here out of ``kwargs``; components and configuration stay."""
        if kwargs.get("quantization_config") is not None:
            raise ValueError("`quantization_config`: quantise a component by itself, then pass it to the pipeline")
        dtypes, default = _split_dtypes(kwargs)
        own = {n: kwargs.pop(n, None) for n in ("device_map", "max_memory", "memory", "ram", "quality", *_CUSTOM)}
        trusted = kwargs.pop("trust_remote_code", False) is True
        for name in _IGNORED:
            kwargs.pop(name, None)
        base = LoadOptions.take(kwargs)
        return cls(base, dtypes, default, trust_remote_code=trusted, **own)

    def for_component(self, name: str, variant: str | None) -> LoadOptions:
        """The options to load the component ``name`` with, from a folder of its own."""
        dtype = self.dtypes.get(name, self.default_dtype)
        device = self.device_map if isinstance(self.device_map, (str, torch.device, int)) else None
        single = check_device(device) if device is not None and device not in _STRATEGIES else None
        return replace(self.base, where={}, dtype=dtype, variant=variant, device=single)


_STRATEGIES = ("balanced", "auto", "sequential", "balanced_low_0")


def _split_dtypes(kwargs: dict[str, Any]) -> tuple[dict[str, torch.dtype | None], torch.dtype | None]:
    """``torch_dtype`` / ``dtype`` as (per component, default)."""
    old, new = kwargs.pop("torch_dtype", None), kwargs.pop("dtype", None)
    given = new if new is not None else old
    if given is None:
        return {}, torch.float32
    if not isinstance(given, Mapping):
        return {}, parse_dtype(given)
    table = {name: parse_dtype(value) for name, value in given.items()}
    return table, table.pop("default", torch.float32)


def place(pipe: Any, options: PipelineOptions) -> Any:
    """Apply a budget or a ``device_map`` strategy; weights are still unread in the mapped files."""
    if (options.memory, options.ram, options.quality) != (None, None, None):
        pipe.fit(options.memory, ram=options.ram, quality=options.quality or "exact")
    elif isinstance(options.device_map, Mapping) or options.device_map in _STRATEGIES:
        pipe._apply_device_map(options.device_map, options.max_memory)
    elif options.device_map is not None:  # components were loaded there
        pipe.__dict__["_device_map"] = str(options.device_map)
    return pipe
