"""Qwen-Image (Wu et al., 2025): its transformer has our names; its autoencoder, made of Wan's, has others in files."""

from __future__ import annotations

from typing import Any

from .infer import Shapes, count
from .table import Row

TRANSFORMER = (
    Row("transformer_blocks.", "transformer_blocks."),
    Row("time_text_embed.", "time_text_embed."),
    Row("txt_norm.", "txt_norm."),
    Row("img_in.", "img_in."),
    Row("txt_in.", "txt_in."),
    Row("norm_out.", "norm_out."),
    Row("proj_out.", "proj_out."),
)
_RESIDUAL = (
    Row("residual.0.", "norm1."),
    Row("residual.2.", "conv1."),
    Row("residual.3.", "norm2."),
    Row("residual.6.", "conv2."),
    Row("shortcut.", "conv_shortcut."),
)
_RESAMPLE = (Row("resample.", "resample."), Row("time_conv.", "time_conv."))


def transformer(shapes: Shapes) -> dict[str, Any]:
    """Configuration of a ``QwenImageTransformer2DModel``, names without prefix."""
    width, channels = shapes["img_in.weight"]
    head = shapes["transformer_blocks.0.attn.norm_q.weight"][0]
    patch = 2
    return {
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": shapes["proj_out.weight"][0] // patch**2,
        "num_layers": count(shapes, "transformer_blocks.{}."),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": shapes["txt_in.weight"][1],
        # an eighth of a head for the frame, the rest in equal parts for row and column: (16, 56, 56) of 128
        "axes_dims_rope": [head // 8, (head - head // 8) // 2, (head - head // 8) // 2],
    }


def vae_table(levels: int, layers: int) -> tuple[Row, ...]:
    """The autoencoder: ``levels`` resolutions, ``layers`` residual blocks in each of the encoder's."""
    rows: list[Row] = [Row("conv1.", "quant_conv."), Row("conv2.", "post_quant_conv.")]
    for half in ("encoder", "decoder"):
        rows += [
            Row(f"{half}.conv1.", f"{half}.conv_in."),
            Row(f"{half}.middle.0.", f"{half}.mid_block.resnets.0.", _RESIDUAL),
            Row(f"{half}.middle.1.", f"{half}.mid_block.attentions.0."),
            Row(f"{half}.middle.2.", f"{half}.mid_block.resnets.1.", _RESIDUAL),
            Row(f"{half}.head.0.", f"{half}.norm_out."),
            Row(f"{half}.head.2.", f"{half}.conv_out."),
        ]
    rows.append(Row("encoder.downsamples.{}.", "encoder.down_blocks.{}.", (*_RESIDUAL, *_RESAMPLE)))
    for i in range(levels):  # the decoder has one residual block more in each level, then the upsampler
        for j in range(layers + 1):
            index = i * (layers + 2) + j
            rows.append(Row(f"decoder.upsamples.{index}.", f"decoder.up_blocks.{i}.resnets.{j}.", _RESIDUAL))
        place = f"decoder.upsamples.{i * (layers + 2) + layers + 1}."
        rows.append(Row(place, f"decoder.up_blocks.{i}.upsamplers.0.", _RESAMPLE))
    return tuple(rows)


def vae(shapes: Shapes) -> dict[str, Any]:
    """Configuration of an ``AutoencoderKLQwenImage`` in Wan's layout, names without prefix."""
    places = range(count(shapes, "encoder.downsamples.{}."))
    resamplers = [i for i in places if f"encoder.downsamples.{i}.resample.1.weight" in shapes]
    temporal = [f"encoder.downsamples.{i}.time_conv.weight" in shapes for i in resamplers]
    layers = resamplers[0] if resamplers else len(places)
    base = shapes["encoder.conv1.weight"][0]
    last = [shapes[f"encoder.downsamples.{i}.residual.6.weight"][0] for i in places if i not in resamplers]
    return {
        "base_dim": base,
        "z_dim": shapes["conv2.weight"][0],
        "dim_mult": [width // base for width in last[layers - 1 :: layers]],
        "num_res_blocks": layers,
        "temperal_downsample": temporal,
        "input_channels": shapes["encoder.conv1.weight"][1],
    }
