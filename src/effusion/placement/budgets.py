"""How much memory there is to plan with, and the numbers that a call is planned for."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..core import log
from . import machine
from .carrying import own_bytes
from .plan import parse_size, size_text

logger = log.get_logger(__name__)
PART = 0.9  # of what is free that a plan may count on, if nobody says how much


def on_device(memory: Any, networks: Mapping[str, nn.Module], device: torch.device) -> int:
    """The budget on ``device``: what was asked for, but no more than there is; all that is free if nothing was.

    Weights of ``networks`` that are there already are part of what is placed, so their room counts as free.
    """
    if memory is None:
        return int(PART * (machine.free_device_memory(device) + own_bytes(networks, device)))
    budget, most = parse_size(memory), machine.device_memory(device)
    if most is None or budget <= most:
        return budget
    logger.warning("memory=%r is more than %s has: planning for all of it, %s", memory, device, size_text(most))
    return most


def on_host(ram: Any, networks: Mapping[str, nn.Module]) -> int:
    """The budget in host memory: what was asked for, or all that is available."""
    if ram is not None:
        return parse_size(ram, "ram")
    return int(PART * (machine.available_ram() + own_bytes(networks, torch.device("cpu"))))


def whole(name: str, value: Any) -> int:
    """``value`` as a positive whole number.

    Raises:
        ValueError: it is none.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if number < 1 or isinstance(value, bool):
        raise ValueError(f"{name}={value!r}: give a positive whole number")
    return number
