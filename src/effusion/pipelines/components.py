"""Which components a pipeline class has, and how ``model_index.json`` names them."""

from __future__ import annotations

import inspect
from typing import Any

# Classes that the ecosystem's index files list under the name of a pipeline's module.
_MODULE_NAMES = {"StableDiffusionSafetyChecker": "stable_diffusion"}


def component_names(cls: Any) -> list[str]:
    """The arguments of ``cls.__init__`` that are components: required ones, and those listed as optional."""
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    return [p.name for p in parameters if p.name in cls._optional_components or p.default is inspect.Parameter.empty]


def component_entry(component: Any) -> Any:
    """``[library, class]`` of a component, ``[None, None]`` for one that is not there.

    Our classes are listed as ``diffusers``, the library name of the format.
    """
    if component is None:
        return (None, None)
    cls = type(getattr(component, "_orig_mod", component))  # a compiled module stands for what it wraps
    library = getattr(cls, "_library", None) or cls.__module__.split(".")[0]
    if library == "effusion":
        library = _MODULE_NAMES.get(cls.__name__, "diffusers")
    return (library, cls.__name__)
