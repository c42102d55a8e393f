"""The original layout of PixArt-alpha and PixArt-sigma (Chen et al., 2023 and 2024)."""

from __future__ import annotations

from typing import Any

from .infer import Shapes, count
from .table import Row

_QKV = ("attn1.to_q", "attn1.to_k", "attn1.to_v")
_KV = ("attn2.to_k", "attn2.to_v")
_TIME = "adaln_single.emb."

BLOCK = (
    Row("scale_shift_table", "scale_shift_table"),
    Row("attn.qkv.weight", tuple(f"{n}.weight" for n in _QKV)),
    Row("attn.qkv.bias", tuple(f"{n}.bias" for n in _QKV)),
    Row("attn.proj.", "attn1.to_out.0."),
    Row("cross_attn.q_linear.", "attn2.to_q."),
    Row("cross_attn.kv_linear.weight", tuple(f"{n}.weight" for n in _KV)),
    Row("cross_attn.kv_linear.bias", tuple(f"{n}.bias" for n in _KV)),
    Row("cross_attn.proj.", "attn2.to_out.0."),
    Row("mlp.fc1.", "ff.net.0.proj."),
    Row("mlp.fc2.", "ff.net.2."),
)
# Two tensors of the original have no place here: `pos_embed` is computed, and `y_embedder.y_embedding`, the caption
# that stands for none, was replaced in the ecosystem by the encoding of an empty prompt.
PIXART = (
    Row("blocks.{}.", "transformer_blocks.{}.", BLOCK),
    Row("x_embedder.proj.", "pos_embed.proj."),
    Row("t_embedder.mlp.0.", f"{_TIME}timestep_embedder.linear_1."),
    Row("t_embedder.mlp.2.", f"{_TIME}timestep_embedder.linear_2."),
    Row("csize_embedder.mlp.0.", f"{_TIME}resolution_embedder.linear_1."),
    Row("csize_embedder.mlp.2.", f"{_TIME}resolution_embedder.linear_2."),
    Row("ar_embedder.mlp.0.", f"{_TIME}aspect_ratio_embedder.linear_1."),
    Row("ar_embedder.mlp.2.", f"{_TIME}aspect_ratio_embedder.linear_2."),
    Row("t_block.1.", "adaln_single.linear."),
    Row("y_embedder.y_proj.fc1.", "caption_projection.linear_1."),
    Row("y_embedder.y_proj.fc2.", "caption_projection.linear_2."),
    Row("final_layer.scale_shift_table", "scale_shift_table"),
    Row("final_layer.linear.", "proj_out."),
)


def pixart(shapes: Shapes) -> dict[str, Any]:
    """Configuration of a ``PixArtTransformer2DModel`` in the original layout, names without prefix."""
    width, channels, patch, _ = shapes["x_embedder.proj.weight"]
    heads = 16 if width % 16 == 0 else 1  # in all that were published
    sizes = "csize_embedder.mlp.0.weight" in shapes
    positions = shapes.get("pos_embed")
    side = round(positions[1] ** 0.5) * patch if positions else 128
    return {
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "in_channels": channels,
        "out_channels": shapes["final_layer.linear.weight"][0] // patch**2,
        "num_layers": count(shapes, "blocks.{}."),
        "cross_attention_dim": width,
        "attention_bias": True,
        "sample_size": 128 if sizes else side,
        "patch_size": patch,
        "caption_channels": shapes["y_embedder.y_proj.fc1.weight"][1],
        "use_additional_conditions": sizes,
    }
