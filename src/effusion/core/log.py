"""Logging under one name, with the verbosity switches that users of the ecosystem know."""

from __future__ import annotations

import functools
import logging
import os
import threading
from logging import CRITICAL, DEBUG, ERROR, INFO, WARNING
from logging import FATAL as FATAL
from logging import NOTSET as NOTSET
from logging import WARN as WARN
from typing import Any

log_levels = {"debug": DEBUG, "info": INFO, "warning": WARNING, "error": ERROR, "critical": CRITICAL}
# the house's own switch, and the one that scripts of the ecosystem set; the first that is there counts
VERBOSITY = ("EFFUSION_VERBOSITY", "DIFFUSERS_VERBOSITY")
SILENT_ADVICE = "DIFFUSERS_NO_ADVISORY_WARNINGS"
_ROOT = "effusion"
_FORMAT = logging.Formatter("%(levelname)s: %(message)s")
_EXPLICIT = logging.Formatter("[%(levelname)s|%(filename)s:%(lineno)s] %(asctime)s >> %(message)s")
_progress_bars = True
_lock = threading.Lock()
_default_handler: logging.Handler | None = None


def get_logger(name: str | None = None) -> logging.Logger:
    """The logger of a module (``__name__``), or the root of the library."""
    _root()
    logger = logging.getLogger(name or _ROOT)
    if "warning_advice" not in vars(logger):
        logger.warning_advice = functools.partial(_advise, logger)  # type: ignore[attr-defined]
    return logger


def _advise(logger: logging.Logger, *args: Any, **kwargs: Any) -> None:
    """``logger.warning``, unless the environment asks for no advice."""
    if not os.environ.get(SILENT_ADVICE):
        logger.warning(*args, **{"stacklevel": 2, **kwargs})


def _root() -> logging.Logger:
    """The library's own logger, with its handler; its messages don't go to the program's handlers a second time."""
    global _default_handler
    root = logging.getLogger(_ROOT)
    with _lock:
        if _default_handler is None:
            _default_handler = logging.StreamHandler()
            _default_handler.setFormatter(_FORMAT)
            root.addHandler(_default_handler)
            root.propagate = False
            root.setLevel(_level(root))
    return root


def _level(root: logging.Logger) -> int:
    for variable in VERBOSITY:
        asked = os.environ.get(variable)
        if asked and asked.lower() in log_levels:
            return log_levels[asked.lower()]
        if asked:
            root.warning("%s=%s is unknown; there are %s", variable, asked, ", ".join(log_levels))
    return WARNING


def get_log_levels_dict() -> dict[str, int]:
    """The names that the environment may ask for, and their numbers."""
    return log_levels


def set_verbosity(verbosity: int) -> None:
    """Show messages of the level ``verbosity`` and above."""
    _root().setLevel(verbosity)


def get_verbosity() -> int:
    """The level from which on messages are shown."""
    return _root().getEffectiveLevel()


def set_verbosity_info() -> None:
    set_verbosity(INFO)


def set_verbosity_warning() -> None:
    set_verbosity(WARNING)


def set_verbosity_debug() -> None:
    set_verbosity(DEBUG)


def set_verbosity_error() -> None:
    set_verbosity(ERROR)


def disable_default_handler() -> None:
    """Write messages nowhere, but to handlers that were added."""
    root = _root()
    assert _default_handler is not None
    root.removeHandler(_default_handler)


def enable_default_handler() -> None:
    """Write messages to the standard error stream (again)."""
    root = _root()
    assert _default_handler is not None
    root.addHandler(_default_handler)


def add_handler(handler: logging.Handler) -> None:
    """Give messages to ``handler`` too."""
    _root().addHandler(handler)


def remove_handler(handler: logging.Handler) -> None:
    """Undo :func:`add_handler`.

    Raises:
        ValueError: it was not added.
    """
    root = _root()
    if handler not in root.handlers:
        raise ValueError(f"{handler} is none of the handlers that were added")
    root.removeHandler(handler)


def disable_propagation() -> None:
    """Keep messages from the program's own handlers; this is how it starts."""
    _root().propagate = False


def enable_propagation() -> None:
    """Give messages to the program's own handlers too (:func:`disable_default_handler` to see them once)."""
    _root().propagate = True


def enable_explicit_format() -> None:
    """Say with each message its file, line and time."""
    for handler in _root().handlers:
        handler.setFormatter(_EXPLICIT)


def reset_format() -> None:
    """Undo :func:`enable_explicit_format`."""
    for handler in _root().handlers:
        handler.setFormatter(_FORMAT if handler is _default_handler else None)


def disable_progress_bar() -> None:
    """No progress bars in this process."""
    global _progress_bars
    _progress_bars = False


def enable_progress_bar() -> None:
    global _progress_bars
    _progress_bars = True


def is_progress_bar_enabled() -> bool:
    return _progress_bars
