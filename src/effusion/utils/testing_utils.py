"""What tests of the ecosystem import from its library: the device at hand, random tensors, comparisons, conditions."""

from __future__ import annotations

import io
import logging
import os
import random
import unittest
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..blocks.pictures import load_image as load_image
from ..blocks.pictures import read_url
from ..blocks.video import export_to_gif as export_to_gif
from ..blocks.video import export_to_video as export_to_video
from ..core.optional import is_available
from .torch_utils import backend_empty_cache as backend_empty_cache
from .torch_utils import backend_manual_seed as backend_manual_seed
from .torch_utils import backend_max_memory_allocated as backend_max_memory_allocated
from .torch_utils import backend_reset_peak_memory_stats as backend_reset_peak_memory_stats
from .torch_utils import disable_full_determinism as disable_full_determinism
from .torch_utils import enable_full_determinism as enable_full_determinism
from .torch_utils import get_device

torch_device = os.environ.get("DIFFUSERS_TEST_DEVICE") or get_device()
global_rng = random.Random()


def floats_tensor(
    shape: tuple[int, ...], scale: float = 1.0, rng: random.Random | None = None, name: str | None = None
) -> torch.Tensor:
    """Even random numbers from 0 to ``scale``, drawn by ``random``."""
    rng = rng or global_rng
    values = [rng.random() * scale for _ in range(int(np.prod(shape)))]
    return torch.tensor(values, dtype=torch.float).view(shape)


def torch_all_close(a: torch.Tensor, b: torch.Tensor, *args: Any, **kwargs: Any) -> bool:
    """``True``, or an ``AssertionError`` that says how far apart they are."""
    if not torch.allclose(a, b, *args, **kwargs):
        raise AssertionError(f"the largest difference is {(a - b).abs().max()}")
    return True


def numpy_cosine_similarity_distance(a: Any, b: Any) -> float:
    """One minus the cosine of the angle between two flat arrays."""
    return float(1.0 - (np.dot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b))).mean())


def load_numpy(arry: str | np.ndarray[Any, Any], local_path: str | None = None) -> Any:
    """An array from a path, a URL, or as it is; pickles in it are refused.

    Raises:
        ValueError: nothing there.
    """
    if isinstance(arry, np.ndarray):
        return arry
    if local_path is not None:
        parts = arry.split("/")
        return Path(local_path, parts[-5], parts[-2], parts[-1]).as_posix()
    if arry.startswith(("http://", "https://")):
        return np.load(io.BytesIO(read_url(arry)), allow_pickle=False)
    if not Path(arry).is_file():
        raise ValueError(f"{arry!r} is neither a file here nor a URL that starts with http:// or https://")
    return np.load(arry, allow_pickle=False)


class CaptureLogger:
    """While the context lasts, what ``logger`` says is kept; then it is in ``out``."""

    def __init__(self, logger: logging.Logger) -> None:
        self.logger, self.io, self.out = logger, io.StringIO(), ""
        self.sh = logging.StreamHandler(self.io)

    def __enter__(self) -> CaptureLogger:
        self.logger.addHandler(self.sh)
        return self

    def __exit__(self, *exc: object) -> None:
        self.logger.removeHandler(self.sh)
        self.out = self.io.getvalue()


def _asked(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "yes", "true", "on")


def _needs(condition: bool, what: str) -> Any:
    return unittest.skipUnless(condition, f"needs {what}")


# decorator -> whether its tests run here, and what they need
_CONDITIONS: dict[str, Any] = {
    "slow": (lambda: _asked("RUN_SLOW"), "RUN_SLOW=1"),
    "nightly": (lambda: _asked("RUN_NIGHTLY"), "RUN_NIGHTLY=1"),
    "is_torch_compile": (lambda: _asked("RUN_COMPILE"), "RUN_COMPILE=1"),
    "require_torch": (lambda: True, "torch"),
    "require_torch_2": (lambda: True, "torch 2"),
    "require_torch_gpu": (torch.cuda.is_available, "a CUDA device"),
    "require_torch_accelerator": (lambda: torch_device != "cpu", "an accelerator"),
    "require_torch_multi_gpu": (lambda: torch.cuda.device_count() > 1, "several CUDA devices"),
    "require_torch_accelerator_with_fp16": (lambda: torch_device in ("cuda", "xpu"), "an accelerator with float16"),
    "require_torch_accelerator_with_fp64": (lambda: torch_device in ("cuda", "cpu"), "a device with float64"),
    "skip_mps": (lambda: torch_device != "mps", "another device than mps"),
    "require_accelerator": (lambda: torch_device != "cpu", "an accelerator"),
    "require_peft_backend": (lambda: is_available("peft"), "peft"),
    "require_accelerate": (lambda: is_available("accelerate"), "accelerate"),
    "require_torchsde": (lambda: is_available("torchsde"), "torchsde"),
    "require_bitsandbytes": (lambda: is_available("bitsandbytes"), "bitsandbytes"),
}


def __getattr__(name: str) -> Any:
    if name not in _CONDITIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    holds, what = _CONDITIONS[name]
    return lambda test: _needs(bool(holds()), what)(test)
