"""Embeddings of timesteps, guidance, labels, sizes and pooled text: all that is small and conditions a network."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .feed_forward import activation


def get_timestep_embedding(
    timesteps: Tensor,
    embedding_dim: int,
    flip_sin_to_cos: bool = False,
    downscale_freq_shift: float = 1,
    scale: float = 1,
    max_period: int = 10000,
) -> Tensor:
    """Sinusoidal embedding (Vaswani et al., 2017; Ho et al., 2020): ``(B,) -> (B, embedding_dim)`` in float32."""
    if timesteps.ndim != 1:
        raise ValueError(f"timesteps must have one dimension (B,), not the shape {tuple(timesteps.shape)}")
    half = embedding_dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    freqs = torch.exp(-math.log(max_period) * steps / (half - downscale_freq_shift))
    angles = scale * (timesteps[:, None].float() * freqs[None, :])
    parts = (angles.cos(), angles.sin()) if flip_sin_to_cos else (angles.sin(), angles.cos())
    emb = torch.cat(parts, dim=-1)
    return nn.functional.pad(emb, (0, 1)) if embedding_dim % 2 else emb


class Timesteps(nn.Module):
    """:func:`get_timestep_embedding` as a module without parameters."""

    def __init__(self, num_channels: int, flip_sin_to_cos: bool, downscale_freq_shift: float, scale: float = 1) -> None:
        super().__init__()
        self.num_channels = num_channels
        self.flip_sin_to_cos = flip_sin_to_cos
        self.downscale_freq_shift = downscale_freq_shift
        self.scale = scale

    def forward(self, timesteps: Tensor) -> Tensor:
        return get_timestep_embedding(
            timesteps, self.num_channels, self.flip_sin_to_cos, self.downscale_freq_shift, self.scale
        )


class TimestepEmbedding(nn.Module):
    """Two-layer perceptron over a sinusoidal embedding: ``(B, in_channels) -> (B, out_dim or time_embed_dim)``."""

    def __init__(
        self,
        in_channels: int,
        time_embed_dim: int,
        act_fn: str = "silu",
        out_dim: int | None = None,
        post_act_fn: str | None = None,
        cond_proj_dim: int | None = None,
        sample_proj_bias: bool = True,
    ) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, time_embed_dim, sample_proj_bias)
        self.cond_proj = None if cond_proj_dim is None else nn.Linear(cond_proj_dim, in_channels, bias=False)
        self.act = activation(act_fn)
        self.linear_2 = nn.Linear(time_embed_dim, out_dim or time_embed_dim, sample_proj_bias)
        self.post_act = None if post_act_fn is None else activation(post_act_fn)

    def forward(self, sample: Tensor, condition: Tensor | None = None) -> Tensor:
        if condition is not None and self.cond_proj is not None:
            sample = sample + self.cond_proj(condition)
        sample = self.linear_2(self.act(self.linear_1(sample)))
        return sample if self.post_act is None else self.post_act(sample)


class PixArtAlphaTextProjection(nn.Module):
    """Two-layer perceptron over text features (Chen et al., 2023): ``(…, in_features) -> (…, out_features)``."""

    def __init__(
        self, in_features: int, hidden_size: int, out_features: int | None = None, act_fn: str = "gelu_tanh"
    ) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_features, hidden_size)
        self.act_1 = nn.GELU(approximate="tanh") if act_fn == "gelu_tanh" else activation(act_fn)
        self.linear_2 = nn.Linear(hidden_size, out_features or hidden_size)

    def forward(self, caption: Tensor) -> Tensor:
        return self.linear_2(self.act_1(self.linear_1(caption)))  # type: ignore[no-any-return]


class CombinedTimestepTextProjEmbeddings(nn.Module):
    """Timestep plus pooled text, ``(B, embedding_dim)``."""

    def __init__(self, embedding_dim: int, pooled_projection_dim: int) -> None:
        super().__init__()
        self.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.timestep_embedder = TimestepEmbedding(256, embedding_dim)
        self.text_embedder = PixArtAlphaTextProjection(pooled_projection_dim, embedding_dim, act_fn="silu")

    def forward(self, timestep: Tensor, pooled_projection: Tensor) -> Tensor:
        time = self.timestep_embedder(self.time_proj(timestep).to(pooled_projection.dtype))
        return time + self.text_embedder(pooled_projection)  # type: ignore[no-any-return]


class CombinedTimestepGuidanceTextProjEmbeddings(CombinedTimestepTextProjEmbeddings):
    """Timestep plus distilled guidance (Meng et al., 2023) plus pooled text, ``(B, embedding_dim)``."""

    def __init__(self, embedding_dim: int, pooled_projection_dim: int) -> None:
        super().__init__(embedding_dim, pooled_projection_dim)
        self.guidance_embedder = TimestepEmbedding(256, embedding_dim)

    def forward(  # type: ignore[override]
        self, timestep: Tensor, guidance: Tensor, pooled_projection: Tensor
    ) -> Tensor:
        dtype = pooled_projection.dtype
        time = self.timestep_embedder(self.time_proj(timestep).to(dtype))
        strength = self.guidance_embedder(self.time_proj(guidance).to(dtype))
        return time + strength + self.text_embedder(pooled_projection)  # type: ignore[no-any-return]


class PixArtAlphaCombinedTimestepSizeEmbeddings(nn.Module):
    """Timestep, and if wanted the micro-conditions resolution and aspect ratio, ``(B, embedding_dim)``."""

    def __init__(self, embedding_dim: int, size_emb_dim: int, use_additional_conditions: bool = False) -> None:
        super().__init__()
        self.outdim = size_emb_dim
        self.use_additional_conditions = use_additional_conditions
        self.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.timestep_embedder = TimestepEmbedding(256, embedding_dim)
        if use_additional_conditions:
            self.additional_condition_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
            self.resolution_embedder = TimestepEmbedding(256, size_emb_dim)
            self.aspect_ratio_embedder = TimestepEmbedding(256, size_emb_dim)

    def forward(
        self,
        timestep: Tensor,
        resolution: Tensor | None,
        aspect_ratio: Tensor | None,
        batch_size: int,
        hidden_dtype: torch.dtype | None,
    ) -> Tensor:
        time: Tensor = self.timestep_embedder(self.time_proj(timestep).to(dtype=hidden_dtype))
        if not self.use_additional_conditions:
            return time
        if resolution is None or aspect_ratio is None:
            raise ValueError("this network is conditioned on `resolution` and `aspect_ratio`; give both")
        size, ratio = (self.additional_condition_proj(v.flatten()).to(hidden_dtype) for v in (resolution, aspect_ratio))
        size = self.resolution_embedder(size).reshape(batch_size, -1)
        ratio = self.aspect_ratio_embedder(ratio).reshape(batch_size, -1)
        return time + torch.cat([size, ratio], dim=1)


class LabelEmbedding(nn.Module):
    """Class labels, with a last row for "no class" when labels are dropped for guidance (Ho & Salimans, 2022)."""

    def __init__(self, num_classes: int, hidden_size: int, dropout_prob: float) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), hidden_size)
        self.num_classes = num_classes
        self.dropout_prob = dropout_prob

    def forward(self, labels: Tensor, force_drop_ids: Tensor | None = None) -> Tensor:
        if force_drop_ids is not None:
            labels = torch.where(torch.as_tensor(force_drop_ids, device=labels.device) == 1, self.num_classes, labels)
        elif self.training and self.dropout_prob > 0:
            drop = torch.rand(labels.shape[0], device=labels.device) < self.dropout_prob
            labels = torch.where(drop, self.num_classes, labels)
        return self.embedding_table(labels)  # type: ignore[no-any-return]


class CombinedTimestepLabelEmbeddings(nn.Module):
    """Timestep plus class label (Peebles & Xie, 2022), ``(B, embedding_dim)``."""

    def __init__(self, num_classes: int, embedding_dim: int, class_dropout_prob: float = 0.1) -> None:
        super().__init__()
        self.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=1)
        self.timestep_embedder = TimestepEmbedding(256, embedding_dim)
        self.class_embedder = LabelEmbedding(num_classes, embedding_dim, class_dropout_prob)

    def forward(self, timestep: Tensor, class_labels: Tensor, hidden_dtype: torch.dtype | None = None) -> Tensor:
        time = self.timestep_embedder(self.time_proj(timestep).to(dtype=hidden_dtype))
        return time + self.class_embedder(class_labels)  # type: ignore[no-any-return]
