"""Names that are imported when they are used (PEP 562)."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def attach(module: str, names: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """``__getattr__, __dir__, __all__`` for ``module``, whose ``names`` live in the modules given.

    A name may stand for an attribute (``"DDIMScheduler": "effusion.schedulers.ddim"``) or for a
    submodule of ``module`` itself (``"schedulers": "effusion.schedulers"``).
    """

    def __getattr__(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        target = importlib.import_module(names[name])
        value = target if names[name] == f"{module}.{name}" else getattr(target, name)
        setattr(sys.modules[module], name, value)
        return value

    def __dir__() -> list[str]:
        return sorted({*vars(sys.modules[module]), *names})

    return __getattr__, __dir__, sorted(names)
