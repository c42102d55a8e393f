"""Optional packages: imported where they are used, and a clear error where they are missing."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from .errors import MissingExtra

# package -> extra in pyproject.toml that installs it
EXTRAS = {
    "accelerate": "training",
    "peft": "training",
    "gguf": "gguf",
    "scipy": "scipy",
    "torchsde": "sde",
    "matplotlib": "plot",
    "xformers": "xformers",
    "flash_attn": "flash",
    "sageattention": "sage",
    "bitsandbytes": "bitsandbytes",
    "torchao": "torchao",
    "imageio": "video",
    "imwatermark": "watermark",
}


def is_available(package: str) -> bool:
    """Whether ``package`` can be imported; does not import it (of ``a.b``, only ``a``)."""
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # what it would be a part of is not there
        return False


def require(package: str, what: str) -> ModuleType:
    """Import ``package``, which ``what`` needs; :class:`MissingExtra` names the extra otherwise."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != package.split(".")[0]:
            raise
        extra = EXTRAS.get(package.split(".")[0])
        hint = f"pip install 'effusion[{extra}]'" if extra else f"pip install {package}"
        raise MissingExtra(f"{what} needs the package `{package}`, which is not installed: {hint}") from error
