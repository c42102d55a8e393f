"""Components for the planner, made of numbers alone."""

from __future__ import annotations

from typing import Any

from effusion.placement.forecast import Part, Speed
from effusion.placement.sizes import Piece

SPEED = Speed(1e9, 1e8, 1e10)


def part(name: str = "net", blocks: int = 8, size: int = 1000, activations: int = 500, **more: Any) -> Part:
    """``blocks`` blocks of four layers each."""
    units = tuple(Piece(f"blocks.{i}", size, size) for i in range(blocks))
    leaves = tuple(Piece(f"blocks.{i}.{k}", size // 4, size // 4) for i in range(blocks) for k in range(4))
    return Part(name, units, leaves, activations, **{"flops": 1e6, "passes": 4, **more})
