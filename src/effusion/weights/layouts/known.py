"""Which original layout a network has, and what its configuration is where only weights under our names are there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from . import infer, own, pixart, qwen_image, stable_diffusion, transformers
from .infer import Shapes, count
from .table import Row, Table, translate


def layout_of(class_name: str, config: Mapping[str, Any]) -> tuple[Row, ...] | None:
    """The table of a network's original layout, or ``None`` if there is none."""
    blocks, layers = len(config.get("block_out_channels", ())), config.get("layers_per_block")
    if class_name == "UNet2DConditionModel" and isinstance(layers, int):
        attention = infer.up_attention(config)
        return stable_diffusion.unet(blocks, layers, attention, config.get("class_embed_type") == "projection")
    if class_name == "ControlNetModel" and isinstance(layers, int):
        hints = 2 * (len(config["conditioning_embedding_out_channels"]) - 1)
        return stable_diffusion.controlnet(blocks, layers, hints)
    if class_name == "SD3Transformer2DModel":
        return transformers.sd3_table(config["num_layers"])
    if class_name == "AutoencoderKL":
        return stable_diffusion.vae(blocks)
    if class_name == "AutoencoderKLQwenImage":
        return qwen_image.vae_table(len(config["dim_mult"]), config["num_res_blocks"])
    return _FIXED.get(class_name)


_FIXED = {
    "FluxTransformer2DModel": transformers.FLUX,
    "PixArtTransformer2DModel": pixart.PIXART,
    "QwenImageTransformer2DModel": qwen_image.TRANSFORMER,
}
_OWN = {
    "AutoencoderTiny": own.tiny,
    "AsymmetricAutoencoderKL": own.asymmetric,
    "FluxControlNetModel": own.flux_controlnet,
    "SD3ControlNetModel": own.sd3_controlnet,
    "ReduxImageEncoder": own.redux,
}
_INFER = {
    "UNet2DConditionModel": infer.unet,
    "ControlNetModel": infer.controlnet,
    "FluxTransformer2DModel": transformers.flux,
    "SD3Transformer2DModel": transformers.sd3,
    "PixArtTransformer2DModel": pixart.pixart,
    "AutoencoderKLQwenImage": qwen_image.vae,
}


def config_from_ours(class_name: str, shapes: Shapes) -> dict[str, Any] | None:
    """The configuration of ``class_name`` from shapes under our names, ``None`` if they don't tell it."""
    if class_name == "AutoencoderKL":
        return infer.vae(shapes, original=False)
    if class_name in _OWN:
        return _OWN[class_name](shapes)
    if class_name not in _INFER:
        return None
    ups = range(count(shapes, "up_blocks.{}."))
    attention = ["CrossAttn" if f"up_blocks.{i}.attentions.0.norm.weight" in shapes else "" for i in ups]
    hints = count(shapes, "controlnet_cond_embedding.blocks.{}.")
    outline = {
        "block_out_channels": [0] * count(shapes, "down_blocks.{}."),
        "layers_per_block": count(shapes, "down_blocks.0.resnets.{}."),
        "up_block_types": attention,
        "class_embed_type": "projection" if "class_embedding.linear_1.weight" in shapes else None,
        "conditioning_embedding_out_channels": [0] * (hints // 2 + 1),
        "num_layers": count(shapes, "transformer_blocks.{}."),
        "dim_mult": [0] * count(shapes, "decoder.up_blocks.{}."),
        "num_res_blocks": count(shapes, "decoder.up_blocks.0.resnets.{}.") - 1,
    }
    table = layout_of(class_name, outline)
    assert table is not None
    return _INFER[class_name](_theirs(shapes, table))


def _theirs(shapes: Shapes, table: Sequence[Row]) -> dict[str, tuple[int, ...]]:
    """``shapes`` as a file in the original layout would have them."""
    found: dict[str, tuple[int, ...]] = {}
    table = Table(table)
    for name, shape in shapes.items():
        hit = translate(table, name, reverse=True)
        if hit is None:  # the second of several that are one there
            continue
        rows = sum(shapes[n][0] for n in hit.fused) if hit.fused else 0
        shape = (rows, *shape[1:]) if hit.fused else shape
        found[hit.names[0]] = (*shape, 1, 1) if hit.op == "pixel" else shape
    return found
