"""Random tensors, and what scripts ask about torch itself: the device at hand, compiled modules."""

from __future__ import annotations

import torch
from torch import nn

from ..core.random import randn_tensor as randn_tensor


def get_device() -> str:
    """The accelerator of this machine (``cuda``, ``xpu``, ``mps``, …), or ``cpu``."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return found.type if found is not None else "cpu"


def is_compiled_module(module: nn.Module) -> bool:
    """Whether ``module`` came out of ``torch.compile``."""
    return hasattr(module, "_orig_mod")


def unwrap_module(module: nn.Module) -> nn.Module:
    """The module that was given to ``torch.compile``, or ``module`` itself."""
    inner = getattr(module, "_orig_mod", module)
    assert isinstance(inner, nn.Module)
    return inner
