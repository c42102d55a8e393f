"""What UNets are conditioned on besides time and text tokens: pooled text, images, noise levels as Fourier features."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .embeddings import TimestepEmbedding, Timesteps


class GaussianFourierProjection(nn.Module):
    """Random Fourier features (Tancik et al., 2020; Song et al., 2021): ``(B,) -> (B, 2 * embedding_size)``."""

    def __init__(
        self, embedding_size: int, scale: float = 1.0, log: bool = True, flip_sin_to_cos: bool = False
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(embedding_size) * scale, requires_grad=False)
        self.log, self.flip_sin_to_cos = log, flip_sin_to_cos

    def forward(self, x: Tensor) -> Tensor:
        angles = (torch.log(x) if self.log else x)[:, None] * self.weight[None, :] * 2 * math.pi
        parts = (angles.sin(), angles.cos())
        return torch.cat(parts[::-1] if self.flip_sin_to_cos else parts, dim=-1)


class AttentionPooling(nn.Module):
    """One token that attends to itself and to all others: ``(B, L, D) -> (B, D)``."""

    def __init__(self, num_heads: int, embed_dim: int) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.randn(1, embed_dim) / embed_dim**0.5)
        self.k_proj = nn.Linear(embed_dim, embed_dim)
        self.q_proj = nn.Linear(embed_dim, embed_dim)
        self.v_proj = nn.Linear(embed_dim, embed_dim)
        self.num_heads = num_heads
        self.dim_per_head = embed_dim // num_heads

    def forward(self, x: Tensor) -> Tensor:
        token = x.mean(dim=1, keepdim=True) + self.positional_embedding.to(x.dtype)
        x = torch.cat([token, x], dim=1)
        q, k, v = (
            t.unflatten(-1, (-1, self.dim_per_head)).transpose(1, 2)
            for t in (self.q_proj(token), self.k_proj(x), self.v_proj(x))
        )  # (B, H, L, D)
        scale = self.dim_per_head**-0.25  # on both sides: half precision overflows otherwise
        weight = ((q * scale) @ (k * scale).transpose(-1, -2)).float().softmax(dim=-1).to(x.dtype)
        return (weight @ v).transpose(1, 2).flatten(1)


class TextTimeEmbedding(nn.Module):
    """Pooled text in the space of time embeddings: ``(B, L, D) -> (B, time_embed_dim)``."""

    def __init__(self, encoder_dim: int, time_embed_dim: int, num_heads: int = 64) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(encoder_dim)
        self.pool = AttentionPooling(num_heads, encoder_dim)
        self.proj = nn.Linear(encoder_dim, time_embed_dim)
        self.norm2 = nn.LayerNorm(time_embed_dim)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.norm2(self.proj(self.pool(self.norm1(hidden_states))))  # type: ignore[no-any-return]


class TextImageTimeEmbedding(nn.Module):
    """Pooled text plus an image embedding: ``(B, D), (B, D') -> (B, time_embed_dim)`` (Kandinsky 2.1)."""

    def __init__(self, text_embed_dim: int, image_embed_dim: int, time_embed_dim: int) -> None:
        super().__init__()
        self.text_proj = nn.Linear(text_embed_dim, time_embed_dim)
        self.text_norm = nn.LayerNorm(time_embed_dim)
        self.image_proj = nn.Linear(image_embed_dim, time_embed_dim)

    def forward(self, text_embeds: Tensor, image_embeds: Tensor) -> Tensor:
        return self.image_proj(image_embeds) + self.text_norm(self.text_proj(text_embeds))  # type: ignore[no-any-return]


class ImageTimeEmbedding(nn.Module):
    """An image embedding in the space of time embeddings: ``(B, D) -> (B, time_embed_dim)`` (Kandinsky 2.2)."""

    def __init__(self, image_embed_dim: int, time_embed_dim: int) -> None:
        super().__init__()
        self.image_proj = nn.Linear(image_embed_dim, time_embed_dim)
        self.image_norm = nn.LayerNorm(time_embed_dim)

    def forward(self, image_embeds: Tensor) -> Tensor:
        return self.image_norm(self.image_proj(image_embeds))  # type: ignore[no-any-return]


class TextImageProjection(nn.Module):
    """An image embedding as tokens before the text's: ``(B, L, D), (B, D') -> (B, n + L, cross_attention_dim)``."""

    def __init__(
        self, text_embed_dim: int, image_embed_dim: int, cross_attention_dim: int, num_image_text_embeds: int = 10
    ) -> None:
        super().__init__()
        self.num_image_text_embeds = num_image_text_embeds
        self.image_embeds = nn.Linear(image_embed_dim, num_image_text_embeds * cross_attention_dim)
        self.text_proj = nn.Linear(text_embed_dim, cross_attention_dim)

    def forward(self, text_embeds: Tensor, image_embeds: Tensor) -> Tensor:
        image = self.image_embeds(image_embeds).unflatten(-1, (self.num_image_text_embeds, -1))
        return torch.cat([image, self.text_proj(text_embeds)], dim=1)


class ImageProjection(nn.Module):
    """An image embedding as tokens: ``(B, D) -> (B, n, cross_attention_dim)``."""

    def __init__(self, image_embed_dim: int, cross_attention_dim: int, num_image_text_embeds: int = 32) -> None:
        super().__init__()
        self.num_image_text_embeds = num_image_text_embeds
        self.image_embeds = nn.Linear(image_embed_dim, num_image_text_embeds * cross_attention_dim)
        self.norm = nn.LayerNorm(cross_attention_dim)

    def forward(self, image_embeds: Tensor) -> Tensor:
        image_embeds = image_embeds.to(self.image_embeds.weight.dtype)
        return self.norm(self.image_embeds(image_embeds).unflatten(-1, (self.num_image_text_embeds, -1)))  # type: ignore[no-any-return]


class ImageHintTimeEmbedding(nn.Module):
    """An image embedding, and a picture shrunk to four more channels of the input (Kandinsky 2.2 controls)."""

    def __init__(self, image_embed_dim: int, time_embed_dim: int) -> None:
        super().__init__()
        self.image_proj = nn.Linear(image_embed_dim, time_embed_dim)
        self.image_norm = nn.LayerNorm(time_embed_dim)
        widths = [
            (3, 16, 1),
            (16, 16, 1),
            (16, 32, 2),
            (32, 32, 1),
            (32, 96, 2),
            (96, 96, 1),
            (96, 256, 2),
            (256, 4, 1),
        ]
        layers = [m for i, o, stride in widths for m in (nn.Conv2d(i, o, 3, stride, padding=1), nn.SiLU())]
        self.input_hint_block = nn.Sequential(*layers[:-1])

    def forward(self, image_embeds: Tensor, hint: Tensor) -> tuple[Tensor, Tensor]:
        """``(B, D), (B, 3, 8 H, 8 W) -> (B, time_embed_dim), (B, 4, H, W)``."""
        return self.image_norm(self.image_proj(image_embeds)), self.input_hint_block(hint)


class ConditioningMixin:
    """Builds and computes the one embedding that all residual blocks of a UNet (or ControlNet) are given.

    It is the sum of the time's, the class's, and what ``addition_embed_type`` says; the text tokens may
    pass a projection (``encoder_hid_dim_type``) on their way.

    Attributes:
        encoder_hid_dim_type: who replaces ``encoder_hid_proj`` by image projections sets it to
            ``"ip_image_proj"``: the context is then the pair of text tokens and projected images.
        text_encoder_hid_proj: projection of the text tokens in that case, if there is one.
    """

    encoder_hid_dim_type: str | None
    text_encoder_hid_proj: nn.Module | None = None

    def _build_time(
        self,
        kind: str,
        width: int,
        dim: int | None,
        flip: bool,
        shift: int,
        act_fn: str,
        post_act: str | None,
        cond: int | None,
    ) -> tuple[int, int]:
        """``time_proj`` and ``time_embedding``; the widths of the embedding and of its input."""
        if kind == "fourier":
            time_dim = dim or width * 2
            if time_dim % 2:
                raise ValueError(f"time_embedding_dim must be even for time_embedding_type='fourier', not {time_dim}")
            input_dim = time_dim
            self.time_proj: nn.Module = GaussianFourierProjection(time_dim // 2, log=False, flip_sin_to_cos=flip)
        elif kind == "positional":
            time_dim, input_dim = dim or width * 4, width
            self.time_proj = Timesteps(width, flip, shift)
        else:
            raise ValueError(f"time_embedding_type {kind!r} is not supported; there are 'positional' and 'fourier'")
        self.time_embedding = TimestepEmbedding(input_dim, time_dim, act_fn, post_act_fn=post_act, cond_proj_dim=cond)
        return time_dim, input_dim

    def _build_class(
        self, kind: str | None, classes: int | None, width: int | None, act_fn: str, time_dim: int, input_dim: int
    ) -> None:
        """``class_embedding``, or ``None``."""
        if kind in ("projection", "simple_projection") and width is None:
            raise ValueError(f"class_embed_type {kind!r} needs projection_class_embeddings_input_dim")
        self.class_embed_type = kind
        self.class_embedding: nn.Module | None = None
        if kind is None and classes is not None:
            self.class_embedding = nn.Embedding(classes, time_dim)
        elif kind == "timestep":
            self.class_embedding = TimestepEmbedding(input_dim, time_dim, act_fn)
        elif kind == "identity":
            self.class_embedding = nn.Identity()
        elif kind == "projection":
            self.class_embedding = TimestepEmbedding(width, time_dim)  # type: ignore[arg-type]
        elif kind == "simple_projection":
            self.class_embedding = nn.Linear(width, time_dim)  # type: ignore[arg-type]
        elif kind is not None:
            allowed = "None, 'timestep', 'identity', 'projection' and 'simple_projection'"
            raise ValueError(f"class_embed_type {kind!r} is not supported; there are {allowed}")

    def _build_addition(
        self,
        kind: str | None,
        time_dim: int,
        hid_dim: int | None,
        cross_dim: int,
        width: int | None,
        ids_dim: int | None,
        heads: int,
        flip: bool,
        shift: int,
    ) -> None:
        """``add_embedding`` (and ``add_time_proj``), or ``None``."""
        needs = {"text_time": (width, ids_dim), "image": (hid_dim,), "image_hint": (hid_dim,)}.get(kind or "", ())
        if any(n is None for n in needs):
            names = "projection_class_embeddings_input_dim and addition_time_embed_dim"
            raise ValueError(
                f"addition_embed_type {kind!r} needs {names if kind == 'text_time' else 'encoder_hid_dim'}"
            )
        self.addition_embed_type = kind
        if kind is None:
            return
        if kind == "text":
            self.add_embedding: nn.Module = TextTimeEmbedding(hid_dim or cross_dim, time_dim, heads)
        elif kind == "text_image":
            self.add_embedding = TextImageTimeEmbedding(cross_dim, cross_dim, time_dim)
        elif kind == "text_time":
            self.add_time_proj = Timesteps(ids_dim, flip, shift)  # type: ignore[arg-type]
            self.add_embedding = TimestepEmbedding(width, time_dim)  # type: ignore[arg-type]
        elif kind == "image":
            self.add_embedding = ImageTimeEmbedding(hid_dim, time_dim)  # type: ignore[arg-type]
        elif kind == "image_hint":
            self.add_embedding = ImageHintTimeEmbedding(hid_dim, time_dim)  # type: ignore[arg-type]
        else:
            allowed = "None, 'text', 'text_image', 'text_time', 'image' and 'image_hint'"
            raise ValueError(f"addition_embed_type {kind!r} is not supported; there are {allowed}")

    def _build_context(self, kind: str | None, hid_dim: int | None, cross_dim: int) -> str | None:
        """``encoder_hid_proj``, or ``None``; the kind that it is."""
        kind = "text_proj" if kind is None and hid_dim is not None else kind
        if hid_dim is None and kind is not None:
            raise ValueError(f"encoder_hid_dim_type {kind!r} needs encoder_hid_dim")
        self.encoder_hid_dim_type = kind
        self.encoder_hid_proj: nn.Module | None = None
        if kind == "text_proj":
            self.encoder_hid_proj = nn.Linear(hid_dim, cross_dim)  # type: ignore[arg-type]
        elif kind == "text_image_proj":
            self.encoder_hid_proj = TextImageProjection(hid_dim, cross_dim, cross_dim)  # type: ignore[arg-type]
        elif kind == "image_proj":
            self.encoder_hid_proj = ImageProjection(hid_dim, cross_dim)  # type: ignore[arg-type]
        elif kind is not None:
            allowed = "None, 'text_proj', 'text_image_proj' and 'image_proj'"
            raise ValueError(f"encoder_hid_dim_type {kind!r} is not supported; there are {allowed}")
        return kind

    # -- computing -----------------------------------------------------------------------------------

    def get_time_embed(self, sample: Tensor, timestep: Tensor | float | int) -> Tensor:
        """Features of the time, ``(B, D)``, in the dtype of ``sample (B, …)``; one time for all or one each."""
        if not isinstance(timestep, Tensor):
            timestep = torch.tensor(
                timestep, dtype=torch.float64 if isinstance(timestep, float) else torch.int64, device=sample.device
            )
        return self.time_proj(timestep.to(sample.device).expand(sample.shape[0])).to(sample.dtype)  # type: ignore[no-any-return]

    def get_class_embed(self, sample: Tensor, class_labels: Tensor | None) -> Tensor | None:
        """Embedding of the class labels, ``(B, D)``, or ``None`` for a network without classes."""
        if self.class_embedding is None:
            return None
        if class_labels is None:
            raise ValueError("this network is conditioned on classes: give class_labels")
        if self.class_embed_type == "timestep":
            class_labels = self.time_proj(class_labels).to(sample.dtype)
        return self.class_embedding(class_labels).to(sample.dtype)  # type: ignore[no-any-return]

    def get_aug_embed(
        self, emb: Tensor, encoder_hidden_states: Any, added_cond_kwargs: Mapping[str, Tensor] | None
    ) -> Any:
        """What ``addition_embed_type`` adds, ``(B, D)``, or ``None``; with ``image_hint`` also the shrunk hint."""
        kind, given = self.addition_embed_type, added_cond_kwargs or {}
        if kind is None:
            return None
        if kind == "text":
            return self.add_embedding(encoder_hidden_states)
        need = {"text_time": ("text_embeds", "time_ids"), "image_hint": ("image_embeds", "hint")}
        _demand(given, *need.get(kind, ("image_embeds",)), why=f"addition_embed_type={kind!r}")
        if kind == "text_image":
            return self.add_embedding(given.get("text_embeds", encoder_hidden_states), given["image_embeds"])
        if kind == "text_time":
            ids = self.add_time_proj(given["time_ids"].flatten()).reshape(given["text_embeds"].shape[0], -1)
            return self.add_embedding(torch.cat([given["text_embeds"], ids], dim=-1).to(emb.dtype))
        return self.add_embedding(given["image_embeds"], *([given["hint"]] if kind == "image_hint" else []))

    def process_encoder_hidden_states(
        self, encoder_hidden_states: Any, added_cond_kwargs: Mapping[str, Tensor] | None
    ) -> Any:
        """The context that attention is given: text tokens, projected, and image tokens."""
        kind, given = self.encoder_hid_dim_type, added_cond_kwargs or {}
        if self.encoder_hid_proj is None or kind is None:
            return encoder_hidden_states
        if kind == "text_proj":
            return self.encoder_hid_proj(encoder_hidden_states)
        _demand(given, "image_embeds", why=f"encoder_hid_dim_type={kind!r}")
        if kind == "text_image_proj":
            return self.encoder_hid_proj(encoder_hidden_states, given["image_embeds"])
        if kind == "image_proj":
            return self.encoder_hid_proj(given["image_embeds"])
        if self.text_encoder_hid_proj is not None:
            encoder_hidden_states = self.text_encoder_hid_proj(encoder_hidden_states)
        return encoder_hidden_states, self.encoder_hid_proj(given["image_embeds"])


def _demand(given: Mapping[str, Tensor], *names: str, why: str) -> None:
    missing = [n for n in names if n not in given]
    if missing:
        raise ValueError(
            f"a network with {why} needs {', '.join(missing)} in added_cond_kwargs, which has {sorted(given)}"
        )
