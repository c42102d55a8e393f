"""The original layouts of FLUX.1 (Black Forest Labs, 2024) and Stable Diffusion 3 (Esser et al., 2024)."""

from __future__ import annotations

from typing import Any

from .infer import Shapes, count
from .table import Row


def _fused(theirs: str, ours: tuple[str, ...], parts: tuple[int, ...] = ()) -> tuple[Row, ...]:
    """Weight and bias of one linear layer there that is several here."""
    kinds = ("weight", "bias")
    return tuple(Row(f"{theirs}.{k}", tuple(f"{n}.{k}" for n in ours), parts=parts) for k in kinds)


_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
_ADDED = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")

FLUX_DOUBLE = (
    Row("img_mod.lin.", "norm1.linear."),
    Row("txt_mod.lin.", "norm1_context.linear."),
    *_fused("img_attn.qkv", _QKV),
    *_fused("txt_attn.qkv", _ADDED),
    Row("img_attn.norm.query_norm.scale", "attn.norm_q.weight"),
    Row("img_attn.norm.key_norm.scale", "attn.norm_k.weight"),
    Row("txt_attn.norm.query_norm.scale", "attn.norm_added_q.weight"),
    Row("txt_attn.norm.key_norm.scale", "attn.norm_added_k.weight"),
    Row("img_attn.proj.", "attn.to_out.0."),
    Row("txt_attn.proj.", "attn.to_add_out."),
    Row("img_mlp.0.", "ff.net.0.proj."),
    Row("img_mlp.2.", "ff.net.2."),
    Row("txt_mlp.0.", "ff_context.net.0.proj."),
    Row("txt_mlp.2.", "ff_context.net.2."),
)
FLUX_SINGLE = (
    Row("modulation.lin.", "norm.linear."),
    *_fused("linear1", (*_QKV, "proj_mlp"), (1, 1, 1, 4)),
    Row("linear2.", "proj_out."),
    Row("norm.query_norm.scale", "attn.norm_q.weight"),
    Row("norm.key_norm.scale", "attn.norm_k.weight"),
)
_TEXT = "time_text_embed."
FLUX = (
    Row("double_blocks.{}.", "transformer_blocks.{}.", FLUX_DOUBLE),
    Row("single_blocks.{}.", "single_transformer_blocks.{}.", FLUX_SINGLE),
    Row("img_in.", "x_embedder."),
    Row("txt_in.", "context_embedder."),
    Row("time_in.in_layer.", f"{_TEXT}timestep_embedder.linear_1."),
    Row("time_in.out_layer.", f"{_TEXT}timestep_embedder.linear_2."),
    Row("guidance_in.in_layer.", f"{_TEXT}guidance_embedder.linear_1."),
    Row("guidance_in.out_layer.", f"{_TEXT}guidance_embedder.linear_2."),
    Row("vector_in.in_layer.", f"{_TEXT}text_embedder.linear_1."),
    Row("vector_in.out_layer.", f"{_TEXT}text_embedder.linear_2."),
    Row("final_layer.linear.", "proj_out."),
    Row("final_layer.adaLN_modulation.1.", "norm_out.linear.", op="swap halves"),
)


def flux(shapes: Shapes) -> dict[str, Any]:
    """Configuration of a ``FluxTransformer2DModel`` in the original layout, names without prefix."""
    width, channels = shapes["img_in.weight"]
    head = shapes["double_blocks.0.img_attn.norm.query_norm.scale"][0]
    out = shapes["final_layer.linear.weight"][0]
    return {
        "patch_size": 1,
        "in_channels": channels,
        "out_channels": None if out == channels else out,
        "num_layers": count(shapes, "double_blocks.{}."),
        "num_single_layers": count(shapes, "single_blocks.{}."),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": shapes["txt_in.weight"][1],
        "pooled_projection_dim": shapes["vector_in.in_layer.weight"][1],
        "guidance_embeds": "guidance_in.in_layer.weight" in shapes,
        # an eighth of a head for the index, the rest in equal parts for the two axes: (16, 56, 56) of 128
        "axes_dims_rope": [head // 8, (head - head // 8) // 2, (head - head // 8) // 2],
    }


def _sd3_half(theirs: str, names: tuple[str, ...], norms: tuple[str, str], out: str, ff: str) -> tuple[Row, ...]:
    return (
        *_fused(f"{theirs}.attn.qkv", names),
        Row(f"{theirs}.attn.ln_q.weight", norms[0]),
        Row(f"{theirs}.attn.ln_k.weight", norms[1]),
        Row(f"{theirs}.attn.proj.", out),
        Row(f"{theirs}.mlp.fc1.", f"{ff}.net.0.proj."),
        Row(f"{theirs}.mlp.fc2.", f"{ff}.net.2."),
    )


SD3_BLOCK = (
    Row("x_block.adaLN_modulation.1.", "norm1.linear."),
    Row("context_block.adaLN_modulation.1.", "norm1_context.linear."),
    *_sd3_half("x_block", _QKV, ("attn.norm_q.weight", "attn.norm_k.weight"), "attn.to_out.0.", "ff"),
    *_sd3_half(
        "context_block",
        _ADDED,
        ("attn.norm_added_q.weight", "attn.norm_added_k.weight"),
        "attn.to_add_out.",
        "ff_context",
    ),
    *_fused("x_block.attn2.qkv", ("attn2.to_q", "attn2.to_k", "attn2.to_v")),
    Row("x_block.attn2.ln_q.weight", "attn2.norm_q.weight"),
    Row("x_block.attn2.ln_k.weight", "attn2.norm_k.weight"),
    Row("x_block.attn2.proj.", "attn2.to_out.0."),
)


def sd3_table(blocks: int) -> tuple[Row, ...]:
    """The transformer of Stable Diffusion 3; below ``model.diffusion_model.`` in files.

    In the last block the context only gives keys and values, and its modulation is shift and scale
    there, scale and shift here.
    """
    last = f"joint_blocks.{blocks - 1}.context_block.adaLN_modulation.1."
    return (
        Row(last, f"transformer_blocks.{blocks - 1}.norm1_context.linear.", op="swap halves"),
        Row("joint_blocks.{}.", "transformer_blocks.{}.", SD3_BLOCK),
        Row("x_embedder.proj.", "pos_embed.proj."),
        Row("pos_embed", "pos_embed.pos_embed"),
        Row("context_embedder.", "context_embedder."),
        Row("t_embedder.mlp.0.", f"{_TEXT}timestep_embedder.linear_1."),
        Row("t_embedder.mlp.2.", f"{_TEXT}timestep_embedder.linear_2."),
        Row("y_embedder.mlp.0.", f"{_TEXT}text_embedder.linear_1."),
        Row("y_embedder.mlp.2.", f"{_TEXT}text_embedder.linear_2."),
        Row("final_layer.linear.", "proj_out."),
        Row("final_layer.adaLN_modulation.1.", "norm_out.linear.", op="swap halves"),
    )


def sd3(shapes: Shapes) -> dict[str, Any]:
    """Configuration of an ``SD3Transformer2DModel`` in the original layout, names without prefix."""
    width, channels, patch, _ = shapes["x_embedder.proj.weight"]
    blocks = count(shapes, "joint_blocks.{}.")
    normed = shapes.get("joint_blocks.0.x_block.attn.ln_q.weight")
    head = normed[0] if normed else 64
    dual = [i for i in range(blocks) if f"joint_blocks.{i}.x_block.attn2.qkv.weight" in shapes]
    return {
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": shapes["final_layer.linear.weight"][0] // patch**2,
        "num_layers": blocks,
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": shapes["context_embedder.weight"][1],
        "caption_projection_dim": shapes["context_embedder.weight"][0],
        "pooled_projection_dim": shapes["y_embedder.mlp.0.weight"][1],
        "pos_embed_max_size": round(shapes["pos_embed"][1] ** 0.5),
        "dual_attention_layers": dual,
        "qk_norm": "rms_norm" if normed else None,
        "sample_size": 128,
    }
