"""Random tensors, and what scripts ask about torch itself: the device at hand, its memory, determinism."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..core.random import randn_tensor as randn_tensor
from ..nn.freeu import FreeU, scale_low_frequencies
from ..placement.policies import execution_device

Function = TypeVar("Function", bound=Callable[..., Any])


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


def get_module_execution_device(module: nn.Module) -> torch.device:
    """Where the inputs of ``module`` have to be, wherever its weights rest."""
    return execution_device(module)


# -- FreeU -----------------------------------------------------------------------------------------


def fourier_filter(x_in: Tensor, threshold: int, scale: float) -> Tensor:
    """``x_in (B, C, H, W)`` with its frequencies below ``threshold`` multiplied by ``scale``."""
    return scale_low_frequencies(x_in, scale, threshold)


def apply_freeu(
    resolution_idx: int, hidden_states: Tensor, res_hidden_states: Tensor, **freeu_kwargs: float
) -> tuple[Tensor, Tensor]:
    """Features and skip of the up block ``resolution_idx`` under FreeU with ``s1``, ``s2``, ``b1`` and ``b2``.

    The tensors given are left as they are.
    """
    if resolution_idx not in (0, 1):
        return hidden_states, res_hidden_states
    return FreeU(**freeu_kwargs)(hidden_states, res_hidden_states, resolution_idx)


# -- devices ---------------------------------------------------------------------------------------


def get_torch_cuda_device_capability() -> float | None:
    """The compute capability of the CUDA device as a number (``9.0``), ``None`` where there is none."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return float(f"{major}.{minor}")


def _call(device: str | torch.device, name: str, *args: Any, default: Any = None) -> Any:
    """``torch.<kind of device>.<name>(*args)``; ``default`` where that kind has no such function."""
    function = getattr(torch.get_device_module(torch.device(device).type), name, None)
    return default if function is None else function(*args)


def empty_device_cache(device_type: str | None = None) -> None:
    """Give memory that is cached and not used back to the device."""
    _call(device_type or get_device(), "empty_cache")


def backend_empty_cache(device: str) -> None:
    """:func:`empty_device_cache` of ``device``."""
    empty_device_cache(device)


def backend_manual_seed(device: str, seed: int) -> None:
    """Seed the generator of ``device``."""
    if torch.device(device).type == "cpu":
        torch.manual_seed(seed)
    else:
        _call(device, "manual_seed", seed)


def backend_synchronize(device: str) -> None:
    """Wait until ``device`` has done what it was given."""
    _call(device, "synchronize")


def backend_device_count(device: str) -> int:
    """How many devices of this kind there are."""
    return int(_call(device, "device_count", default=0))


def backend_reset_peak_memory_stats(device: str) -> None:
    """Begin to count the peak of memory anew."""
    _call(device, "reset_peak_memory_stats")


def backend_reset_max_memory_allocated(device: str) -> None:
    """:func:`backend_reset_peak_memory_stats` under its older name."""
    backend_reset_peak_memory_stats(device)


def backend_max_memory_allocated(device: str) -> int:
    """The peak of memory in bytes; 0 where the device does not count."""
    return int(_call(device, "max_memory_allocated", default=0))


def backend_supports_training(device: str) -> bool:
    """Whether networks can be trained on ``device``."""
    return torch.device(device).type not in ("mps", "neuron")


# -- determinism -------------------------------------------------------------------------------------


def enable_full_determinism() -> None:
    """The same bits in each run on a machine, at the price of speed."""
    os.environ["CUDA_LAUNCH_BLOCKING"] = "1"
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":16:8"
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.matmul.allow_tf32 = False


def disable_full_determinism() -> None:
    """Let torch choose its algorithms again."""
    os.environ["CUDA_LAUNCH_BLOCKING"] = "0"
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ""
    torch.use_deterministic_algorithms(False)


def lru_cache_unless_export(maxsize: int | None = 128, typed: bool = False) -> Callable[[Function], Function]:
    """``functools.lru_cache``, passed by while ``torch.export`` or ``torch.compile`` traces."""

    def decorate(function: Function) -> Function:
        remembered = functools.lru_cache(maxsize=maxsize, typed=typed)(function)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            tracing = torch.compiler.is_exporting() or torch.compiler.is_compiling()
            return function(*args, **kwargs) if tracing else remembered(*args, **kwargs)

        return call  # type: ignore[return-value]

    return decorate
