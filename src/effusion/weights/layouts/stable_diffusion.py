"""The original layout of Stable Diffusion (Rombach et al., 2022): UNet, ControlNet, VAE and text encoders."""

from __future__ import annotations

from collections.abc import Sequence

from .table import Row

RESNET = (
    Row("in_layers.0.", "norm1."),
    Row("in_layers.2.", "conv1."),
    Row("emb_layers.1.", "time_emb_proj."),
    Row("out_layers.0.", "norm2."),
    Row("out_layers.3.", "conv2."),
    Row("skip_connection.", "conv_shortcut."),
)
VAE_RESNET = (
    Row("norm1.", "norm1."),
    Row("conv1.", "conv1."),
    Row("norm2.", "norm2."),
    Row("conv2.", "conv2."),
    Row("nin_shortcut.", "conv_shortcut."),
)
VAE_ATTENTION = (
    Row("norm.", "group_norm."),
    Row("q.weight", "to_q.weight", op="pixel"),
    Row("k.weight", "to_k.weight", op="pixel"),
    Row("v.weight", "to_v.weight", op="pixel"),
    Row("proj_out.weight", "to_out.0.weight", op="pixel"),
    Row("q.bias", "to_q.bias"),
    Row("k.bias", "to_k.bias"),
    Row("v.bias", "to_v.bias"),
    Row("proj_out.bias", "to_out.0.bias"),
)
MIDDLE = (
    Row("middle_block.0.", "mid_block.resnets.0.", RESNET),
    Row("middle_block.1.", "mid_block.attentions.0."),
    Row("middle_block.2.", "mid_block.resnets.1.", RESNET),
)


def embeddings(class_projection: bool = False) -> tuple[Row, ...]:
    """Time embedding, and what pooled text and sizes go through."""
    extra = "class_embedding" if class_projection else "add_embedding"
    return (
        Row("time_embed.0.", "time_embedding.linear_1."),
        Row("time_embed.2.", "time_embedding.linear_2."),
        Row("time_embed.cond_proj.", "time_embedding.cond_proj."),
        Row("label_emb.weight", "class_embedding.weight"),
        Row("label_emb.0.0.", f"{extra}.linear_1."),
        Row("label_emb.0.2.", f"{extra}.linear_2."),
    )


def down(blocks: int, layers: int) -> tuple[Row, ...]:
    """``input_blocks`` count straight through what we have as blocks of layers and a downsampler."""
    rows = [Row("input_blocks.0.0.", "conv_in.")]
    index = 1
    for i in range(blocks):
        for j in range(layers):
            rows.append(Row(f"input_blocks.{index}.0.", f"down_blocks.{i}.resnets.{j}.", RESNET))
            rows.append(Row(f"input_blocks.{index}.1.", f"down_blocks.{i}.attentions.{j}."))
            index += 1
        if i < blocks - 1:
            rows.append(Row(f"input_blocks.{index}.0.op.", f"down_blocks.{i}.downsamplers.0.conv."))
            index += 1
    return tuple(rows)


def up(blocks: int, layers: int, attention: Sequence[bool]) -> tuple[Row, ...]:
    """``output_blocks``; ``attention`` says which of our up blocks have attention, first to last."""
    rows = []
    for i in range(blocks):
        for j in range(layers + 1):
            index = i * (layers + 1) + j
            if j == layers and i < blocks - 1:
                place = 2 if attention[i] else 1
                rows.append(Row(f"output_blocks.{index}.{place}.conv.", f"up_blocks.{i}.upsamplers.0.conv."))
            rows.append(Row(f"output_blocks.{index}.0.", f"up_blocks.{i}.resnets.{j}.", RESNET))
            if attention[i]:
                rows.append(Row(f"output_blocks.{index}.1.", f"up_blocks.{i}.attentions.{j}."))
    return tuple(rows)


def unet(blocks: int, layers: int, attention: Sequence[bool], class_projection: bool = False) -> tuple[Row, ...]:
    """The UNet; below ``model.diffusion_model.`` in files."""
    out = (Row("out.0.", "conv_norm_out."), Row("out.2.", "conv_out."))
    return (*down(blocks, layers), *MIDDLE, *up(blocks, layers, attention), *embeddings(class_projection), *out)


def controlnet(blocks: int, layers: int, hints: int) -> tuple[Row, ...]:
    """A ControlNet (Zhang et al., 2023); below ``control_model.`` in files. ``hints`` blocks embed the picture."""
    embed = [Row("input_hint_block.0.", "controlnet_cond_embedding.conv_in.")]
    embed += [Row(f"input_hint_block.{2 * i + 2}.", f"controlnet_cond_embedding.blocks.{i}.") for i in range(hints)]
    embed.append(Row(f"input_hint_block.{2 * hints + 2}.", "controlnet_cond_embedding.conv_out."))
    zero = (Row("zero_convs.{}.0.", "controlnet_down_blocks.{}."), Row("middle_block_out.0.", "controlnet_mid_block."))
    return (*down(blocks, layers), *MIDDLE, *embeddings(), *embed, *zero)


def vae(blocks: int) -> tuple[Row, ...]:
    """The autoencoder; below ``first_stage_model.`` in files."""
    rows = []
    for half in ("encoder", "decoder"):
        rows += [
            Row(f"{half}.conv_in.", f"{half}.conv_in."),
            Row(f"{half}.mid.block_1.", f"{half}.mid_block.resnets.0.", VAE_RESNET),
            Row(f"{half}.mid.attn_1.", f"{half}.mid_block.attentions.0.", VAE_ATTENTION),
            Row(f"{half}.mid.block_2.", f"{half}.mid_block.resnets.1.", VAE_RESNET),
            Row(f"{half}.norm_out.", f"{half}.conv_norm_out."),
            Row(f"{half}.conv_out.", f"{half}.conv_out."),
        ]
    rows += [
        Row("encoder.down.{}.block.{}.", "encoder.down_blocks.{}.resnets.{}.", VAE_RESNET),
        Row("encoder.down.{}.downsample.conv.", "encoder.down_blocks.{}.downsamplers.0.conv."),
        Row("quant_conv.", "quant_conv."),
        Row("post_quant_conv.", "post_quant_conv."),
    ]
    for i in range(blocks):  # theirs count from the output, ours from the input
        rows.append(Row(f"decoder.up.{i}.block.{{}}.", f"decoder.up_blocks.{blocks - 1 - i}.resnets.{{}}.", VAE_RESNET))
        place = f"decoder.up_blocks.{blocks - 1 - i}.upsamplers.0.conv."
        rows.append(Row(f"decoder.up.{i}.upsample.conv.", place))
    return tuple(rows)


CLIP = (Row("text_model.", "text_model."), Row("text_projection.", "text_projection."))  # as transformers has it
OPEN_CLIP = (
    Row("token_embedding.", "text_model.embeddings.token_embedding."),
    Row("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    Row("ln_final.", "text_model.final_layer_norm."),
    Row("text_projection", "text_projection.weight", op="transpose"),
    Row(
        "transformer.resblocks.{}.",
        "text_model.encoder.layers.{}.",
        (
            Row("ln_1.", "layer_norm1."),
            Row("ln_2.", "layer_norm2."),
            Row("mlp.c_fc.", "mlp.fc1."),
            Row("mlp.c_proj.", "mlp.fc2."),
            Row("attn.out_proj.", "self_attn.out_proj."),
            Row("attn.in_proj_weight", tuple(f"self_attn.{p}_proj.weight" for p in "qkv")),
            Row("attn.in_proj_bias", tuple(f"self_attn.{p}_proj.bias" for p in "qkv")),
        ),
    ),
)
