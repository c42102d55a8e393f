"""The file names of the ecosystem's format, and where and how it looks for things."""

from __future__ import annotations

import os
from typing import Any

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "diffusion_pytorch_model.bin"
WEIGHTS_INDEX_NAME = "diffusion_pytorch_model.bin.index.json"
SAFETENSORS_WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
SAFE_WEIGHTS_INDEX_NAME = "diffusion_pytorch_model.safetensors.index.json"
SAFETENSORS_FILE_EXTENSION = "safetensors"
GGUF_FILE_EXTENSION = "gguf"
ONNX_WEIGHTS_NAME = "model.onnx"
ONNX_EXTERNAL_WEIGHTS_NAME = "weights.pb"
HUGGINGFACE_CO_RESOLVE_ENDPOINT = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
DIFFUSERS_DYNAMIC_MODULE_NAME = "diffusers_modules"
DEPRECATED_REVISION_ARGS = ["fp16", "non-ema"]
MIN_PEFT_VERSION = "0.17.0"
_MIN_TRANSFORMERS_VERSION = "4.34.0"


def __getattr__(name: str) -> Any:
    if name == "HF_MODULES_CACHE":  # asks another package: not before somebody wants to know
        from huggingface_hub.constants import HF_HOME

        return os.environ.get("HF_MODULES_CACHE", os.path.join(HF_HOME, "modules"))
    if name == "USE_PEFT_BACKEND":
        from .import_utils import is_version

        return is_version("peft", ">=", MIN_PEFT_VERSION) and is_version(
            "transformers", ">=", _MIN_TRANSFORMERS_VERSION
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
