"""Which packages are there, and in which version: questions that scripts of the ecosystem ask."""

from __future__ import annotations

import functools
import importlib.metadata
import operator
from collections.abc import Callable

from torch.torch_version import TorchVersion

from ..core.config import FORMAT_VERSION
from ..core.optional import is_available

_COMPARE: dict[str, Callable[[TorchVersion, str], bool]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
    "<=": operator.le,
    "<": operator.lt,
}


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


is_torch_version = functools.partial(is_version, "torch")
is_transformers_version = functools.partial(is_version, "transformers")
is_accelerate_version = functools.partial(is_version, "accelerate")
is_peft_version = functools.partial(is_version, "peft")

is_torch_available = functools.partial(is_available, "torch")
is_transformers_available = functools.partial(is_available, "transformers")
is_accelerate_available = functools.partial(is_available, "accelerate")
is_peft_available = functools.partial(is_available, "peft")
is_bitsandbytes_available = functools.partial(is_available, "bitsandbytes")
is_flash_attn_available = functools.partial(is_available, "flash_attn")
is_gguf_available = functools.partial(is_available, "gguf")
is_imageio_available = functools.partial(is_available, "imageio")
is_invisible_watermark_available = functools.partial(is_available, "imwatermark")
is_matplotlib_available = functools.partial(is_available, "matplotlib")
is_opencv_available = functools.partial(is_available, "cv2")
is_sageattention_available = functools.partial(is_available, "sageattention")
is_scipy_available = functools.partial(is_available, "scipy")
is_sentencepiece_available = functools.partial(is_available, "sentencepiece")
is_tensorboard_available = functools.partial(is_available, "tensorboard")
is_torch_npu_available = functools.partial(is_available, "torch_npu")
is_torch_xla_available = functools.partial(is_available, "torch_xla")
is_torchao_available = functools.partial(is_available, "torchao")
is_torchsde_available = functools.partial(is_available, "torchsde")
is_torchvision_available = functools.partial(is_available, "torchvision")
is_wandb_available = functools.partial(is_available, "wandb")
is_xformers_available = functools.partial(is_available, "xformers")
