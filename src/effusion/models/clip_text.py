"""CLIP's text model (Radford et al., 2021), with the weights' names of ``transformers`` and without importing it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.config import register_to_config
from ..core.outputs import BaseOutput
from ..nn import checkpointing
from ..nn.dispatch import attend
from .base import ModelMixin

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


@dataclass
class TextModelOutput(BaseOutput):
    """``last_hidden_state`` (B, L, D), ``pooler_output`` (B, D); of every layer, if asked for, ``hidden_states`` and
    ``attentions`` (B, H, L, L).
    """

    last_hidden_state: Tensor
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class ProjectedTextModelOutput(BaseOutput):
    """``text_embeds`` (B, P), then as :class:`TextModelOutput`."""

    text_embeds: Tensor
    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class CLIPAttention(nn.Module):
    """Causal self-attention."""

    attention_backend: str | None = None

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.k_proj, self.v_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.q_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None, weights: list[Tensor] | None = None) -> Tensor:
        """``(B, L, D)``, mask (B, 1, L, L) of what is seen or ``None``; a list is given the weights (B, H, L, L)."""
        q, k, v = (
            p(x).unflatten(-1, (self.heads, -1)) for p in (self.q_proj, self.k_proj, self.v_proj)
        )  # (B, L, H, D)
        out = attend(q, k, v, mask, is_causal=mask is None, backend=self.attention_backend)
        if weights is not None:
            weights.append(_weights(q, k, mask))
        return self.out_proj(out.flatten(2))  # type: ignore[no-any-return]


def _weights(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    scores = torch.einsum("blhd,bshd->bhls", q, k) * q.shape[-1] ** -0.5
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril() if mask is None else mask
    return scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)


class CLIPMLP(nn.Module):
    """Two linear layers with an activation between."""

    def __init__(self, width: int, inner: int, activation: str) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))  # type: ignore[no-any-return]


class CLIPEncoderLayer(nn.Module):
    """Pre-norm transformer layer."""

    def __init__(self, width: int, inner: int, heads: int, activation: str, eps: float) -> None:
        super().__init__()
        self.self_attn = CLIPAttention(width, heads)
        self.layer_norm1 = nn.LayerNorm(width, eps=eps)
        self.mlp = CLIPMLP(width, inner, activation)
        self.layer_norm2 = nn.LayerNorm(width, eps=eps)

    def forward(self, x: Tensor, mask: Tensor | None, weights: list[Tensor] | None = None) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), mask, weights)
        return x + self.mlp(self.layer_norm2(x))  # type: ignore[no-any-return]


class CLIPEncoder(nn.Module):
    """The stack of layers."""

    def __init__(self, layers: int, *args: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(CLIPEncoderLayer(*args) for _ in range(layers))
        self.gradient_checkpointing = False

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None = None,
        causal_attention_mask: Tensor | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> TextModelOutput | tuple[Any, ...]:
        """Embeddings (B, L, D) through all layers.

        Masks are of what is seen, (B, 1, L, L) booleans, or added to the scores; tokens see those before them anyway.
        """
        mask = _seen(attention_mask, causal_attention_mask)
        x, states = inputs_embeds, [inputs_embeds]
        weights: list[Tensor] | None = [] if output_attentions else None
        for layer in self.layers:
            x = checkpointing.run(self, layer, x, mask, weights)
            states.append(x)
        kept = tuple(states) if output_hidden_states else None
        out = TextModelOutput(x, None, kept, None if weights is None else tuple(weights))
        return out if return_dict else out.to_tuple()


class CLIPTextEmbeddings(nn.Module):
    """Token plus learned position embeddings."""

    def __init__(self, vocabulary: int, width: int, positions: int) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.position_embedding = nn.Embedding(positions, width)

    def forward(
        self,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """(B, L) ids, or their embeddings (B, L, D), to (B, L, D)."""
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("give `input_ids` or `inputs_embeds`")
            length = input_ids.shape[-1]
        else:
            length = inputs_embeds.shape[-2]
        table = self.position_embedding
        if length > table.num_embeddings:
            raise ValueError(f"{length} tokens are more than the {table.num_embeddings} that this text model reads")
        where = table.weight[:length] if position_ids is None else table(position_ids)
        tokens = self.token_embedding(input_ids) if inputs_embeds is None else inputs_embeds
        return tokens + where  # type: ignore[no-any-return]


class _TextBase(ModelMixin):
    """What both text models share: files of the ``transformers`` format."""

    _library = "transformers"  # under which pipelines list it
    _weights_stem = "model"
    _key_prefixes = ("text_model.",)
    _saved_prefix: ClassVar[str] = ""
    _keys_to_ignore_on_load_unexpected = ["*position_ids"]
    _no_split_modules = ["CLIPEncoderLayer"]
    _repeated_blocks = ["CLIPEncoderLayer"]
    _supports_gradient_checkpointing = True

    @classmethod
    def _keep_unknown(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in config.items() if k not in cls._init_names()}

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Build from a configuration of ``transformers``; entries that mean nothing here are kept for saving."""
        extra = cls._keep_unknown(config)
        known = {k: v for k, v in config.items() if k not in extra}
        answer = super().from_config(known, return_unused_kwargs, **kwargs)
        model = answer[0] if isinstance(answer, tuple) else answer
        model.register_to_config(**{k: v for k, v in extra.items() if not k.startswith("_")})
        return answer

    def to_json_string(self) -> str:
        body = {k: v for k, v in self.config.items() if not k.startswith("_")}
        head = {"architectures": [type(self).__name__], "model_type": "clip_text_model"}
        dtype = str(self.dtype).removeprefix("torch.")
        return json.dumps({**body, **head, "torch_dtype": dtype, "dtype": dtype}, indent=2, sort_keys=True) + "\n"

    def _state_to_save(self) -> dict[str, Tensor]:
        return {self._saved_prefix + name: tensor for name, tensor in self.state_dict().items()}

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """:meth:`enable_gradient_checkpointing` under the name that ``transformers`` has."""
        options = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}

        def checkpoint(block: Any, *args: Any) -> Any:
            from torch.utils.checkpoint import checkpoint

            return checkpoint(block, *args, **options)

        self.enable_gradient_checkpointing(checkpoint)

    def gradient_checkpointing_disable(self) -> None:
        """Undo :meth:`gradient_checkpointing_enable`."""
        self.disable_gradient_checkpointing()

    def get_input_embeddings(self) -> nn.Embedding:
        """The table of token embeddings."""
        return self._embeddings().token_embedding

    def set_input_embeddings(self, table: nn.Embedding) -> None:
        self._embeddings().token_embedding = table

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Make room for added tokens: old rows stay, new ones are drawn around their mean spread."""
        old = self.get_input_embeddings()
        if new_num_tokens is None or new_num_tokens == old.num_embeddings:
            return old
        table = nn.Embedding(new_num_tokens, old.embedding_dim, device=old.weight.device, dtype=old.weight.dtype)
        with torch.no_grad():
            table.weight.normal_(std=0.02)
            rows = min(new_num_tokens, old.num_embeddings)
            table.weight[:rows] = old.weight[:rows]
        table.weight.requires_grad_(old.weight.requires_grad)
        self.set_input_embeddings(table)
        self.register_to_config(vocab_size=new_num_tokens)
        return table

    def _embeddings(self) -> CLIPTextEmbeddings:
        return getattr(self, "text_model", self).embeddings  # type: ignore[no-any-return]


class CLIPTextModel(_TextBase):
    """Tokens to hidden states, and the state of the end token."""

    _saved_prefix = "text_model."

    @register_to_config
    def __init__(
        self,
        vocab_size: int = 49408,
        hidden_size: int = 512,
        intermediate_size: int = 2048,
        projection_dim: int = 512,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 8,
        max_position_embeddings: int = 77,
        hidden_act: str = "quick_gelu",
        layer_norm_eps: float = 1e-5,
        pad_token_id: int = 1,
        bos_token_id: int = 49406,
        eos_token_id: int = 49407,
    ) -> None:
        super().__init__()
        if hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act {hidden_act!r} is unknown; known are {', '.join(ACTIVATIONS)}")
        self.embeddings = CLIPTextEmbeddings(vocab_size, hidden_size, max_position_embeddings)
        layer = (hidden_size, intermediate_size, num_attention_heads, hidden_act, layer_norm_eps)
        self.encoder = CLIPEncoder(num_hidden_layers, *layer)
        self.final_layer_norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)
        self.end = eos_token_id

    @property
    def text_model(self) -> CLIPTextModel:
        """Itself: scripts ask the inner model of older layouts for embeddings, encoder and the last norm."""
        return self

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> TextModelOutput | tuple[Any, ...]:
        """``input_ids`` (or ``inputs_embeds``) and ``attention_mask`` (B, L) to :class:`TextModelOutput`."""
        ids = None if input_ids is None else input_ids.view(-1, input_ids.shape[-1])
        x = self.embeddings(ids, position_ids, inputs_embeds)  # (B, L, D)
        found = self.encoder(
            x,
            _mask(attention_mask, x.shape[1]),
            output_attentions=bool(output_attentions),
            output_hidden_states=bool(output_hidden_states),
        )
        x = self.final_layer_norm(found.last_hidden_state)
        pooled = None if ids is None else self._pooled(x, ids)
        out = TextModelOutput(x, pooled, found.hidden_states, found.attentions)
        return out.to_tuple() if return_dict is False else out

    def _pooled(self, x: Tensor, ids: Tensor) -> Tensor:
        """The state of the end token, (B, D)."""
        rows = torch.arange(len(ids), device=ids.device)
        end = ids if self.end == 2 else ids == self.end  # configurations saved before 2023 say 2 and mean the largest
        return x[rows, end.to(torch.int).argmax(dim=-1)]


class CLIPTextModelWithProjection(_TextBase):
    """:class:`CLIPTextModel` and a projection of its pooled state."""

    @register_to_config
    def __init__(
        self,
        vocab_size: int = 49408,
        hidden_size: int = 512,
        intermediate_size: int = 2048,
        projection_dim: int = 512,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 8,
        max_position_embeddings: int = 77,
        hidden_act: str = "quick_gelu",
        layer_norm_eps: float = 1e-5,
        pad_token_id: int = 1,
        bos_token_id: int = 49406,
        eos_token_id: int = 49407,
    ) -> None:
        super().__init__()
        self.text_model = CLIPTextModel(
            vocab_size, hidden_size, intermediate_size, projection_dim, num_hidden_layers, num_attention_heads,
            max_position_embeddings, hidden_act, layer_norm_eps, pad_token_id, bos_token_id, eos_token_id,
        )  # fmt: skip
        self.text_projection = nn.Linear(hidden_size, projection_dim, bias=False)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> ProjectedTextModelOutput | tuple[Any, ...]:
        """``input_ids`` and ``attention_mask`` (B, L) to :class:`ProjectedTextModelOutput`."""
        found = self.text_model(input_ids, attention_mask, position_ids, output_attentions, output_hidden_states)
        embeds = self.text_projection(found.pooler_output)
        out = ProjectedTextModelOutput(embeds, found.last_hidden_state, found.hidden_states, found.attentions)
        return out.to_tuple() if return_dict is False else out


def _mask(attention_mask: Tensor | None, length: int) -> Tensor | None:
    """Causal and padding as one boolean mask (B, 1, L, L), or ``None`` where causality is all there is."""
    if attention_mask is None or bool(attention_mask.all()):
        return None
    causal = torch.ones(length, length, dtype=torch.bool, device=attention_mask.device).tril()
    return causal & attention_mask.to(torch.bool)[:, None, None, :]


def _seen(*masks: Tensor | None) -> Tensor | None:
    """Masks of any kind as one of booleans; ``None`` where causality is all there is."""
    given = [m if m.dtype == torch.bool else m > -1 for m in masks if m is not None]
    if not given:
        return None
    joint = given[0] if len(given) == 1 else given[0] & given[1]
    return joint & torch.ones(joint.shape[-2:], dtype=torch.bool, device=joint.device).tril()
