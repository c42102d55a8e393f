"""The memory switches of a single network: what ``ModelMixin`` inherits from here."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from . import casting, moving, policies
from . import device_map as maps

Self = TypeVar("Self", bound=nn.Module)


class MemorySwitches:
    """Offloading, layerwise casting, device maps, and ``to`` at any time; for classes that are ``nn.Module`` too."""

    _supports_group_offloading: ClassVar[bool] = True
    _keep_in_fp32_modules: ClassVar[list[str] | None]
    _skip_layerwise_casting_patterns: ClassVar[list[str] | None]

    def enable_group_offload(
        self,
        onload_device: torch.device | str,
        offload_device: torch.device | str = torch.device("cpu"),
        offload_type: str = "block_level",
        num_blocks_per_group: int | None = None,
        non_blocking: bool = False,
        use_stream: bool = False,
        record_stream: bool = False,
        low_cpu_mem_usage: bool = False,
        offload_to_disk_path: str | os.PathLike[str] | None = None,
        block_modules: list[str] | None = None,
        exclude_kwargs: list[str] | None = None,
    ) -> None:
        """Groups of layers rest on ``offload_device`` or disk; see :func:`~.policies.apply_group_offloading`."""
        assert isinstance(self, nn.Module)
        policies.apply_group_offloading(
            self,
            onload_device,
            offload_device,
            offload_type,
            num_blocks_per_group,
            non_blocking,
            use_stream,
            record_stream,
            low_cpu_mem_usage,
            offload_to_disk_path,
            block_modules,
            exclude_kwargs,
        )

    def enable_layerwise_casting(
        self,
        storage_dtype: torch.dtype = torch.float8_e4m3fn,
        compute_dtype: torch.dtype | None = None,
        skip_modules_pattern: str | tuple[str, ...] | None = None,
        skip_modules_classes: tuple[type[nn.Module] | str, ...] | None = None,
        non_blocking: bool = False,
    ) -> None:
        """Store the weights of layers in ``storage_dtype``; see :func:`~.casting.apply_layerwise_casting`.

        Norms, embeddings of positions and what a network names itself are left as they are.

        Args:
            compute_dtype: what they are decoded to; the dtype of the network if not given.
        """
        assert isinstance(self, nn.Module)
        if skip_modules_pattern is None:
            patterns = casting.usual_patterns(self)
        else:
            given = (skip_modules_pattern,) if isinstance(skip_modules_pattern, str) else tuple(skip_modules_pattern)
            patterns = tuple(dict.fromkeys([*given, *casting.own_patterns(self)]))
        compute = compute_dtype if compute_dtype is not None else self.dtype
        assert isinstance(compute, torch.dtype)
        casting.apply_layerwise_casting(self, storage_dtype, compute, patterns, skip_modules_classes, non_blocking)

    def disable_layerwise_casting(self) -> None:
        """The weights as they were in their files where these are known, else what is stored, decoded."""
        assert isinstance(self, nn.Module)
        casting.uncast(self)

    def disable_group_offload(self) -> None:
        """Undo the offloading policy; weights stay where they rest until they are moved with ``to``."""
        assert isinstance(self, nn.Module)
        policies.remove(self)

    # -- devices and dtypes ------------------------------------------------------------------------

    @property
    def hf_device_map(self) -> dict[str, Any]:
        """Which part of the network is where; no such attribute if it was not placed by a map (`accelerate` asks)."""
        assert isinstance(self, nn.Module)
        placed = maps.device_map_of(self)
        if placed is None:
            raise AttributeError(f"{type(self).__name__} was not placed by a device map")
        return placed

    def apply_device_map(
        self,
        device_map: str | int | torch.device | Mapping[str, Any],
        max_memory: Mapping[Any, int | str] | None = None,
        offload_folder: str | os.PathLike[str] | None = None,
    ) -> dict[str, Any]:
        """Place the layers; see :func:`~.device_map.apply_device_map`."""
        assert isinstance(self, nn.Module)
        no_split = getattr(self, "_no_split_modules", None) or ()
        return maps.apply_device_map(self, device_map, max_memory, offload_folder, no_split)

    def to(self: Self, *args: Any, **kwargs: Any) -> Self:  # type: ignore[misc]
        """As ``nn.Module.to``; a device replaces the offloading policy, a dtype is what is computed with."""
        return moving.to(self, *args, **kwargs)  # type: ignore[return-value]

    def cuda(self: Self, device: int | torch.device | None = None) -> Self:  # type: ignore[misc]
        return self.to(torch.device("cuda", device) if isinstance(device, int) else device or "cuda")

    def cpu(self: Self) -> Self:  # type: ignore[misc]
        return self.to("cpu")

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        assert isinstance(self, nn.Module)
        return moving.apply(self, super()._apply, fn, recurse)  # type: ignore[misc]
