"""How a GGUF file is to be loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class GGUFQuantizationConfig:
    """For ``from_single_file``: packed weights stay packed in memory, and are unpacked into ``compute_dtype`` by layer.

    Without it, a GGUF file is unpacked while it is loaded, and takes the memory of the dtype it is loaded in.
    """

    compute_dtype: torch.dtype | None = None
    quant_method: str = "gguf"
    pre_quantized: bool = True

    def __post_init__(self) -> None:
        self.compute_dtype = self.compute_dtype or torch.float32

    def to_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "compute_dtype": str(self.compute_dtype).removeprefix("torch.")}
