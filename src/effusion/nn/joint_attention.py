"""Attention over one stream of tokens, or jointly over two with weights of their own (Esser et al., 2024)."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from .dispatch import attend
from .fusion import FusedProjections, project
from .norms import RMSNorm
from .rotary import apply_rotary


class JointAttnProcessor:
    """The usual way to compute :class:`JointAttention`; a user's own takes the same arguments."""

    def __call__(
        self,
        attn: JointAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Tensor | None = None,
    ) -> Any:
        q, k, v = attn.heads_of(hidden_states)
        if encoder_hidden_states is not None:
            qc, kc, vc = attn.context_heads_of(encoder_hidden_states)
            q, k, v = torch.cat((qc, q), 1), torch.cat((kc, k), 1), torch.cat((vc, v), 1)
        if image_rotary_emb is not None:
            q, k = apply_rotary(q, image_rotary_emb), apply_rotary(k, image_rotary_emb)
        out = attend(q, k, v, attention_mask, backend=attn.attention_backend).flatten(2)  # (B, L, H * D)
        if encoder_hidden_states is None:
            return attn.out(out)
        length = encoder_hidden_states.shape[1]
        return attn.out(out[:, length:]), attn.context_out(out[:, :length])


class JointAttention(FusedProjections):
    """Multi-head attention of image tokens, jointly with context (text) tokens if it was built for them.

    Args:
        dim: width of the tokens; heads x dim_head is the width inside.
        context_dim: width of the context tokens; ``None`` for a single stream.
        qk_norm: ``"rms_norm"`` to normalise each head's queries and keys, or ``None``.
        project_out: whether the result goes through ``to_out``.
        context_out: whether the context's result is wanted, through ``to_add_out``.

    ``forward`` gives ``(B, L, dim)``, with context the pair of it and ``(B, L_context, dim)`` (``None`` if
    ``context_out`` is off). The context's tokens come first in the joint sequence, and so in a mask or table.
    """

    _fusible = {
        "to_qkv": ("to_q", "to_k", "to_v"),
        "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
    }

    def __init__(
        self,
        dim: int,
        heads: int,
        dim_head: int,
        *,
        context_dim: int | None = None,
        qk_norm: str | None = "rms_norm",
        eps: float = 1e-6,
        project_out: bool = True,
        context_out: bool = True,
    ) -> None:
        super().__init__()
        if qk_norm not in (None, "rms_norm"):
            raise ValueError(f"qk_norm {qk_norm!r} is unknown; allowed are 'rms_norm' and None")
        self.heads, self.head_dim, self.inner_dim = heads, dim_head, heads * dim_head
        self.added_kv_proj_dim = context_dim
        self.attention_backend: str | None = None
        inner = self.inner_dim
        self.norm_q = RMSNorm(dim_head, eps) if qk_norm else None
        self.norm_k = RMSNorm(dim_head, eps) if qk_norm else None
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, inner) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(inner, dim), nn.Dropout(0.0)]) if project_out else None
        if context_dim is not None:
            self.norm_added_q = RMSNorm(dim_head, eps) if qk_norm else None
            self.norm_added_k = RMSNorm(dim_head, eps) if qk_norm else None
            self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(context_dim, inner) for _ in range(3))
            self.to_add_out = nn.Linear(inner, context_dim) if context_out else None
        self.set_processor(self.default_processor())

    def default_processor(self) -> Any:
        """What a new module has."""
        return JointAttnProcessor()

    def set_processor(self, processor: Any) -> None:
        """Let ``processor`` compute this module; keyword arguments that it does not know are not given to it."""
        if not isinstance(processor, nn.Module):
            self._modules.pop("processor", None)
        self.processor: Any = processor
        call = processor.forward if isinstance(processor, nn.Module) else processor
        parameters = inspect.signature(call).parameters.values()
        self._takes = None if any(p.kind is p.VAR_KEYWORD for p in parameters) else {p.name for p in parameters}

    def get_processor(self) -> Any:
        return self.processor

    def heads_of(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the tokens: ``(B, L, H, D)`` each."""
        return self._heads(x, "to_qkv", self.norm_q, self.norm_k)

    def context_heads_of(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the context tokens: ``(B, L, H, D)`` each."""
        return self._heads(x, "to_added_qkv", self.norm_added_q, self.norm_added_k)

    def _heads(
        self, x: Tensor, name: str, norm_q: nn.Module | None, norm_k: nn.Module | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (t.unflatten(-1, (self.heads, -1)) for t in project(self, x, name))
        return q if norm_q is None else norm_q(q), k if norm_k is None else norm_k(k), v

    def out(self, x: Tensor) -> Tensor:
        """The result for the tokens, ``(B, L, H * D) -> (B, L, dim)``."""
        return x if self.to_out is None else self.to_out[1](self.to_out[0](x))

    def context_out(self, x: Tensor) -> Tensor | None:
        """The result for the context tokens, if it is wanted."""
        return None if self.to_add_out is None else self.to_add_out(x)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        known = kwargs if self._takes is None else {k: v for k, v in kwargs.items() if k in self._takes}
        return self.processor(self, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb, **known)
