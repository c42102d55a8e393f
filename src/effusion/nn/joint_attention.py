"""Attention over one stream of tokens, or jointly over two with weights of their own (Esser et al., 2024)."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .attention import Attention, AttnProcessor2_0, Processor
from .dispatch import attend
from .fusion import FusedProjections, project
from .norms import RMSNorm
from .rotary import apply_rotary, as_cos_sin, as_table


class JointAttnProcessor:
    """The usual way to compute :class:`JointAttention`; a user's own takes the same arguments.

    Our networks hand their own table of angles to exactly these classes; what anybody else writes, subclasses
    included, is given the angles as the ecosystem's networks give them. Both forms are understood here.
    """

    def __call__(
        self,
        attn: JointAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        q, k, v = attn.heads_of(hidden_states)
        if encoder_hidden_states is not None:
            qc, kc, vc = attn.context_heads_of(encoder_hidden_states)
            q, k, v = torch.cat((qc, q), 1), torch.cat((kc, k), 1), torch.cat((vc, v), 1)
        if image_rotary_emb is not None:
            table = as_table(image_rotary_emb)
            q, k = apply_rotary(q, table), apply_rotary(k, table)
        out = attend(q, k, v, attention_mask, backend=attn.attention_backend).flatten(2)  # (B, L, H * D)
        if encoder_hidden_states is None:
            return attn.out(out)
        length = encoder_hidden_states.shape[1]
        return attn.out(out[:, length:]), attn.context_out(out[:, :length])


class JointAttnProcessor2_0(JointAttnProcessor):
    """That of Stable Diffusion 3."""


class FusedJointAttnProcessor2_0(JointAttnProcessor2_0):
    """The same: the module itself knows which projections are fused."""


class FluxAttnProcessor(JointAttnProcessor):
    """That of FLUX."""


class FluxAttnProcessor2_0(FluxAttnProcessor):
    """The same under its older name."""


class FusedFluxAttnProcessor2_0(FluxAttnProcessor):
    """The same: the module itself knows which projections are fused."""


class QwenDoubleStreamAttnProcessor2_0(JointAttnProcessor):
    """That of Qwen-Image; the mask may be given for the text alone."""

    def __call__(  # type: ignore[override]
        self,
        attn: JointAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        encoder_hidden_states_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        if encoder_hidden_states_mask is not None and attention_mask is None:
            image = encoder_hidden_states_mask.new_ones(hidden_states.shape[:2], dtype=torch.bool)
            attention_mask = torch.cat((encoder_hidden_states_mask.bool(), image), dim=1)[:, None, None]
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)


# take our own tables; a subclass by somebody else does not
_OWN: tuple[type[JointAttnProcessor], ...] = (
    JointAttnProcessor,
    JointAttnProcessor2_0,
    FusedJointAttnProcessor2_0,
    FluxAttnProcessor,
    FluxAttnProcessor2_0,
    FusedFluxAttnProcessor2_0,
    QwenDoubleStreamAttnProcessor2_0,
)


class JointAttention(Attention):
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

    usual_processor: ClassVar[type[JointAttnProcessor]] = JointAttnProcessor2_0

    def __init__(
        self,
        dim: int,
        heads: int,
        dim_head: int,
        *,
        context_dim: int | None = None,
        qk_norm: str | None = "rms_norm",
        eps: float = 1e-6,
        affine: bool = True,
        project_out: bool = True,
        context_out: bool = True,
        bias: bool = True,
        context_bias: bool = True,
        out_bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        FusedProjections.__init__(self)
        if qk_norm not in (None, "rms_norm"):
            raise ValueError(f"qk_norm {qk_norm!r} is unknown; allowed are 'rms_norm' and None")
        self._describe(dim, heads, dim_head, context_dim, bias, dropout)
        self.pre_only, self.context_pre_only = not project_out, context_dim is not None and not context_out
        inner = self.inner_dim

        def norm(affine: bool = affine) -> RMSNorm | None:
            return RMSNorm(dim_head, eps, affine) if qk_norm else None

        self.norm_q, self.norm_k = norm(), norm()
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, inner, bias=bias) for _ in range(3))
        last = [nn.Linear(inner, dim, bias=out_bias), nn.Dropout(dropout)] if project_out else None
        self.to_out = nn.ModuleList(last) if last is not None else None  # type: ignore[assignment]
        if context_dim is not None:
            self.norm_added_q, self.norm_added_k = norm(True), norm(True)
            parts = (nn.Linear(context_dim, inner, bias=context_bias) for _ in range(3))
            self.add_q_proj, self.add_k_proj, self.add_v_proj = parts
            self.to_add_out = nn.Linear(inner, context_dim, bias=out_bias) if context_out else None
        self._fusible = {
            "to_qkv": ("to_q", "to_k", "to_v"),
            "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
        }
        self.set_processor(self.default_processor())

    def _describe(
        self, dim: int, heads: int, dim_head: int, context_dim: int | None, bias: bool, dropout: float
    ) -> None:
        """What processors ask of any attention module."""
        self.heads, self.head_dim, self.inner_dim, self.inner_kv_dim = (
            heads,
            dim_head,
            heads * dim_head,
            heads * dim_head,
        )
        self.query_dim = self.out_dim = self.cross_attention_dim = dim
        self.added_kv_proj_dim, self.use_bias, self.dropout = context_dim, bias, dropout
        self.scale_qk, self.scale = True, dim_head**-0.5
        self.is_cross_attention = self.only_cross_attention = self.is_causal = False
        self.upcast_attention = self.upcast_softmax = self.residual_connection = False
        self.rescale_output_factor, self.sliceable_head_dim = 1.0, heads
        self.group_norm = self.norm_cross = self.spatial_norm = None
        self.attention_backend: str | None = None

    def default_processor(self) -> Any:
        """What a new module has."""
        return self.usual_processor()

    def set_processor(self, processor: Any) -> None:
        """Let ``processor`` compute this module; keyword arguments that it does not know are not given to it."""
        if not isinstance(processor, nn.Module):
            self._modules.pop("processor", None)
        self.processor: Any = processor
        self._own = type(processor) in _OWN
        call = processor.forward if isinstance(processor, nn.Module) else processor
        parameters = inspect.signature(call).parameters.values()
        self._takes = None if any(p.kind is p.VAR_KEYWORD for p in parameters) else {p.name for p in parameters}

    def set_attention_slice(self, slice_size: int | None) -> None:
        """Attend ``slice_size`` (item, head) pairs at a time; ``None`` for all at once."""
        self.attention_backend = None if slice_size is None else f"sliced:{slice_size}"

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

    def compute(self, x: Tensor, context: Tensor | None, mask: Tensor | None, scores: Processor) -> Tensor:
        raise ValueError(
            f"{type(self.processor).__name__} is for attention of UNets: it gives one result where two streams of tokens "
            f"want two; use {self.usual_processor.__name__} or one of your own"
        )

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        **kwargs: Any,
    ) -> Any:
        given: dict[str, Any] = {
            "encoder_hidden_states": encoder_hidden_states,
            "attention_mask": attention_mask,
            "image_rotary_emb": image_rotary_emb,
        }
        if not self._own:
            given = self.as_others_expect(**given)
        known = kwargs if self._takes is None else {k: v for k, v in kwargs.items() if k in self._takes}
        return self._call(hidden_states, given, known)

    def _call(self, x: Tensor, given: dict[str, Any], known: dict[str, Any]) -> Any:
        """By name; an argument that is not there and that the processor does not name is left out."""
        wanted = {k: v for k, v in given.items() if (v is not None or k == "encoder_hidden_states") and self._names(k)}
        return self.processor(self, x, **wanted, **known)

    def _names(self, argument: str) -> bool:
        return self._takes is None or argument in self._takes

    def as_others_expect(
        self, encoder_hidden_states: Tensor | None, attention_mask: Tensor | None, image_rotary_emb: Any
    ) -> dict[str, Any]:
        """The arguments of processors that are not ours, as the ecosystem's network of this kind would give them."""
        return {
            "encoder_hidden_states": encoder_hidden_states,
            "attention_mask": attention_mask,
            "image_rotary_emb": as_cos_sin(image_rotary_emb),
        }


class FluxAttention(JointAttention):
    """:class:`JointAttention` as FLUX has it, under the ecosystem's name and arguments."""

    usual_processor = FluxAttnProcessor

    def __init__(
        self,
        query_dim: int,
        heads: int = 8,
        dim_head: int = 64,
        dropout: float = 0.0,
        bias: bool = False,
        added_kv_proj_dim: int | None = None,
        added_proj_bias: bool | None = True,
        out_bias: bool = True,
        eps: float = 1e-5,
        out_dim: int | None = None,
        context_pre_only: bool | None = None,
        pre_only: bool = False,
        elementwise_affine: bool = True,
        processor: Any = None,
    ) -> None:
        if out_dim not in (None, query_dim):
            raise ValueError(f"out_dim={out_dim}: what comes out is as wide as what goes in, {query_dim}")
        super().__init__(
            query_dim,
            heads if out_dim is None else out_dim // dim_head,
            dim_head,
            context_dim=added_kv_proj_dim,
            eps=eps,
            affine=elementwise_affine,
            project_out=not pre_only,
            bias=bias,
            context_bias=bool(added_proj_bias),
            out_bias=out_bias,
            dropout=dropout,
        )
        self.context_pre_only = bool(context_pre_only)
        if processor is not None:
            self.set_processor(processor)

    def _call(self, x: Tensor, given: dict[str, Any], known: dict[str, Any]) -> Any:
        """By place, as this network always has; processors may call their arguments what they like."""
        return self.processor(self, x, *given.values(), **known)


class QwenAttention(JointAttention):
    """:class:`JointAttention` as Qwen-Image has it: angles of image and text apart, and a mask of the text."""

    usual_processor = QwenDoubleStreamAttnProcessor2_0

    def as_others_expect(
        self, encoder_hidden_states: Tensor | None, attention_mask: Tensor | None, image_rotary_emb: Any
    ) -> dict[str, Any]:
        length = 0 if encoder_hidden_states is None else encoder_hidden_states.shape[1]
        if isinstance(image_rotary_emb, Tensor):
            turns = torch.view_as_complex(image_rotary_emb)
            image_rotary_emb = (turns[length:], turns[:length])
        return {
            "encoder_hidden_states": encoder_hidden_states,
            "encoder_hidden_states_mask": None if attention_mask is None else attention_mask[:, 0, 0, :length],
            "image_rotary_emb": image_rotary_emb,
        }


# the type that scripts annotate with; any callable of these arguments is one
AttentionProcessor = AttnProcessor2_0 | JointAttnProcessor
