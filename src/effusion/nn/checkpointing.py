"""Gradient checkpointing (Chen et al., 2016): recompute a block in the backward pass instead of keeping its insides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Checkpoint = Callable[..., Any]  # (block, *args) -> what block(*args) gives


def _default_checkpoint(block: Callable[..., Any], *args: Any) -> Any:
    from torch.utils.checkpoint import checkpoint

    return checkpoint(block, *args, use_reentrant=False)


def run(owner: nn.Module, block: Callable[..., Any], *args: Any) -> Any:
    """``block(*args)``; checkpointed if that is switched on at ``owner`` and gradients are being recorded."""
    if owner.gradient_checkpointing and torch.is_grad_enabled():
        function: Checkpoint = getattr(owner, "_gradient_checkpointing_func", None) or _default_checkpoint
        return function(block, *args)
    return block(*args)


class GradientCheckpointingMixin:
    """Switches of a model whose modules hold an attribute ``gradient_checkpointing`` and call :func:`run`."""

    _supports_gradient_checkpointing = False

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether any module of this model recomputes in the backward pass."""
        assert isinstance(self, nn.Module)
        return any(getattr(m, "gradient_checkpointing", False) for m in self.modules())

    def enable_gradient_checkpointing(self, gradient_checkpointing_func: Checkpoint | None = None) -> None:
        """Recompute the blocks in the backward pass: less memory, about a third more time.

        Args:
            gradient_checkpointing_func: called as ``f(block, *args)``; ``torch.utils.checkpoint`` if ``None``.

        Raises:
            ValueError: this network has no checkpointed blocks.
        """
        if not self._supports_gradient_checkpointing:
            raise ValueError(f"{type(self).__name__} does not support gradient checkpointing")
        self._checkpoint(True, gradient_checkpointing_func)

    def disable_gradient_checkpointing(self) -> None:
        """Keep activations for the backward pass again."""
        self._checkpoint(False, None)

    def _checkpoint(self, enable: bool, function: Checkpoint | None) -> None:
        assert isinstance(self, nn.Module)
        for module in self.modules():
            if hasattr(module, "gradient_checkpointing"):
                object.__setattr__(module, "gradient_checkpointing", enable)
                object.__setattr__(module, "_gradient_checkpointing_func", function)
