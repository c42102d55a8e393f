"""Nested values: what networks are called with and return."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import is_dataclass
from typing import Any

from torch import Tensor


def mapped(value: Any, function: Callable[[Tensor], Any], other: Callable[[Any], Any] | None = None) -> Any:
    """``value`` with ``function`` applied to the tensors in it; itself where that changes nothing.

    Tensors are found in tuples, lists, dictionaries (results of networks included) and in the attributes of objects.

    Args:
        other: applied to what is none of these.
    """
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (tuple, list)):
        items = [mapped(item, function, other) for item in value]
        if all(a is b for a, b in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        made = {key: mapped(item, function, other) for key, item in value.items()}
        if all(made[key] is item for key, item in value.items()):
            return value
        return made if type(value) is dict else _like(value, made)
    if any(isinstance(item, Tensor) for item in getattr(value, "__dict__", {}).values()):
        return _with_tensors(value, function)
    return value if other is None else other(value)


def _like(value: dict[Any, Any], items: dict[Any, Any]) -> Any:
    """``items`` as another one of the class of ``value``: a result, say."""
    if is_dataclass(value):
        return type(value)(**items)
    made = copy.copy(value)
    made.update(items)
    return made


def _with_tensors(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """An object with attributes that are tensors: a distribution, say."""
    made = copy.copy(value)
    for key, item in vars(value).items():
        if isinstance(item, Tensor):
            object.__setattr__(made, key, function(item))
    same = all(vars(made)[key] is item for key, item in vars(value).items())
    return value if same else made
