"""The ecosystem's switches for kernels of other packages, as choices of an attention backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..core.errors import NotBuilt
from .dispatch import AttentionBackendMixin


class KernelSwitches(AttentionBackendMixin):
    """For models: xformers by name, and clear words about what is not here."""

    def enable_xformers_memory_efficient_attention(self, attention_op: Callable[..., Any] | None = None) -> None:
        """Compute attention with the package ``xformers``.

        Raises:
            MissingExtra: it is not installed.
            ValueError: ``attention_op`` is given; the package chooses its own.
        """
        if attention_op is not None:
            raise ValueError("`attention_op` can't be chosen here; leave it out")
        self.set_attention_backend("xformers")

    def disable_xformers_memory_efficient_attention(self) -> None:
        """Back to the backend in force."""
        self.reset_attention_backend()

    def set_use_memory_efficient_attention_xformers(
        self, valid: bool, attention_op: Callable[..., Any] | None = None
    ) -> None:
        """The two above under one name."""
        if valid:
            self.enable_xformers_memory_efficient_attention(attention_op)
        else:
            self.disable_xformers_memory_efficient_attention()

    def set_use_npu_flash_attention(self, valid: bool) -> None:
        """Raise :class:`NotBuilt` to switch it on; off it is."""
        if valid:
            raise NotBuilt(_KERNEL.format("Ascend NPUs (torch_npu)"))

    def enable_npu_flash_attention(self) -> None:
        """Raises :class:`NotBuilt`."""
        self.set_use_npu_flash_attention(True)

    def disable_npu_flash_attention(self) -> None:
        """It is off."""

    def set_use_xla_flash_attention(
        self, use_xla_flash_attention: bool, partition_spec: Callable[..., Any] | None = None, **kwargs: Any
    ) -> None:
        """Raise :class:`NotBuilt` to switch it on; off it is."""
        if use_xla_flash_attention:
            raise NotBuilt(_KERNEL.format("XLA devices (torch_xla)"))

    def enable_xla_flash_attention(self, partition_spec: Callable[..., Any] | None = None, **kwargs: Any) -> None:
        """Raises :class:`NotBuilt`."""
        self.set_use_xla_flash_attention(True, partition_spec, **kwargs)

    def disable_xla_flash_attention(self) -> None:
        """It is off."""

    def enable_parallelism(self, *, config: Any, cp_plan: Any = None) -> None:
        """Raises :class:`NotBuilt`."""
        raise NotBuilt(
            "splitting one call over several devices is not built yet; `device_map=` (`apply_device_map`) spreads the "
            "layers over them, one after the other"
        )


_KERNEL = (
    "the flash attention of {} is not built yet; leave it out (torch's own is used), or see `set_attention_backend`"
)
