"""The attention module of UNets and VAEs, its processors, and the switches of models that contain it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core import log
from . import pixels
from .dispatch import attend
from .fusion import FusedProjections, project

logger = log.get_logger(__name__)
Processor = Callable[..., Tensor]  # (attn, hidden_states, encoder_hidden_states, attention_mask, …) -> hidden_states


class Attention(FusedProjections):
    """Multi-head attention (Vaswani et al., 2017) over tokens ``(B, L, D)`` or pixels ``(B, C, H, W)``.

    What is computed between the projections is a *processor*, which users may replace
    (:meth:`set_processor`): any callable taking ``(attn, hidden_states, encoder_hidden_states,
    attention_mask, …)``. The attributes that such processors read keep their customary names.

    Args:
        cross_attention_dim: width of the context; ``None`` for self-attention.
        upcast_attention, upcast_softmax: compute scores / softmax in float32 (:class:`AttnProcessor` only;
            fused kernels accumulate in float32 anyway).
        cross_attention_norm: norm of the context, ``"layer_norm"`` or ``"group_norm"``.
        qk_norm: norm of queries and keys per head, ``"layer_norm"`` or ``"rms_norm"``.
        added_kv_proj_dim: width of a context whose keys and values are put before the input's own.
        norm_num_groups: group norm of the input, if given.
        rescale_output_factor: the result is divided by it, after ``residual_connection`` added the input.
    """

    def __init__(
        self,
        query_dim: int,
        cross_attention_dim: int | None = None,
        heads: int = 8,
        dim_head: int = 64,
        dropout: float = 0.0,
        bias: bool = False,
        upcast_attention: bool = False,
        upcast_softmax: bool = False,
        cross_attention_norm: str | None = None,
        cross_attention_norm_num_groups: int = 32,
        qk_norm: str | None = None,
        added_kv_proj_dim: int | None = None,
        norm_num_groups: int | None = None,
        out_bias: bool = True,
        scale_qk: bool = True,
        only_cross_attention: bool = False,
        eps: float = 1e-5,
        rescale_output_factor: float = 1.0,
        residual_connection: bool = False,
        processor: Processor | None = None,
        out_dim: int | None = None,
        is_causal: bool = False,
    ) -> None:
        super().__init__()
        self.inner_dim = out_dim or dim_head * heads
        self.inner_kv_dim = self.inner_dim
        self.query_dim, self.out_dim = query_dim, out_dim or query_dim
        self.is_cross_attention = cross_attention_dim is not None
        self.cross_attention_dim = cross_attention_dim or query_dim
        self.heads = self.inner_dim // dim_head
        self.sliceable_head_dim = heads
        self.scale_qk, self.scale = scale_qk, dim_head**-0.5 if scale_qk else 1.0
        self.upcast_attention, self.upcast_softmax = upcast_attention, upcast_softmax
        self.rescale_output_factor, self.residual_connection = rescale_output_factor, residual_connection
        self.added_kv_proj_dim, self.only_cross_attention = added_kv_proj_dim, only_cross_attention
        self.is_causal, self.use_bias, self.dropout = is_causal, bias, dropout
        self.attention_backend: str | None = None
        if only_cross_attention and added_kv_proj_dim is None:
            raise ValueError("only_cross_attention needs added_kv_proj_dim, or there would be nothing to attend to")

        self.spatial_norm = None
        self.group_norm = nn.GroupNorm(norm_num_groups, query_dim, eps=eps) if norm_num_groups is not None else None
        self.norm_q = _head_norm(qk_norm, dim_head, eps)
        self.norm_k = _head_norm(qk_norm, dim_head, eps)
        # the layer norm of published networks is as wide as the queries, the group norm as the context
        context_dim = added_kv_proj_dim if cross_attention_norm == "group_norm" else None
        self.norm_cross = _context_norm(
            cross_attention_norm, context_dim or self.cross_attention_dim, cross_attention_norm_num_groups
        )
        self.to_q = nn.Linear(query_dim, self.inner_dim, bias=bias)
        if not only_cross_attention:
            self.to_k = nn.Linear(self.cross_attention_dim, self.inner_kv_dim, bias=bias)
            self.to_v = nn.Linear(self.cross_attention_dim, self.inner_kv_dim, bias=bias)
        if added_kv_proj_dim is not None:
            self.add_k_proj = nn.Linear(added_kv_proj_dim, self.inner_kv_dim)
            self.add_v_proj = nn.Linear(added_kv_proj_dim, self.inner_kv_dim)
        if added_kv_proj_dim is None:
            joint, parts = (
                ("to_kv", ("to_k", "to_v")) if self.is_cross_attention else ("to_qkv", ("to_q", "to_k", "to_v"))
            )
            self._fusible = {joint: parts}
        self.to_out = nn.ModuleList([nn.Linear(self.inner_dim, self.out_dim, bias=out_bias), nn.Dropout(dropout)])
        self.set_processor(processor or self.default_processor())

    # -- processors --------------------------------------------------------------------------------

    def default_processor(self) -> Processor:
        """What a new module has: the dispatch; plain arithmetic where the scores have no scale."""
        if not self.scale_qk:
            return AttnProcessor()
        return AttnAddedKVProcessor2_0() if self.added_kv_proj_dim is not None else AttnProcessor2_0()

    def set_processor(self, processor: Processor) -> None:
        """Compute with ``processor`` from now on; one that is an ``nn.Module`` becomes a submodule."""
        if "processor" in self._modules and not isinstance(processor, nn.Module):
            del self._modules["processor"]
        self.processor = processor
        call = processor
        if isinstance(processor, nn.Module) and type(processor).__call__ is nn.Module.__call__:
            call = processor.forward
        self._accepted = frozenset(inspect.signature(call).parameters)

    def get_processor(self) -> Processor:
        return self.processor

    def set_attention_slice(self, slice_size: int | None) -> None:
        """Attend ``slice_size`` (item, head) pairs at a time; ``None`` for all at once.

        Raises:
            ValueError: more than there are heads.
        """
        if slice_size is not None and slice_size > self.sliceable_head_dim:
            raise ValueError(f"slice_size {slice_size} is more than the {self.sliceable_head_dim} heads there are")
        if slice_size is None:
            self.set_processor(self.default_processor())
        else:
            added = self.added_kv_proj_dim is not None
            self.set_processor((SlicedAttnAddedKVProcessor if added else SlicedAttnProcessor)(slice_size))

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **cross_attention_kwargs: Any,
    ) -> Tensor:
        """``(B, L, D)`` or ``(B, C, H, W)`` -> the same shape; context ``(B, S, D')``, mask added to the scores."""
        if cross_attention_kwargs:
            strange = [k for k in cross_attention_kwargs if k not in self._accepted and k != "ip_adapter_masks"]
            if strange and not torch.compiler.is_compiling():
                logger.warning("%s ignores the arguments %s", type(self.processor).__name__, strange)
            cross_attention_kwargs = {k: v for k, v in cross_attention_kwargs.items() if k in self._accepted}
        out: Tensor = self.processor(
            self,
            hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            attention_mask=attention_mask,
            **cross_attention_kwargs,
        )
        return out

    # -- what processors are made of -----------------------------------------------------------------

    def compute(self, x: Tensor, context: Tensor | None, mask: Tensor | None, scores: Processor) -> Tensor:
        """Norm, projections, ``scores(attn, q, k, v, mask)``, output projection, residual.

        ``q, k, v`` are ``(B, L, H, D)``, the mask ``(B, H, 1 or L, S)`` or ``None``.
        """
        residual = x
        if self.group_norm is not None and x.ndim == 4:
            x = self.group_norm(x)
        tokens = pixels.tokens(x).contiguous() if x.ndim == 4 else x  # (B, L, C)
        if self.group_norm is not None and x.ndim == 3:
            tokens = self.group_norm(tokens.transpose(1, 2)).transpose(1, 2)
        q, k, v = (t.unflatten(-1, (-1, self.inner_dim // self.heads)) for t in self.project(tokens, context))
        if self.norm_q is not None and self.norm_k is not None:
            q, k = self.norm_q(q), self.norm_k(k)
        if mask is not None:
            mask = self.prepare_attention_mask(mask, k.shape[1], x.shape[0])
            mask = mask.view(x.shape[0], self.heads, -1, mask.shape[-1])
        out = scores(self, q, k, v, mask).flatten(2).to(q.dtype)
        out = self.to_out[1](self.to_out[0](out))
        if x.ndim == 4:
            out = pixels.feature_map(out, x.shape[2:])
        if self.residual_connection:
            out = residual + out  # in this order the sum has the layout of the input
        return out if self.rescale_output_factor == 1.0 else out / self.rescale_output_factor

    def project(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each ``(B, L or S, H * D)``."""
        given = context is not None
        context = x if context is None else self.norm_encoder_hidden_states(context)
        if self.added_kv_proj_dim is not None:
            k, v = self.add_k_proj(context), self.add_v_proj(context)
            if not self.only_cross_attention:
                k, v = torch.cat([k, self.to_k(x)], dim=1), torch.cat([v, self.to_v(x)], dim=1)
            return self.to_q(x), k, v
        if self.is_cross_attention:
            k, v = project(self, context, "to_kv")
            return self.to_q(x), k, v
        q, k, v = project(self, x, "to_qkv")
        if given:
            _, k, v = project(self, context, "to_qkv")
        return q, k, v

    def norm_encoder_hidden_states(self, encoder_hidden_states: Tensor) -> Tensor:
        """The context after ``cross_attention_norm``, if there is one."""
        if isinstance(self.norm_cross, nn.GroupNorm):
            return self.norm_cross(encoder_hidden_states.transpose(1, 2)).transpose(1, 2)
        return encoder_hidden_states if self.norm_cross is None else self.norm_cross(encoder_hidden_states)

    def prepare_attention_mask(
        self, attention_mask: Tensor | None, target_length: int, batch_size: int, out_dim: int = 3
    ) -> Any:
        """Repeat ``(B, 1, S)`` for the heads: ``(B * H, 1, S)``, or ``(B, H, 1, S)`` with ``out_dim=4``.

        A mask that is shorter than the context is extended by zeros: what it does not mention is seen.
        """
        if attention_mask is None:
            return None
        if attention_mask.shape[-1] != target_length:
            attention_mask = F.pad(attention_mask, (0, target_length))
        if out_dim == 4:
            return attention_mask.unsqueeze(1).repeat_interleave(self.heads, dim=1)
        if attention_mask.shape[0] < batch_size * self.heads:
            attention_mask = attention_mask.repeat_interleave(self.heads, dim=0)
        return attention_mask

    def head_to_batch_dim(self, tensor: Tensor, out_dim: int = 3) -> Tensor:
        """``(B, L, H * D) -> (B * H, L, D)``, or ``(B, H, L, D)`` with ``out_dim=4``."""
        tensor = tensor.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return tensor.flatten(0, 1) if out_dim == 3 else tensor

    def batch_to_head_dim(self, tensor: Tensor) -> Tensor:
        """``(B * H, L, D) -> (B, L, H * D)``."""
        return tensor.unflatten(0, (-1, self.heads)).transpose(1, 2).flatten(2)

    def get_attention_scores(self, query: Tensor, key: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Softmax of the scaled and masked scores: ``(B * H, L, D), (B * H, S, D) -> (B * H, L, S)``."""
        dtype = query.dtype
        if self.upcast_attention:
            query, key = query.float(), key.float()
        beta = 0 if attention_mask is None else 1
        base = query.new_empty(1, 1, 1) if attention_mask is None else attention_mask
        scores = torch.baddbmm(base, query, key.transpose(-1, -2), beta=beta, alpha=self.scale)
        return (scores.float() if self.upcast_softmax else scores).softmax(dim=-1).to(dtype)


def _head_norm(kind: str | None, dim: int, eps: float) -> nn.Module | None:
    if kind not in (None, "layer_norm", "rms_norm"):
        raise ValueError(f"qk_norm {kind!r}: allowed are None, 'layer_norm' and 'rms_norm'")
    if kind is None:
        return None
    return nn.LayerNorm(dim, eps=eps) if kind == "layer_norm" else nn.RMSNorm(dim, eps=eps)


def _context_norm(kind: str | None, dim: int, groups: int) -> nn.Module | None:
    if kind not in (None, "layer_norm", "group_norm"):
        raise ValueError(f"cross_attention_norm {kind!r}: allowed are None, 'layer_norm' and 'group_norm'")
    if kind is None:
        return None
    return nn.LayerNorm(dim) if kind == "layer_norm" else nn.GroupNorm(groups, dim, eps=1e-5)


# -- processors ------------------------------------------------------------------------------------


class AttnProcessor2_0:
    """The default: scores by the attention dispatch, with the module's backend or the one in force."""

    backend: str | None = None

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        return attn.compute(hidden_states, encoder_hidden_states, attention_mask, self.scores)

    def scores(self, attn: Attention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """``softmax(q k^T) v``, all ``(B, L, H, D)``."""
        return attend(q, k, v, mask, is_causal=attn.is_causal, backend=self.backend or attn.attention_backend)


class AttnProcessor(AttnProcessor2_0):
    """Plain arithmetic: the whole matrix of scores, with the module's upcasting options."""

    def scores(self, attn: Attention, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # (B * H, L, D)
        if mask is not None:
            mask = mask.flatten(0, 1)
        out = torch.bmm(attn.get_attention_scores(q, k, mask), v)
        return out.unflatten(0, (-1, attn.heads)).transpose(1, 2)


class SlicedAttnProcessor(AttnProcessor2_0):
    """``slice_size`` (item, head) pairs at a time: less memory where scores are kept whole."""

    def __init__(self, slice_size: int) -> None:
        self.slice_size = slice_size
        self.backend = f"sliced:{slice_size}"


class XFormersAttnProcessor(AttnProcessor2_0):
    """Scores by xformers; ``attention_op`` is accepted for compatibility and must be ``None``."""

    backend = "xformers"

    def __init__(self, attention_op: Callable[..., Any] | None = None) -> None:
        if attention_op is not None:
            raise ValueError("xformers chooses its own kernel: attention_op must be None")
        self.attention_op = attention_op


class FusedAttnProcessor2_0(AttnProcessor2_0):
    """The default after ``fuse_qkv_projections``; the module itself knows which projections are fused."""


class AttnAddedKVProcessor2_0(AttnProcessor2_0):
    """The default for modules with ``added_kv_proj_dim``, whose input is always added to the result."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        out = super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask)
        return out if attn.residual_connection else hidden_states + out


class AttnAddedKVProcessor(AttnAddedKVProcessor2_0, AttnProcessor):
    """Plain arithmetic for modules with ``added_kv_proj_dim``."""


class SlicedAttnAddedKVProcessor(AttnAddedKVProcessor2_0, SlicedAttnProcessor):
    """Slices for modules with ``added_kv_proj_dim``."""


class XFormersAttnAddedKVProcessor(AttnAddedKVProcessor2_0, XFormersAttnProcessor):
    """Scores by xformers for modules with ``added_kv_proj_dim``."""


# what scripts ask `isinstance` with
ADDED_KV_ATTENTION_PROCESSORS = (
    AttnAddedKVProcessor,
    SlicedAttnAddedKVProcessor,
    AttnAddedKVProcessor2_0,
    XFormersAttnAddedKVProcessor,
)
CROSS_ATTENTION_PROCESSORS = (AttnProcessor, AttnProcessor2_0, XFormersAttnProcessor, SlicedAttnProcessor)


# -- models ------------------------------------------------------------------------------------------


class AttentionMixin:
    """Switches of a model whose attention modules have processors."""

    def _attentions(self) -> dict[str, Any]:
        assert isinstance(self, nn.Module)
        return {name: m for name, m in self.named_modules() if hasattr(m, "set_processor")}

    @property
    def attn_processors(self) -> dict[str, Processor]:
        """The processor of every attention module, under ``"path.to.the.module.processor"``."""
        return {f"{name}.processor": m.get_processor() for name, m in self._attentions().items()}

    def set_attn_processor(self, processor: Processor | dict[str, Processor]) -> None:
        """Use one processor everywhere, or one each, under the keys of :attr:`attn_processors`.

        Raises:
            ValueError: a dictionary that does not name every attention module exactly once.
        """
        modules = self._attentions()
        if isinstance(processor, dict):
            wanted = {f"{name}.processor" for name in modules}
            if set(processor) != wanted:
                raise ValueError(
                    f"{len(processor)} processors for {len(wanted)} attention modules; "
                    f"missing: {sorted(wanted - set(processor))}, unknown: {sorted(set(processor) - wanted)}"
                )
        for name, module in modules.items():
            module.set_processor(processor[f"{name}.processor"] if isinstance(processor, dict) else processor)

    def set_default_attn_processor(self) -> None:
        """Every attention module as it was when the model was built."""
        for module in self._attentions().values():
            module.set_processor(module.default_processor())

    def fuse_qkv_projections(self) -> None:
        """Compute queries, keys and values by one matrix product each."""
        for module in self._attentions().values():
            module.fuse_projections(fuse=True)

    def unfuse_qkv_projections(self) -> None:
        """Undo :meth:`fuse_qkv_projections`."""
        for module in self._attentions().values():
            module.fuse_projections(fuse=False)
