"""Configurations read off the shapes of tensors, for files that carry none."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]
MOST = 512  # blocks or layers of one kind; the largest published networks have about a hundred


def below(shapes: Shapes, prefix: str) -> dict[str, tuple[int, ...]]:
    """The shapes of names that start with ``prefix``, without it."""
    return {n[len(prefix) :]: s for n, s in shapes.items() if n.startswith(prefix)}


def count(shapes: Shapes, pattern: str) -> int:
    """One more than the largest number that ``{}`` in ``pattern`` stands for at the start of a name; 0 if none.

    Raises:
        ValueError: nobody is going to build that many layers, or most of them are not there.
    """
    return _length({number for (number,) in _numbers(shapes, pattern)}, pattern)


def counts(shapes: Shapes, pattern: str) -> dict[int, int]:
    """The same for the second ``{}`` in ``pattern``, by the number that the first stands for."""
    found: dict[int, set[int]] = {}
    for outer, inner in _numbers(shapes, pattern):
        found.setdefault(outer, set()).add(inner)
    return {outer: _length(inner, pattern) for outer, inner in found.items()}


def _numbers(shapes: Shapes, pattern: str) -> set[tuple[int, ...]]:
    head = re.compile(r"(\d+)".join(map(re.escape, pattern.split("{}"))))
    return {tuple(map(int, found.groups())) for name in shapes if (found := head.match(name))}


def _length(numbers: set[int], pattern: str) -> int:
    largest = max(numbers, default=-1)
    if largest >= MOST:
        raise ValueError(f"{pattern} counts beyond {MOST}, which no network does")
    if largest > 4 * len(numbers):
        raise ValueError(f"{pattern} counts to {largest}, but there are only {len(numbers)} of its kind")
    return largest + 1


def down_path(shapes: Shapes) -> dict[str, Any]:
    """Channels, layers, attention and depth of each down block, from ``input_blocks``."""
    channels: list[int] = []
    layers, attention, depth, only = [0], [False], [1], [False]
    depths = counts(shapes, "input_blocks.{}.1.transformer_blocks.{}.")
    for i in range(1, count(shapes, "input_blocks.{}.")):
        if f"input_blocks.{i}.0.op.weight" in shapes:
            layers.append(0)
            attention.append(False)
            depth.append(1)
            only.append(False)
            continue
        if layers[-1] == 0:
            channels.append(shapes[f"input_blocks.{i}.0.out_layers.3.weight"][0])
        layers[-1] += 1
        if f"input_blocks.{i}.1.norm.weight" in shapes:
            attention[-1] = True
            depth[-1] = depths.get(i, 0)
            query, key = (f"input_blocks.{i}.1.transformer_blocks.0.attn1.to_{x}.weight" for x in "qk")
            only[-1] = shapes[query][1] != shapes[key][1]
    return {"channels": channels, "layers": layers[0], "attention": attention, "depth": depth, "only": only}


def unet(shapes: Shapes) -> dict[str, Any]:
    """Configuration of a ``UNet2DConditionModel`` in the original layout, names without prefix."""
    path = down_path(shapes)
    has, channels = path["attention"], path["channels"]
    middle = count(shapes, "middle_block.1.transformer_blocks.{}.")
    linear = len(next((s for n, s in shapes.items() if n.endswith("1.proj_in.weight")), (0,))) == 2
    used = {d for d, a in zip(path["depth"], has, strict=True) if a} | ({middle} if middle else set())
    depth: Any = [d if a else 1 for d, a in zip(path["depth"], has, strict=True)]
    depth = used.pop() if len(used) == 1 else depth
    classes = shapes.get("label_emb.weight")
    return {
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "out_channels": shapes["out.2.weight"][0],
        "block_out_channels": channels,
        "layers_per_block": path["layers"],
        "cross_attention_dim": next((s[1] for n, s in shapes.items() if n.endswith("attn2.to_k.weight")), 1280),
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in has],
        "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(has)],
        "transformer_layers_per_block": depth,
        "use_linear_projection": linear,
        # the first models and the upscaler have eight heads everywhere, others 64 channels in each head
        "attention_head_dim": [max(c // 64, 1) for c in channels] if linear and classes is None else 8,
        **({"num_class_embeds": classes[0]} if classes else {}),
        **({"only_cross_attention": path["only"]} if any(path["only"]) else {}),
        **_label(shapes),
        **_guided(shapes),
    }


def _label(shapes: Shapes) -> dict[str, Any]:
    """What the pooled embedding goes through: sizes and text (XL), or a picture's embedding (unCLIP)."""
    first = shapes.get("label_emb.0.0.weight")
    if first is None:
        return {}
    dim = {"projection_class_embeddings_input_dim": first[1]}
    cross = next((s[1] for n, s in shapes.items() if n.endswith("attn2.to_k.weight")), 0)
    if cross == 1024:
        return {"class_embed_type": "projection", **dim}
    return {"addition_embed_type": "text_time", "addition_time_embed_dim": 256, **dim}


def _guided(shapes: Shapes) -> dict[str, Any]:
    """A network distilled for few steps reads the guidance scale, as an embedding of this width."""
    projection = shapes.get("time_embed.cond_proj.weight")
    return {"time_cond_proj_dim": projection[1]} if projection else {}


def up_attention(config: Mapping[str, Any]) -> list[bool]:
    return ["CrossAttn" in str(kind) for kind in config["up_block_types"]]


def controlnet(shapes: Shapes) -> dict[str, Any]:
    """Configuration of a ``ControlNetModel`` in the original layout, names without prefix."""
    config = unet({**shapes, "out.2.weight": (0,)})
    hints = controlnet_hints(shapes)
    sizes = [shapes[f"input_hint_block.{2 * i}.weight"][0] for i in range(hints + 1)]
    config = {k: v for k, v in config.items() if k not in ("up_block_types", "out_channels")}
    return {
        **config,
        "conditioning_channels": shapes["input_hint_block.0.weight"][1],
        "conditioning_embedding_out_channels": [sizes[0], *sizes[2::2]],
    }


def controlnet_hints(shapes: Shapes) -> int:
    """How many blocks lie between the first and the last convolution of the hint."""
    return (count(shapes, "input_hint_block.{}.") + 1) // 2 - 2


def vae(shapes: Shapes, original: bool = True) -> dict[str, Any]:
    """Configuration of an ``AutoencoderKL``, names without prefix."""
    block = "encoder.down.{}.block.0.conv2.weight" if original else "encoder.down_blocks.{}.resnets.0.conv2.weight"
    blocks = count(shapes, block.partition("{}")[0] + "{}.")
    inner = "encoder.down.0.block.{}." if original else "encoder.down_blocks.0.resnets.{}."
    attention = "encoder.mid.attn_1.norm.weight" if original else "encoder.mid_block.attentions.0.group_norm.weight"
    return {
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "block_out_channels": [shapes[block.format(i)][0] for i in range(blocks)],
        "layers_per_block": count(shapes, inner),
        "latent_channels": shapes["decoder.conv_in.weight"][1],
        "down_block_types": ["DownEncoderBlock2D"] * blocks,
        "up_block_types": ["UpDecoderBlock2D"] * blocks,
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
        "mid_block_add_attention": attention in shapes,
    }


def clip(shapes: Shapes, hidden_act: str, layers: int | None = None) -> dict[str, Any]:
    """Configuration of a CLIP text model under our names; ``layers`` if fewer are used than there are."""
    vocabulary, width = shapes["text_model.embeddings.token_embedding.weight"]
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": layers or count(shapes, "text_model.encoder.layers.{}."),
        "num_attention_heads": max(width // 64, 1),
        "max_position_embeddings": shapes["text_model.embeddings.position_embedding.weight"][0],
        "hidden_act": hidden_act,
        "projection_dim": shapes.get("text_projection.weight", (width,))[0],
        "bos_token_id": 0,
        "eos_token_id": 2,
    }
