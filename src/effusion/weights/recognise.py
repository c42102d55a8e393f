"""What a file is, told by the names and shapes of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..core.errors import CheckpointError
from .checkpoint import Checkpoint
from .layouts import infer, stable_diffusion
from .layouts import transformers as layouts
from .layouts.infer import Shapes, below
from .layouts.table import Row, to_ours


@dataclass(frozen=True)
class Part:
    """One component inside a file: its class, how to read it, and a configuration from its shapes."""

    class_name: str
    prefix: str
    table: Sequence[Row] | None  # None: our own names
    config: Mapping[str, Any]
    library: str = "diffusers"

    def read(self, checkpoint: Checkpoint) -> Checkpoint:
        """The part's tensors under our names."""
        if self.table is not None:
            return to_ours(checkpoint, self.table, self.prefix)
        return checkpoint.renamed({n: n[len(self.prefix) :] for n in checkpoint if n.startswith(self.prefix)})


@dataclass(frozen=True)
class Verdict:
    """What a file is.

    Attributes:
        kind: ``"pipeline"`` (a model with companions), ``"model"`` (one network), ``"lora"``, ``"embedding"``,
            ``"ip_adapter"`` or ``"unknown"``.
        name: for people, as in *Stable Diffusion XL*.
        parts: components by their name in a pipeline.
        pipeline: the class of the pipeline that they belong to.
        missing: components of it that the file does not have and no table can give.
    """

    kind: str
    name: str
    parts: Mapping[str, Part] = field(default_factory=dict)
    pipeline: str | None = None
    missing: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)  # scheduler and pipeline configuration

    def describe(self) -> str:
        """One line: what it is, what is in it and what is not."""
        inside = ", ".join(f"{n} ({p.class_name})" for n, p in self.parts.items())
        text = f"{self.name}: {inside}" if inside else self.name
        return f"{text}; without {', '.join(self.missing)}" if self.missing else text


def recognise(checkpoint: Checkpoint) -> Verdict:
    """Tell what ``checkpoint`` is from names, shapes and metadata; reads no values."""
    shapes = {name: tuple(entry.shape) for name, entry in checkpoint.items()}
    for test in (_adapter, _stable_diffusion, _transformer, _lone_network):
        verdict = test(shapes)
        if verdict is not None:
            return verdict
    return Verdict("unknown", f"unknown: {len(shapes)} tensors such as {', '.join(list(shapes)[:3])}")


# -- things that add to a model ------------------------------------------------------------------

_LORA = (".lora_A.", ".lora_B.", ".lora_up.", ".lora_down.", ".lora.up.", ".lora.down.", ".hada_w1", ".lokr_w1")


def _adapter(shapes: Shapes) -> Verdict | None:
    if any(mark in f"{name}." for name in shapes for mark in _LORA):
        return Verdict("lora", f"a LoRA for {_lora_target(shapes)}: load it with `pipe.load_lora_weights`")
    if any(n.startswith("ip_adapter.") for n in shapes) and any(n.startswith("image_proj.") for n in shapes):
        return Verdict("ip_adapter", "an IP-Adapter: load it with `pipe.load_ip_adapter`")
    small = all(len(s) <= 2 for s in shapes.values()) and len(shapes) <= 3
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


# -- Stable Diffusion ----------------------------------------------------------------------------

_UNET, _CONTROL, _VAE = "model.diffusion_model.", "control_model.", "first_stage_model."
_FIRST = "input_blocks.0.0.weight"
_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_CLASSIC = {
    "_class_name": "PNDMScheduler",
    **_BETAS,
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
}
_EULER = {"_class_name": "EulerDiscreteScheduler", **_BETAS, "steps_offset": 1, "timestep_spacing": "leading"}


def _stable_diffusion(shapes: Shapes) -> Verdict | None:
    for place in (_CONTROL, ""):
        if f"{place}input_hint_block.0.weight" in shapes and f"{place}{_FIRST}" in shapes:
            part = _controlnet(below(shapes, place), place)
            return Verdict("model", "a ControlNet in its original layout", {"controlnet": part})
    prefix = next((p for p in (_UNET, "") if p + _FIRST in shapes), None)
    if prefix is None:
        return None
    parts = {"unet": _unet(below(shapes, prefix), prefix)}
    family = _family(parts["unet"].config)
    if f"{_VAE}decoder.conv_in.weight" in shapes:
        parts["vae"] = _vae(below(shapes, _VAE), _VAE, family)
    parts.update(_text_encoders(shapes, family))
    if len(parts) == 1:
        return Verdict("model", f"the UNet of {family.name} in its original layout", parts, family.pipeline)
    missing = tuple(n for n in family.needs if n not in parts)
    settings = {"scheduler": _scheduler(shapes, family), **family.settings}
    return Verdict("pipeline", family.name, parts, _pipeline(parts["unet"].config, family), missing, settings)


@dataclass(frozen=True)
class _Family:
    name: str
    pipeline: str
    needs: tuple[str, ...]
    scheduler: Mapping[str, Any]
    vae: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    sample_size: int = 64


_SD = ("vae", "text_encoder", "tokenizer", "unet")
_XL_VAE = {"scaling_factor": 0.13025, "sample_size": 1024, "force_upcast": True}
_ONE = _Family("Stable Diffusion 1.x", "StableDiffusionPipeline", _SD, _CLASSIC)
_TWO = _Family("Stable Diffusion 2.x", "StableDiffusionPipeline", _SD, {**_CLASSIC, "_class_name": "DDIMScheduler"})
_XL = _Family(
    "Stable Diffusion XL", "StableDiffusionXLPipeline",
    ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet"), _EULER, _XL_VAE, sample_size=128,
)  # fmt: skip
_REFINER = _Family(
    "Stable Diffusion XL refiner", "StableDiffusionXLImg2ImgPipeline",
    ("vae", "text_encoder_2", "tokenizer_2", "unet"), _EULER, _XL_VAE, {"requires_aesthetics_score": True}, 128,
)  # fmt: skip


def _family(config: Mapping[str, Any]) -> _Family:
    if "addition_embed_type" in config:
        return _REFINER if config["cross_attention_dim"] == 1280 else _XL
    return _TWO if config["use_linear_projection"] else _ONE


def _pipeline(config: Mapping[str, Any], family: _Family) -> str:
    if config["in_channels"] == 9:
        return family.pipeline.replace("Pipeline", "InpaintPipeline").replace("Img2ImgInpaint", "Inpaint")
    return family.pipeline


def _scheduler(shapes: Shapes, family: _Family) -> dict[str, Any]:
    """What the family was trained with; some files say by an empty tensor that they predict velocity."""
    config = dict(family.scheduler)
    if config["_class_name"] == "DDIMScheduler":
        config.pop("skip_prk_steps", None)
    if "v_pred" in shapes:
        config["prediction_type"] = "v_prediction"
    if "ztsnr" in shapes:
        config["rescale_betas_zero_snr"] = True
    return config


def _unet(shapes: Shapes, prefix: str) -> Part:
    config = infer.unet(shapes)
    config["sample_size"] = _family(config).sample_size
    projection = "class_embed_type" in config
    blocks, layers = len(config["block_out_channels"]), config["layers_per_block"]
    table = stable_diffusion.unet(blocks, layers, infer.up_attention(config), projection)
    return Part("UNet2DConditionModel", prefix, table, config)


def _controlnet(shapes: Shapes, prefix: str) -> Part:
    config = infer.controlnet(shapes)
    blocks, layers = len(config["block_out_channels"]), config["layers_per_block"]
    table = stable_diffusion.controlnet(blocks, layers, infer.controlnet_hints(shapes))
    return Part("ControlNetModel", prefix, table, config)


def _vae(shapes: Shapes, prefix: str, family: _Family | None = None) -> Part:
    config = infer.vae(shapes)
    config |= {"sample_size": 512, **(family.vae if family else {})}
    return Part("AutoencoderKL", prefix, stable_diffusion.vae(len(config["block_out_channels"])), config)


_HF_CLIP = {
    "cond_stage_model.transformer.": "text_encoder",
    "conditioner.embedders.0.transformer.": "text_encoder",
}
_OPEN_CLIP = {
    "cond_stage_model.model.": "text_encoder",
    "conditioner.embedders.1.model.": "text_encoder_2",
    "conditioner.embedders.0.model.": "text_encoder_2",
}


def _text_encoders(shapes: Shapes, family: _Family) -> dict[str, Part]:
    found = {}
    for prefix, name in _HF_CLIP.items():
        inside = below(shapes, prefix)
        if "text_model.embeddings.token_embedding.weight" in inside:
            config = infer.clip(inside, "quick_gelu")
            found[name] = Part("CLIPTextModel", prefix, stable_diffusion.CLIP, config, "transformers")
    for prefix, name in _OPEN_CLIP.items():
        inside = below(shapes, prefix)
        if "token_embedding.weight" in inside:
            found[name] = _open_clip(inside, prefix, projected=name == "text_encoder_2")
    return found


def _open_clip(shapes: Shapes, prefix: str, projected: bool) -> Part:
    renamed = {
        "text_model.embeddings.token_embedding.weight": shapes["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": shapes["positional_embedding"],
        "text_model.encoder.layers.0.mlp.fc1.weight": shapes["transformer.resblocks.0.mlp.c_fc.weight"],
    }
    layers = infer.count(shapes, "transformer.resblocks.{}.")
    whole = "text_projection" in shapes
    table = stable_diffusion.OPEN_CLIP
    if projected:
        renamed["text_projection.weight"] = shapes["text_projection"][::-1]
        return Part("CLIPTextModelWithProjection", prefix, table, infer.clip(renamed, "gelu", layers), "transformers")
    # Stable Diffusion 2 reads the last layer but one, so the last is left out, and the projection
    kept = tuple(row for row in table if row.theirs != "text_projection")
    last = Row(f"transformer.resblocks.{layers - 1}.", "", ())
    config = infer.clip(renamed, "gelu", layers - whole)
    return Part("CLIPTextModel", prefix, (last, *kept) if whole else kept, config, "transformers")


# -- transformers --------------------------------------------------------------------------------

_TRANSFORMERS: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    (
        "double_blocks.0.img_attn.qkv.weight", "FluxTransformer2DModel", "FLUX.1",
        ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
    ),
    (
        "joint_blocks.0.x_block.attn.qkv.weight", "SD3Transformer2DModel", "Stable Diffusion 3",
        ("vae", "text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3"),
    ),
)  # fmt: skip


def _transformer(shapes: Shapes) -> Verdict | None:
    for mark, class_name, family, companions in _TRANSFORMERS:
        prefix = next((p for p in (_UNET, "") if p + mark in shapes), None)
        if prefix is None:
            continue
        inside = below(shapes, prefix)
        flux = class_name.startswith("Flux")
        config = layouts.flux(inside) if flux else layouts.sd3(inside)
        part = Part(class_name, prefix, layouts.FLUX if flux else layouts.sd3_table(config["num_layers"]), config)
        pipeline = "FluxPipeline" if flux else "StableDiffusion3Pipeline"
        name = f"the transformer of {family} in its original layout"
        return Verdict("model", name, {"transformer": part}, pipeline, companions)
    return None


# -- one network ---------------------------------------------------------------------------------


def _lone_network(shapes: Shapes) -> Verdict | None:
    if "decoder.conv_in.weight" in shapes and "encoder.conv_in.weight" in shapes:
        original = any(n.startswith("decoder.up.") for n in shapes)
        if original:
            return Verdict("model", "an AutoencoderKL in its original layout", {"vae": _vae(shapes, "")})
    for class_name, marks in _MARKS.items():
        if all(any(mark(n) for n in shapes) for mark in marks):
            part = Part(class_name, "", None, {})
            return Verdict("model", f"a {class_name}, without configuration", {"model": part})
    return None


def _has(text: str) -> Callable[[str], bool]:
    return lambda name: text in name


# class -> what some names of its weights contain, most particular first
_MARKS: dict[str, tuple[Callable[[str], bool], ...]] = {
    "ControlNetModel": (_has("controlnet_cond_embedding.conv_in"), _has("controlnet_mid_block")),
    "FluxTransformer2DModel": (_has("single_transformer_blocks.0.proj_mlp"), _has("norm1_context")),
    "QwenImageTransformer2DModel": (_has("transformer_blocks.0.img_mod"), _has("txt_norm")),
    "SD3Transformer2DModel": (_has("transformer_blocks.0.norm1_context"), _has("pos_embed.proj")),
    "PixArtTransformer2DModel": (_has("adaln_single"), _has("caption_projection")),
    "AutoencoderKL": (_has("decoder.up_blocks.0"), _has("encoder.down_blocks.0"), _has("conv_norm_out")),
    "UNet2DConditionModel": (_has("down_blocks.0.resnets.0"), _has("attn2.to_k"), _has("conv_norm_out")),
    "UNet2DModel": (_has("down_blocks.0.resnets.0"), _has("conv_norm_out"), _has("time_embedding")),
    "T5EncoderModel": (_has("encoder.block.0.layer.0.SelfAttention"),),
    "CLIPTextModel": (_has("encoder.layers.0.self_attn"), _has("token_embedding")),
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
