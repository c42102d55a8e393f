"""What community pipelines call around their docstrings and old arguments."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def replace_example_docstring(example_docstring: str) -> Callable[[Function], Function]:
    """Decorator that puts ``example_docstring`` where the docstring has an empty ``Examples:`` line.

    Raises:
        ValueError: the docstring has no such line.
    """

    def decorate(function: Function) -> Function:
        text, found = re.subn(r"(?m)^\s*Examples?:\s*$", lambda _: example_docstring, function.__doc__ or "", count=1)
        if not found:
            raise ValueError(f"the docstring of {function.__qualname__} needs a line `Examples:` for the example")
        function.__doc__ = text
        return function

    return decorate


def deprecate(
    *args: Any, take_from: dict[str, Any] | Any | None = None, standard_warn: bool = True, stacklevel: int = 2
) -> Any:
    """Warn that names go away: each of ``args`` is ``(name, version, message)``, one alone may be given flat.

    With ``take_from`` (keyword arguments or an object), the values found there under those names are returned.
    """
    entries = args if isinstance(args[0], tuple) else (args,)
    values = []
    for name, version, message in entries:
        if isinstance(take_from, dict):
            if name not in take_from:
                continue
            values.append(take_from.pop(name))
        elif take_from is not None:
            if not hasattr(take_from, name):
                continue
            values.append(getattr(take_from, name))
        head = f"`{name}` is deprecated and goes away in version {version}. " if standard_warn else ""
        warnings.warn(head + message, FutureWarning, stacklevel=stacklevel + 1)
    return None if not values else values[0] if len(values) == 1 else tuple(values)
