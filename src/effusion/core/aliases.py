"""Module paths of the ecosystem, for scripts that import from below the top: ``effusion.utils.torch_utils``, ….

One table instead of a file each. A path is a lazy view: its names are looked up in the modules on the right when they
are used. Files that exist come first; a path that is in neither raises ``ModuleNotFoundError`` as usual.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

ROOT = __name__.split(".")[0]

# path in the ecosystem -> where its names live here; all relative to the library
PATHS: dict[str, tuple[str, ...]] = {
    "configuration_utils": ("core.config",),
    "image_processor": ("blocks.images",),
    "utils.export_utils": ("blocks.video",),
    "utils.loading_utils": ("blocks.pictures",),
    "utils.logging": ("core.log",),
    "utils.outputs": ("core.outputs",),
    "utils.pil_utils": ("blocks.pictures", "blocks.images"),
    "models.modeling_utils": ("models.base",),
}


def install() -> None:
    """Make the paths importable; once per process."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())


class _Finder(MetaPathFinder, Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        root, _, rest = fullname.partition(".")
        if root != ROOT or rest not in PATHS:
            return None
        return ModuleSpec(fullname, self, is_package=any(name.startswith(rest + ".") for name in PATHS))

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        targets = [f"{ROOT}.{name}" for name in PATHS[module.__name__.partition(".")[2]]]
        module.__doc__ = f"The names of {', '.join(targets)} under the ecosystem's path."

        def __getattr__(name: str) -> Any:
            if not name.startswith("__"):
                for target in targets:
                    found = importlib.import_module(target)
                    if hasattr(found, name):
                        return getattr(found, name)
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

        def __dir__() -> list[str]:
            found = (importlib.import_module(target) for target in targets)
            return sorted({name for m in found for name in dir(m) if not name.startswith("_")})

        module.__dict__.update(__getattr__=__getattr__, __dir__=__dir__)
