"""What the parity tests of networks share: the peer's network with random weights, and ours with the same."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import torch

import effusion


def pair(name: str, seed: int = 0, **config: Any) -> tuple[Any, Any]:
    """The peer's network ``name`` with random weights and ours with the same ones, both in eval mode."""
    torch.manual_seed(seed)
    theirs = getattr(diffusers, name)(**config).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    ours = getattr(effusion, name)(**config).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def public_config(model: Any) -> dict[str, Any]:
    return {k: v for k, v in model.config.items() if not k.startswith("_")}


def assert_same_signature(ours: Any, theirs: Any) -> None:
    """Equal names, order and defaults of parameters."""
    a, b = (list(inspect.signature(f).parameters.values()) for f in (ours, theirs))
    assert [(p.name, p.kind, p.default) for p in a] == [(p.name, p.kind, p.default) for p in b]


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Equal within ``tolerance`` times the largest value, which must not be trivial."""
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    size = theirs.abs().max().item()
    assert size > 1e-3, "the reference is all but zero: the comparison would mean nothing"
    assert (ours - theirs).abs().max().item() <= tolerance * max(size, 1.0)
