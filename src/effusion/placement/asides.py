"""Trying something out on a network and leaving no trace of it: in its modules, in the generators of random numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from .policies import execution_device


@contextmanager
def as_it_was(network: nn.Module) -> Iterator[None]:
    """What happens to attributes, parameters and buffers of ``network`` within it is taken back."""
    kept = [(m, dict(m.__dict__), dict(m._parameters), dict(m._buffers)) for m in network.modules()]
    try:
        yield
    finally:
        for module, attributes, parameters, buffers in kept:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            module._parameters.clear()
            module._parameters.update(parameters)
            module._buffers.clear()
            module._buffers.update(buffers)


@contextmanager
def undrawn(networks: Iterable[nn.Module]) -> Iterator[None]:
    """Random numbers that are drawn within it, on the CPU or where ``networks`` compute, will be drawn again."""
    places = {execution_device(network) for network in networks}
    indices: dict[str, set[int]] = {}
    for place in places:
        if place.type not in ("cpu", "meta", "mps"):
            indices.setdefault(place.type, set()).add(place.index or 0)
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([]))
        for kind, found in indices.items():
            stack.enter_context(torch.random.fork_rng(sorted(found), device_type=kind))
        if any(place.type == "mps" for place in places):
            stack.callback(torch.mps.set_rng_state, torch.mps.get_rng_state())
        yield
