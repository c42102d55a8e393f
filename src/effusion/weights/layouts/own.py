"""Networks whose files have our names: their configurations, read off the shapes of tensors."""

from __future__ import annotations

from typing import Any

from .infer import Shapes, count

_TEXT = "time_text_embed"


def _norm_width(shapes: Shapes) -> int | None:
    """The width of a head, where queries are normed head by head."""
    return next((s[0] for n, s in shapes.items() if n.endswith("attn.norm_q.weight")), None)


def flux_controlnet(shapes: Shapes) -> dict[str, Any]:
    """Configuration of a ``FluxControlNetModel``."""
    width, channels = shapes["x_embedder.weight"]
    head = _norm_width(shapes) or 128
    modes, hint = shapes.get("controlnet_mode_embedder.weight"), shapes.get("input_hint_block.conv_out.weight")
    return {
        "in_channels": channels,
        "num_layers": count(shapes, "transformer_blocks.{}."),
        "num_single_layers": count(shapes, "single_transformer_blocks.{}."),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": shapes["context_embedder.weight"][1],
        "pooled_projection_dim": shapes[f"{_TEXT}.text_embedder.linear_1.weight"][1],
        "guidance_embeds": f"{_TEXT}.guidance_embedder.linear_1.weight" in shapes,
        "axes_dims_rope": [head // 8, (head - head // 8) // 2, (head - head // 8) // 2],
        "num_mode": modes[0] if modes else None,
        "conditioning_embedding_channels": hint[0] if hint else None,
    }


def sd3_controlnet(shapes: Shapes) -> dict[str, Any]:
    """Configuration of an ``SD3ControlNetModel``; those without an input for latents are made for 3.5."""
    width, channels, patch, _ = shapes["pos_embed_input.proj.weight"]
    latents, text, table = (
        shapes.get(n) for n in ("pos_embed.proj.weight", "context_embedder.weight", "pos_embed.pos_embed")
    )
    normed = _norm_width(shapes)
    head, blocks = normed or 64, count(shapes, "transformer_blocks.{}.")
    own = latents[1] if latents else 16
    return {
        "patch_size": patch,
        "in_channels": own,
        "extra_conditioning_channels": channels - own,
        "num_layers": blocks,
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": text[1] if text else None,
        "caption_projection_dim": text[0] if text else width,
        "pooled_projection_dim": shapes[f"{_TEXT}.text_embedder.linear_1.weight"][1],
        "pos_embed_max_size": round(table[1] ** 0.5) if table else None,
        "pos_embed_type": "sincos" if table else None,
        "use_pos_embed": latents is not None,
        "dual_attention_layers": [i for i in range(blocks) if f"transformer_blocks.{i}.attn2.to_q.weight" in shapes],
        "qk_norm": "rms_norm" if normed else None,
        "force_zeros_for_pooled_projection": latents is not None,
    }


def redux(shapes: Shapes) -> dict[str, Any]:
    """Configuration of a ``ReduxImageEncoder``, which FLUX.1 Redux is published as."""
    return {"redux_dim": shapes["redux_up.weight"][1], "txt_in_features": shapes["redux_down.weight"][0]}


def tiny(shapes: Shapes) -> dict[str, Any]:
    """Configuration of an ``AutoencoderTiny``."""
    encoder, decoder = _tiny_half(shapes, "encoder"), _tiny_half(shapes, "decoder")
    return {
        "in_channels": encoder["ends"][0],
        "out_channels": decoder["ends"][1],
        "latent_channels": decoder["ends"][0],
        "encoder_block_out_channels": encoder["widths"],
        "decoder_block_out_channels": decoder["widths"],
        "num_encoder_blocks": encoder["blocks"],
        "num_decoder_blocks": decoder["blocks"],
    }


def _tiny_half(shapes: Shapes, half: str) -> dict[str, list[int]]:
    """Widths and blocks of the stages of one half: between two stages is a convolution without bias."""
    widths, blocks, ends = [], [0], [shapes[f"{half}.layers.0.weight"][1]]
    for i in range(1, count(shapes, f"{half}.layers.{{}}.")):
        convolution = shapes.get(f"{half}.layers.{i}.weight")
        if f"{half}.layers.{i}.conv.0.weight" in shapes:
            blocks[-1] += 1
        elif convolution is not None:
            widths.append(convolution[1])
            if f"{half}.layers.{i}.bias" in shapes:
                ends.append(convolution[0])
            else:
                blocks.append(0)
    return {"widths": widths, "blocks": blocks, "ends": ends}


def asymmetric(shapes: Shapes) -> dict[str, Any]:
    """Configuration of an ``AsymmetricAutoencoderKL``."""
    down, up = count(shapes, "encoder.down_blocks.{}."), count(shapes, "decoder.up_blocks.{}.")
    return {
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "down_block_types": ["DownEncoderBlock2D"] * down,
        "down_block_out_channels": [shapes[f"encoder.down_blocks.{i}.resnets.0.conv2.weight"][0] for i in range(down)],
        "layers_per_down_block": count(shapes, "encoder.down_blocks.0.resnets.{}."),
        "up_block_types": ["UpDecoderBlock2D"] * up,
        "up_block_out_channels": [
            shapes[f"decoder.up_blocks.{i}.resnets.0.conv2.weight"][0] for i in reversed(range(up))
        ],
        "layers_per_up_block": count(shapes, "decoder.up_blocks.0.resnets.{}.") - 1,
        "latent_channels": shapes["decoder.conv_in.weight"][1],
    }
