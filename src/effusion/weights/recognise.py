"""What a file is, told by the names and shapes of its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..core.errors import CheckpointError
from .entries import Checkpoint
from .layouts import known
from .layouts.infer import Shapes, below
from .recognise_adapters import recognise_adapter
from .recognise_transformers import (
    FLUX_VAE,
    SD3_VAE,
    recognise_qwen_vae,
    recognise_text_encoder,
    recognise_transformer,
)
from .recognise_unets import EMPTY_MARKS, SD_VAE, VAE, XL_VAE, recognise_unet, vae
from .verdict import Part, Verdict


def recognise(checkpoint: Checkpoint) -> Verdict:
    """Tell what ``checkpoint`` is from names, shapes and metadata; reads no values.

    Raises:
        CheckpointError: names that only a known network has, without the rest of it or with absurd shapes.
    """
    # an empty tensor says nothing about sizes: its others could be anything at no cost
    shapes = {n: tuple(e.shape) for n, e in checkpoint.items() if all(e.shape) or n in EMPTY_MARKS}
    try:
        for test in _TESTS:
            verdict = test(shapes)
            if verdict is not None:
                return _told(verdict, checkpoint.metadata)
    except (KeyError, IndexError, ValueError, TypeError, ZeroDivisionError, StopIteration) as error:
        raise CheckpointError(
            f"{checkpoint.label}: its tensors are named like those of a known network, but they are none: {error!r}"
        ) from error
    return Verdict("unknown", f"unknown: {len(shapes)} tensors such as {', '.join(list(shapes)[:3])}")


# -- one network ---------------------------------------------------------------------------------


def recognise_control(shapes: Shapes) -> Verdict | None:
    """What steers a transformer, and has names of its blocks: control networks, FLUX.1 Redux."""
    if {"redux_up.weight", "redux_down.weight"} <= set(shapes):
        return _ours("ReduxImageEncoder", shapes, "image_encoder")
    if not any(n.startswith(("controlnet_blocks.", "controlnet_single_blocks.")) for n in shapes):
        return None
    for class_name, mark in _CONTROL.items():
        if mark in shapes:
            return _ours(class_name, shapes, "controlnet")
    return Verdict("model", "a ControlNet for a transformer, of a kind or in a layout that can't be loaded here")


def recognise_lone(shapes: Shapes) -> Verdict | None:
    """An autoencoder in its original layout, or a network under our names."""
    for place in ("", VAE, "vae."):
        inside = below(shapes, place)
        if "decoder.conv_in.weight" in inside and any(n.startswith("decoder.up.") for n in inside):
            part = vae(inside, place, {})
            return Verdict("model", "an AutoencoderKL in its original layout", {"vae": _assume_scale(part)})
    for place in (VAE, "vae.", ""):
        inside = below(shapes, place)
        for class_name, marks in _MARKS.items():
            if all(any(mark in n for n in inside) for mark in marks):
                return _ours(class_name, inside, "vae" if class_name == "AutoencoderKL" else "model", place)
    return None


def _ours(class_name: str, shapes: Shapes, name: str, prefix: str = "") -> Verdict:
    """The network ``class_name`` under our names."""
    part = Part(class_name, prefix, None, known.config_from_ours(class_name, shapes) or {})
    part = _assume_scale(part) if class_name == "AutoencoderKL" else part
    how = "" if part.config else ", without configuration"
    return Verdict("model", f"a {class_name}{how}", {name: part})


_TESTS = (
    recognise_adapter,
    recognise_control,
    recognise_unet,
    recognise_transformer,
    recognise_qwen_vae,
    recognise_text_encoder,
    recognise_lone,
)
_CONTROL = {
    "FluxControlNetModel": "controlnet_x_embedder.weight",
    "SD3ControlNetModel": "pos_embed_input.proj.weight",
}
# class -> what some names of its weights contain, most particular first
_MARKS: dict[str, tuple[str, ...]] = {
    "ControlNetModel": ("controlnet_cond_embedding.conv_in", "controlnet_mid_block"),
    "FluxTransformer2DModel": ("single_transformer_blocks.0.proj_mlp", "norm1_context"),
    "SD3Transformer2DModel": ("transformer_blocks.0.norm1_context", "pos_embed.proj"),
    "PixArtTransformer2DModel": ("adaln_single", "caption_projection"),
    "DiTTransformer2DModel": ("transformer_blocks.0.norm1.emb.class_embedder", "proj_out_1"),
    "AsymmetricAutoencoderKL": ("decoder.condition_encoder.layers.0.weight",),
    "AutoencoderTiny": ("encoder.layers.1.conv.0.weight", "decoder.layers.0.weight"),
    "AutoencoderKLQwenImage": ("encoder.down_blocks.0.conv1", "decoder.up_blocks.0.resnets", "post_quant_conv"),
    "AutoencoderKL": ("decoder.up_blocks.0", "encoder.down_blocks.0", "conv_norm_out"),
    "UNet2DConditionModel": ("down_blocks.0.resnets.0", "attn2.to_k", "conv_norm_out"),
    "UNet2DModel": ("down_blocks.0.resnets.0", "conv_norm_out", "time_embedding"),
}

# -- what no shape tells --------------------------------------------------------------------------

# (what a file's `modelspec.architecture` begins with, the family, how it scales latents), most particular first
_SCALES: tuple[tuple[str, str, Mapping[str, Any]], ...] = (
    ("flux", "FLUX.1", FLUX_VAE),
    ("stable-diffusion-v3", "Stable Diffusion 3", SD3_VAE),
    ("stable-diffusion-xl", "Stable Diffusion XL", XL_VAE),
    ("stable-diffusion-v", "Stable Diffusion 1.x and 2.x", SD_VAE),
)


def _assume_scale(part: Part) -> Part:
    """An autoencoder alone: nothing tells what its latents are scaled by; it is nearly always one of these."""
    kind = "flux" if part.config["latent_channels"] == 16 else "stable-diffusion-v"
    family, values = next((family, values) for start, family, values in _SCALES if start == kind)
    scale = ", ".join(f"{n}={values[n]}" for n in ("scaling_factor", "shift_factor") if n in values)
    others = "; ".join(f"{f}: {v['scaling_factor']}" for s, f, v in _SCALES if s != kind)
    said = f"nothing in the file tells how its latents are scaled; {scale} is assumed, as in {family} ({others}); "
    return replace(part, config={**part.config, **values}, assumed=f"{said}`config=` or `scaling_factor=` replaces it")


def _told(verdict: Verdict, metadata: Mapping[str, str]) -> Verdict:
    """``verdict`` with what was assumed replaced by what the file's metadata say, where they do."""
    name = metadata.get("modelspec.architecture", "").lower()
    found = next((values for start, _, values in _SCALES if name.startswith(start)), None)
    if found is None:
        return verdict
    parts = {
        n: replace(part, config={**part.config, **found}, assumed="") if part.assumed else part
        for n, part in verdict.parts.items()
    }
    return replace(verdict, parts=parts)


def part_for(checkpoint: Checkpoint, class_name: str, configured: bool = False) -> Part:
    """How to read a network of ``class_name`` out of ``checkpoint``.

    Args:
        configured: its configuration is known, so that tensors under our names need not tell what they are.

    Raises:
        CheckpointError: there is none in it; says what the file is.
    """
    verdict = recognise(checkpoint)
    for part in verdict.parts.values():
        if part.class_name == class_name:
            return part
    named = all(part.table is None and not part.prefix for part in verdict.parts.values())
    if configured and verdict.kind in ("model", "unknown") and named:
        return Part(class_name, "", None, {})
    raise CheckpointError(f"{checkpoint.label} holds no {class_name}; it is {verdict.describe()}")
