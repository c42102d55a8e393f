"""The memory switches of a pipeline: policies over all of its components at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from ..core import log
from ..core.errors import PlanConflict
from . import casting, device_map, homes, machine, moving, policies
from .engine import engine_of
from .pipeline_hoisting import HoistingSwitches
from .pipeline_plan import PlanSwitches
from .rooms import room_on
from .units import all_slots

logger = log.get_logger(__name__)
Self = TypeVar("Self", bound="PipelineSwitches")


class PipelineSwitches(PlanSwitches, HoistingSwitches):
    """For classes with ``components``: a mapping of names to networks and other things."""

    _exclude_from_cpu_offload: ClassVar[list[str]] = []

    def _component(self, name: str, what: str) -> nn.Module:
        found = self._networks().get(name)
        if found is None:
            raise PlanConflict(
                f"{what}: {type(self).__name__} has no component {name!r}; it has {list(self._networks())}"
            )
        return found

    # -- offloading ----------------------------------------------------------------------------------

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: torch.device | str | None = None) -> None:
        """Components rest in host memory; one travels when it is called and stays until another needs the room.

        The order comes from what runs, so components that are called on their own are placed as well.

        Raises:
            ValueError: no such device.
        """
        where = self._offload_to(gpu_id, device)
        for name, module in self._networks().items():
            if name in self._exclude_from_cpu_offload:
                policies.resident(module, where)
            else:
                policies.model_offload(module, where, name)

    def enable_sequential_cpu_offload(
        self, gpu_id: int | None = None, device: torch.device | str | None = None
    ) -> None:
        """Every layer rests in host memory and travels alone, when it is called: least memory, least speed."""
        where = self._offload_to(gpu_id, device)
        for name, module in self._networks().items():
            if name in self._exclude_from_cpu_offload:
                policies.resident(module, where)
            else:
                policies.cpu_offload(module, where)

    def _offload_to(self, gpu_id: int | None, device: torch.device | str | None) -> torch.device:
        """Where what is offloaded computes from now on; scripts read it from the two attributes."""
        where = machine.default_device(gpu_id, device)
        self._forget_placement()
        self.__dict__.update(_offload_device=where, _offload_gpu_id=where.index or 0)
        return where

    @property
    def _all_hooks(self) -> list[policies.UserHook]:
        """A handle for each component that model offloading moves."""
        kinds = self._policies()
        return [policies.UserHook(m) for name, m in self._networks().items() if kinds[name] == "model"]

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
        exclude_modules: str | list[str] | None = None,
    ) -> None:
        """Groups of layers rest on ``offload_device`` or disk; see :func:`~.policies.apply_group_offloading`.

        Args:
            exclude_modules: components that are on ``onload_device`` for good instead.
        """
        exclude = [exclude_modules] if isinstance(exclude_modules, str) else list(exclude_modules or ())
        unknown = sorted(set(exclude) - set(self.components))
        if unknown:
            raise ValueError(f"exclude_modules names {unknown}; the components are {list(self._networks())}")
        self._forget_placement()
        for name, module in self._networks().items():
            if name in exclude:
                policies.resident(module, onload_device)
                continue
            policies.apply_group_offloading(
                module,
                onload_device,
                offload_device,
                offload_type,
                num_blocks_per_group,
                non_blocking,
                use_stream,
                record_stream,
                low_cpu_mem_usage,
                offload_to_disk_path,
            )

    def enable_layerwise_casting(
        self,
        storage_dtype: torch.dtype = torch.float8_e4m3fn,
        compute_dtype: torch.dtype | None = None,
        exclude_modules: str | list[str] | None = None,
    ) -> None:
        """Store the layers of every network in ``storage_dtype``; encoders of transformers included."""
        exclude = [exclude_modules] if isinstance(exclude_modules, str) else list(exclude_modules or ())
        for name, module in self._networks().items():
            if name in exclude:
                continue
            if hasattr(module, "enable_layerwise_casting"):
                module.enable_layerwise_casting(storage_dtype, compute_dtype)  # type: ignore[operator]
            else:
                compute = compute_dtype or next(p.dtype for p in module.parameters() if p.is_floating_point())
                casting.apply_layerwise_casting(module, storage_dtype, compute)

    def maybe_free_model_hooks(self) -> None:
        """Take off the compute device whatever was kept there; every pipeline does so at the end of a call."""
        for module in self._networks().values():
            policies.free(module)
            room_on(policies.execution_device(module)).forget()

    def remove_all_hooks(self) -> None:
        """Undo every offloading policy; weights stay where they rest."""
        self._forget_placement()
        for module in self._networks().values():
            policies.remove(module)

    # -- devices -----------------------------------------------------------------------------------

    @property
    def hf_device_map(self) -> dict[str, Any] | str | None:
        """Which component is where, or the one device for all; ``None`` if the pipeline was not placed by a map."""
        found: dict[str, Any] | str | None = self.__dict__.get("_device_map")
        return dict(found) if isinstance(found, dict) else found

    def _apply_device_map(
        self,
        placement: str | Mapping[str, Any],
        max_memory: Mapping[Any, int | str] | None = None,
        offload_folder: str | os.PathLike[str] | None = None,
    ) -> dict[str, Any]:
        """Place components: ``"balanced"``, a device, or a dictionary of component names to devices."""
        networks = self._networks()
        placed = device_map.place_components(networks, placement, max_memory)
        self._unplan()
        for name, where in placed.items():
            device_map.apply_device_map(networks[name], where, None, offload_folder, name=name)
        self.__dict__["_device_map"] = placed
        return placed

    def reset_device_map(self) -> None:
        """Undo the device map: everything in host memory."""
        self.remove_all_hooks()
        for module in self._networks().values():
            homes.to_host(all_slots(module))

    def _forget_placement(self) -> None:
        """Whatever plan or map there was no longer says where components are."""
        self._unplan()
        self.__dict__["_device_map"] = None

    @property
    def _execution_device(self) -> torch.device:
        """Where the networks compute, wherever their weights rest."""
        found = [policies.execution_device(module) for module in self._networks().values()]
        return next((d for d in found if d.type != "cpu"), torch.device("cpu"))

    def to(self: Self, *args: Any, **kwargs: Any) -> Self:
        """Move and cast every network: ``to(device, dtype)``. A device replaces whatever policy there was.

        ``silence_dtype_warnings`` is accepted.
        """
        kwargs.pop("silence_dtype_warnings", None)
        device, _, _, _ = torch._C._nn._parse_to(*args, **kwargs)
        for module in self._networks().values():
            moving.to(module, *args, **kwargs)
        if device is not None:
            self._forget_placement()
        return self

    # -- activations ---------------------------------------------------------------------------------

    def enable_attention_slicing(self, slice_size: str | int = "auto") -> None:
        """Compute attention in slices: ``"auto"`` halves, ``"max"`` one slice at a time, or a number of slices."""
        self.set_attention_slice(slice_size)

    def disable_attention_slicing(self) -> None:
        """Attention in one step again."""
        self.set_attention_slice(None)

    def set_attention_slice(self, slice_size: str | int | None) -> None:
        for module in self._networks().values():
            if hasattr(module, "set_attention_slice"):
                module.set_attention_slice(slice_size)  # type: ignore[operator]

    def enable_vae_slicing(self) -> None:
        """Decode a batch one picture at a time; sums may round differently than those of a batch."""
        self._vae_switch("enable_slicing")

    def disable_vae_slicing(self) -> None:
        self._vae_switch("disable_slicing")

    def enable_vae_tiling(self) -> None:
        """Encode and decode large pictures in overlapping tiles with blended borders."""
        self._vae_switch("enable_tiling")

    def disable_vae_tiling(self) -> None:
        self._vae_switch("disable_tiling")

    def _vae_switch(self, name: str) -> None:
        vae = self._component("vae", name)
        if not hasattr(vae, name):
            raise PlanConflict(
                f"{type(vae).__name__} doesn't support {name.partition('_')[2]}; offloading "
                f"(`enable_group_offload`) and a smaller batch or size save memory with it"
            )
        getattr(vae, name)()

    def enable_xformers_memory_efficient_attention(self, attention_op: Callable[..., Any] | None = None) -> None:
        """Compute attention with the package ``xformers`` in every network that can.

        Raises:
            MissingExtra: it is not installed.
        """
        self.set_use_memory_efficient_attention_xformers(True, attention_op)

    def disable_xformers_memory_efficient_attention(self) -> None:
        """Back to the attention backend in force."""
        self.set_use_memory_efficient_attention_xformers(False)

    def set_use_memory_efficient_attention_xformers(
        self, valid: bool, attention_op: Callable[..., Any] | None = None
    ) -> None:
        """The two above under one name."""
        for module in self._networks().values():
            if hasattr(module, "set_use_memory_efficient_attention_xformers"):
                module.set_use_memory_efficient_attention_xformers(valid, attention_op)  # type: ignore[operator]

    def _policies(self) -> dict[str, str]:
        """Component -> the kind of policy it has, for reports."""
        found = {name: engine_of(module) for name, module in self._networks().items()}
        return {name: str(e.policy.get("kind")) if e is not None else "resident" for name, e in found.items()}
