"""What a file is, told by the names and shapes of its tensors."""

from __future__ import annotations

from ..core.errors import CheckpointError
from .checkpoint import Checkpoint
from .layouts import known
from .layouts.infer import Shapes
from .recognise_transformers import recognise_qwen_vae, recognise_text_encoder, recognise_transformer
from .recognise_unets import EMPTY_MARKS, recognise_unet, vae
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
                return verdict
    except (KeyError, IndexError, ValueError, TypeError, ZeroDivisionError, StopIteration) as error:
        raise CheckpointError(
            f"{checkpoint.label}: its tensors are named like those of a known network, but they are none: {error!r}"
        ) from error
    return Verdict("unknown", f"unknown: {len(shapes)} tensors such as {', '.join(list(shapes)[:3])}")


# -- things that add to a model ------------------------------------------------------------------

_LORA = (".lora_A.", ".lora_B.", ".lora_up.", ".lora_down.", ".lora.up.", ".lora.down.", ".hada_w1", ".lokr_w1")


def _adapter(shapes: Shapes) -> Verdict | None:
    if any(mark in f"{name}." for name in shapes for mark in _LORA):
        return Verdict("lora", f"a LoRA for {_lora_target(shapes)}: load it with `pipe.load_lora_weights`")
    if any(n.startswith("ip_adapter.") for n in shapes) and any(n.startswith("image_proj.") for n in shapes):
        return Verdict("ip_adapter", "an IP-Adapter: load it with `pipe.load_ip_adapter`")
    small = shapes and all(len(s) <= 2 for s in shapes.values()) and len(shapes) <= 3
    if small and (set(shapes) & {"emb_params", "clip_l", "clip_g"} or all(n.startswith("<") for n in shapes)):
        width = next(iter(shapes.values()))[-1]
        return Verdict("embedding", f"a textual inversion of width {width}: load it with `pipe.load_textual_inversion`")
    return None


def _lora_target(shapes: Shapes) -> str:
    text = " ".join(shapes)
    if "double_blocks" in text or "single_transformer_blocks" in text or "single_blocks" in text:
        return "FLUX.1"
    if "joint_blocks" in text:
        return "Stable Diffusion 3"
    if "img_mod" in text or "transformer_blocks.0.img_mlp" in text:
        return "Qwen-Image"
    widths = {s[-1] for n, s in shapes.items() if "attn2" in n and "to_k" in n and ("down" in n or "lora_A" in n)}
    families = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "Stable Diffusion XL"}
    return next((families[w] for w in widths if w in families), "an unknown family")


# -- one network ---------------------------------------------------------------------------------


def _lone_network(shapes: Shapes) -> Verdict | None:
    if "decoder.conv_in.weight" in shapes and any(n.startswith("decoder.up.") for n in shapes):
        return Verdict("model", "an AutoencoderKL in its original layout", {"vae": vae(shapes, "")})
    for class_name, marks in _MARKS.items():
        if all(any(mark in n for n in shapes) for mark in marks):
            part = Part(class_name, "", None, known.config_from_ours(class_name, shapes) or {})
            how = "" if part.config else ", without configuration"
            return Verdict("model", f"a {class_name}{how}", {"model": part})
    return None


_TESTS = (_adapter, recognise_unet, recognise_transformer, recognise_qwen_vae, recognise_text_encoder, _lone_network)
# class -> what some names of its weights contain, most particular first
_MARKS: dict[str, tuple[str, ...]] = {
    "ControlNetModel": ("controlnet_cond_embedding.conv_in", "controlnet_mid_block"),
    "FluxTransformer2DModel": ("single_transformer_blocks.0.proj_mlp", "norm1_context"),
    "SD3Transformer2DModel": ("transformer_blocks.0.norm1_context", "pos_embed.proj"),
    "PixArtTransformer2DModel": ("adaln_single", "caption_projection"),
    "AutoencoderKL": ("decoder.up_blocks.0", "encoder.down_blocks.0", "conv_norm_out"),
    "UNet2DConditionModel": ("down_blocks.0.resnets.0", "attn2.to_k", "conv_norm_out"),
    "UNet2DModel": ("down_blocks.0.resnets.0", "conv_norm_out", "time_embedding"),
}


def part_for(checkpoint: Checkpoint, class_name: str) -> Part:
    """How to read a network of ``class_name`` out of ``checkpoint``.

    Raises:
        CheckpointError: there is none in it; says what the file is.
    """
    verdict = recognise(checkpoint)
    for part in verdict.parts.values():
        if part.class_name == class_name:
            return part
    raise CheckpointError(f"{checkpoint.label} holds no {class_name}; it is {verdict.describe()}")
