"""Logging under one name, with the verbosity switches that users of the ecosystem know."""

from __future__ import annotations

import logging
import os

DEBUG, INFO, WARNING, ERROR, CRITICAL = (
    logging.DEBUG,
    logging.INFO,
    logging.WARNING,
    logging.ERROR,
    logging.CRITICAL,
)
_ROOT = "effusion"
_progress_bars = True


def get_logger(name: str | None = None) -> logging.Logger:
    """The logger of a module (``__name__``), or the root of the library."""
    _configure()
    return logging.getLogger(name or _ROOT)


def _configure() -> None:
    root = logging.getLogger(_ROOT)
    if not root.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
        root.addHandler(handler)
        level = os.environ.get("EFFUSION_VERBOSITY", "warning").upper()
        root.setLevel(getattr(logging, level, logging.WARNING))


def set_verbosity(level: int) -> None:
    """Show messages of ``level`` and above."""
    get_logger().setLevel(level)


def get_verbosity() -> int:
    return get_logger().getEffectiveLevel()


def set_verbosity_info() -> None:
    set_verbosity(INFO)


def set_verbosity_warning() -> None:
    set_verbosity(WARNING)


def set_verbosity_debug() -> None:
    set_verbosity(DEBUG)


def set_verbosity_error() -> None:
    set_verbosity(ERROR)


def disable_progress_bar() -> None:
    """No progress bars in this process."""
    global _progress_bars
    _progress_bars = False


def enable_progress_bar() -> None:
    global _progress_bars
    _progress_bars = True


def is_progress_bar_enabled() -> bool:
    return _progress_bars
