"""A pipeline of another class out of the components of one that is loaded."""

from __future__ import annotations

import inspect
from typing import Any

from ..weights.prepare import LoadOptions
from .classes import custom_class
from .components import component_names
from .options import PipelineOptions


def parameters_of(pipe: Any) -> dict[str, Any]:
    """The arguments of a pipeline's ``__init__`` that are no components, as it was built."""
    names, taken = component_names(type(pipe)), inspect.signature(type(pipe).__init__).parameters
    return {k: v for k, v in pipe.config.items() if k in taken and k not in names and not k.startswith("_")}


def share(cls: Any, pipeline: Any, kwargs: dict[str, Any]) -> Any:
    """A pipeline of class ``cls`` with the components of ``pipeline``; ``kwargs`` replace some.

    What ``pipeline`` was set to and ``cls`` does not know is kept under a private name: sharing back finds it again.

    Raises:
        ValueError: ``cls`` needs a component that ``pipeline`` doesn't have, or an argument is unknown.
        UntrustedCode: ``custom_pipeline`` without ``trust_remote_code=True``.
    """
    place, revision = kwargs.pop("custom_pipeline", None), kwargs.pop("custom_revision", None)
    trusted = kwargs.pop("trust_remote_code", False) is True
    if place is not None:
        options = PipelineOptions(LoadOptions(), custom_revision=revision, trust_remote_code=trusted)
        return custom_class(str(place), options).from_pipe(pipeline, **kwargs)  # type: ignore[attr-defined]
    dtype = kwargs.pop("torch_dtype", None) or kwargs.pop("dtype", None)
    given, kept = _arguments(cls, pipeline, kwargs)
    made = cls(**given)
    made.register_to_config(**kept)
    made._borrow_plan(pipeline)
    if dtype is not None:
        made.to(dtype=dtype)
    return made


def _arguments(cls: Any, pipeline: Any, kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments to build ``cls`` with, and the configuration entries of ``pipeline`` that it has no use for."""
    names = component_names(cls)
    parameters = [n for n in inspect.signature(cls.__init__).parameters if n != "self"]
    theirs = pipeline.components
    settings = {k: v for k, v in pipeline.config.items() if k not in theirs}
    private = {k[1:]: v for k, v in settings.items() if k.startswith("_")}
    known = {n: s[n] for s in (private, settings) for n in parameters if n in s and n not in names}
    given = {**{k: v for k, v in theirs.items() if k in names}, **known, **kwargs}
    unknown = sorted(set(given) - set(parameters))
    missing = sorted(set(names) - set(given) - set(cls._optional_components))
    if unknown or missing:
        raise ValueError(
            f"{cls.__name__} can't be made from {type(pipeline).__name__}: "
            + (f"components {missing} are missing, pass them; " if missing else "")
            + (f"arguments {unknown} are unknown, it takes {sorted(parameters)}" if unknown else "")
        )
    unused = {k if k.startswith("_") else f"_{k}": v for k, v in settings.items() if k.lstrip("_") not in given}
    return {**{name: given.get(name) for name in names}, **given}, unused
