"""The ecosystem's older switches for the package ``xformers``, which is one attention backend of several."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .dispatch import AttentionBackendMixin


class XformersMixin(AttentionBackendMixin):
    """Attention with the package ``xformers``, on and off."""

    def enable_xformers_memory_efficient_attention(self, attention_op: Callable[..., Any] | None = None) -> None:
        """Compute attention with the package ``xformers``.

        Raises:
            MissingExtra: it is not installed.
            ValueError: ``attention_op`` is given; the package chooses its own.
        """
        if attention_op is not None:
            raise ValueError("`attention_op` can't be chosen here; leave it out")
        self.set_attention_backend("xformers")

    def disable_xformers_memory_efficient_attention(self) -> None:
        """Back to the backend in force."""
        self.reset_attention_backend()

    def set_use_memory_efficient_attention_xformers(
        self, valid: bool, attention_op: Callable[..., Any] | None = None
    ) -> None:
        """The two above under one name."""
        if valid:
            self.enable_xformers_memory_efficient_attention(attention_op)
        else:
            self.disable_xformers_memory_efficient_attention()
