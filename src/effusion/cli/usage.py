"""What verbs share in judging their arguments."""

from __future__ import annotations

import argparse
from collections.abc import Callable


class UsageError(Exception):
    """Arguments that parse but can't be meant: exit status 2, like those that don't parse."""


def number(kind: type, low: float, high: float = float("inf"), open_low: bool = False) -> Callable[[str], float]:
    """An argparse type: a number of ``kind`` in ``[low, high]`` (``(low, high]`` with ``open_low``)."""

    def parse(text: str) -> float:
        try:
            value: float = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {_a(kind)}") from None
        if not (low < value if open_low else low <= value) or not value <= high:
            bounds = f"{'more than' if open_low else 'at least'} {low}" + (f", at most {high}" if high < 1e300 else "")
            raise argparse.ArgumentTypeError(f"{text} is out of range: {bounds}")
        return value

    return parse


def _a(kind: type) -> str:
    return "a whole number" if kind is int else "a number"


def size(text: str) -> tuple[int, int]:
    """An argparse type: ``512`` or ``768x512`` (width x height) as (width, height)."""
    parts = text.lower().split("x")
    try:
        sides = [int(part) for part in parts]
    except ValueError:
        sides = []
    if len(sides) not in (1, 2) or min(sides, default=0) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 512, or 768x512 for width x height")
    return sides[0], sides[-1]
