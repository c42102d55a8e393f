"""Which packages are there, and in which version: questions that scripts of the ecosystem ask."""

from __future__ import annotations

import functools
import importlib.metadata
import operator
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from torch.torch_version import TorchVersion

from ..core.config import FORMAT_VERSION
from ..core.errors import MissingExtra
from ..core.optional import EXTRAS, is_available

_COMPARE: dict[str, Callable[[TorchVersion, str], bool]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
    "<=": operator.le,
    "<": operator.lt,
}
# X of `is_X_available` -> the module to look for, where it is called otherwise
_MODULES = {
    "opencv": "cv2",
    "invisible_watermark": "imwatermark",
    "onnx": "onnxruntime",
    "optimum_quanto": "optimum.quanto",
    "nvidia_modelopt": "modelopt",
    "hpu": "habana_frameworks.torch",
}
_SAME = """accelerate auto_round av better_profanity bitsandbytes bs4 compel cosmos_guardrail flash_attn flash_attn_3
flashinfer flashpack ftfy gguf imageio inflect kernels kornia librosa matplotlib nltk note_seq outlines peft
pytorch_retinaface safetensors sageattention scipy sdnq sentencepiece tensorboard timm torch torch_mlu torch_neuronx
torch_npu torch_tpu torch_xla torchao torchsde torchvision transformers unidecode wandb xformers"""
_MODULES |= {name: name for name in _SAME.split()}
# X of `is_X_version` -> the distribution, where it is called otherwise
_DISTRIBUTIONS = {"hf_hub": "huggingface_hub", "optimum_quanto": "optimum-quanto", "nvidia_modelopt": "nvidia-modelopt"}
_SAME = """accelerate bitsandbytes flash_attn gguf kernels peft sageattention sdnq torch torch_xla torchao
    transformers xformers"""
_DISTRIBUTIONS |= {name: name for name in _SAME.split()}
_BACKENDS = {**_MODULES, "quanto": _MODULES["optimum_quanto"]}  # what `requires_backends` is asked for


class OptionalDependencyNotAvailable(BaseException):
    """What the ecosystem's packages raise to themselves where something optional is missing."""


def is_version(package: str, operation: str, version: str) -> bool:
    """Whether the installed ``package`` compares so to ``version``; ``False`` if it is not installed."""
    if operation not in _COMPARE:
        raise ValueError(f"operation={operation!r}; allowed are {', '.join(_COMPARE)}")
    try:
        installed = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    # the local part of a version (`+cpu`, `+cu130`) says how it was built, not how new it is
    return bool(_COMPARE[operation](TorchVersion(installed.split("+")[0]), version))


def check_min_version(min_version: str) -> None:
    """Raise ``ImportError`` if a script needs newer names of the ecosystem than this version speaks.

    Versions are those of the ecosystem's reference library, whose names and files Effusion has.
    """
    if not TorchVersion(FORMAT_VERSION) >= min_version:
        raise ImportError(
            f"this script asks for version {min_version} of the ecosystem's names, this Effusion speaks "
            f"{FORMAT_VERSION}; use a newer Effusion or the script of that version"
        )


def requires_backends(obj: Any, backends: str | Sequence[str]) -> None:
    """Raise if a package of ``backends`` that ``obj`` (an object or class) needs is not there.

    Raises:
        MissingExtra: names what is missing and how to install it.
        ValueError: a package that nobody here knows.
    """
    wanted = [backends] if isinstance(backends, str) else list(backends)
    if strange := [name for name in wanted if name not in _BACKENDS]:
        raise ValueError(f"unknown packages {strange}; known are {', '.join(sorted(_BACKENDS))}")
    missing = [name for name in wanted if not is_available(_BACKENDS[name])]
    if missing:
        name = getattr(obj, "__name__", type(obj).__name__)
        hints = [f"'effusion[{EXTRAS[m]}]'" if m in EXTRAS else _BACKENDS[m].split(".")[0] for m in missing]
        raise MissingExtra(f"{name} needs {', '.join(missing)}, not installed: pip install {' '.join(hints)}")


def is_google_colab() -> bool:
    """Whether this is a notebook of Google Colab."""
    return "google.colab" in sys.modules or any(name.startswith("COLAB_") for name in os.environ)


def __getattr__(name: str) -> Any:
    if name.startswith("is_") and name.endswith("_available") and name[3:-10] in _MODULES:
        return functools.partial(is_available, _MODULES[name[3:-10]])
    if name.startswith("is_") and name.endswith("_version") and name[3:-8] in _DISTRIBUTIONS:
        return functools.partial(is_version, _DISTRIBUTIONS[name[3:-8]])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def questions() -> list[str]:
    """The names of all questions of this kind."""
    return [f"is_{name}_available" for name in _MODULES] + [f"is_{name}_version" for name in _DISTRIBUTIONS]


def __dir__() -> list[str]:
    return sorted({*globals(), *questions()})
