"""Measuring the memory of a compute device: what is held now, and the most since a moment.

On CUDA and XPU the allocator is asked, on MPS the driver's allocator, which knows no peak; on the CPU the process: memory
of its own and pages of mapped files.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import allocator, machine, pages
from .sources import present_bytes


class Meter:
    """Bytes on one device. Where the system knows no peak, it is the highest level that was read."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._highest = 0
        self._resets = False  # whether the system measures a peak from `forget` on

    def level(self) -> int:
        """Bytes that are held now."""
        found = self._read()
        self._highest = max(self._highest, found)
        return found

    def peak(self) -> int:
        """The most since :meth:`forget`."""
        level = self.level()
        return self._peak() if self._resets else max(level, self._highest)

    def forget(self) -> None:
        """Begin to measure the peak anew."""
        self._resets = self._reset()
        self._highest = 0

    def there(self, tensor: torch.Tensor) -> int:
        """Bytes of ``tensor`` that are among those held."""
        return allocator.fresh(tensor.nbytes) if tensor.device == self.device else 0

    @property
    def flaw(self) -> str | None:
        """What is missing in what is read; ``None`` if nothing is."""
        if not self._measures():
            return f"the memory of {self.device} can't be measured on this system"
        if not self._resets:
            return f"this system measures no peaks on {self.device}: they are the highest of readings in between"
        return None

    def synchronize(self) -> None:
        """Wait until the device has done what was asked of it."""

    # -- the system ----------------------------------------------------------------------------------

    def _measures(self) -> bool:
        return False

    def _read(self) -> int:
        return 0

    def _peak(self) -> int:
        return 0

    def _reset(self) -> bool:
        return False


class Process(Meter):
    """The CPU: this process."""

    def _measures(self) -> bool:
        return pages.held() > 0

    def _read(self) -> int:
        return pages.held()

    def _peak(self) -> int:
        return pages.peak()

    def _reset(self) -> bool:
        return pages.forget_peak() and pages.peak() > 0

    def there(self, tensor: torch.Tensor) -> int:
        return present_bytes(tensor)


class Accelerator(Meter):
    """A device whose module in torch has the functions that CUDA's has, or some of them."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.api: Any = getattr(torch, device.type)

    def _ask(self, *names: str) -> int | None:
        function: Callable[..., Any] | None = next((f for n in names if (f := getattr(self.api, n, None))), None)
        if function is None:
            return None
        return int((function() if self.device.type == "mps" else function(self.device)) or 0)

    def _measures(self) -> bool:
        return hasattr(self.api, "memory_allocated") or hasattr(self.api, "current_allocated_memory")

    def _read(self) -> int:
        return self._ask("memory_allocated", "current_allocated_memory") or 0

    def _peak(self) -> int:
        return self._ask("max_memory_allocated") or 0

    def _reset(self) -> bool:
        self._ask("reset_peak_memory_stats")
        return hasattr(self.api, "max_memory_allocated")

    def synchronize(self) -> None:
        machine.synchronize(self.device)


def meter_of(device: torch.device) -> Meter:
    """What measures ``device``."""
    return Process(device) if device.type == "cpu" else Accelerator(device)
