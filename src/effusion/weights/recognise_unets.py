"""Stable Diffusion's files (Rombach et al., 2022) told apart: 1.x, 2.x, XL, refiner, inpainting, LCM, ControlNet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from .layouts import infer, stable_diffusion
from .layouts.infer import Shapes, below
from .layouts.table import Row
from .verdict import Part, Verdict

UNET, _CONTROL, VAE = "model.diffusion_model.", "control_model.", "first_stage_model."
_FIRST = "input_blocks.0.0.weight"
# empty tensors by which some files say that they predict velocity, and that their schedule ends in pure noise
EMPTY_MARKS = ("v_pred", "ztsnr")
# for all samplers: what one does not know goes on to the next that is made from its configuration
_BETAS = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False,
}  # fmt: skip
_CLASSIC = {
    "_class_name": "PNDMScheduler",
    **_BETAS,
    "skip_prk_steps": True,
}
_EULER = {"_class_name": "EulerDiscreteScheduler", **_BETAS, "timestep_spacing": "leading"}


def recognise_unet(shapes: Shapes) -> Verdict | None:
    """A UNet or ControlNet in its original layout, alone or with what belongs to it; ``None`` if there is none."""
    for place in (_CONTROL, ""):
        if f"{place}input_hint_block.0.weight" in shapes and f"{place}{_FIRST}" in shapes:
            part = _controlnet(below(shapes, place), place)
            return Verdict("model", "a ControlNet in its original layout", {"controlnet": part})
    prefix = next((p for p in (UNET, "") if p + _FIRST in shapes), None)
    if prefix is None:
        return None
    parts = {"unet": _unet(below(shapes, prefix), prefix)}
    family = _family(parts["unet"].config)
    if f"{VAE}decoder.conv_in.weight" in shapes:
        parts["vae"] = vae(below(shapes, VAE), VAE, family.vae)
    parts.update(_text_encoders(shapes))
    settings = {"scheduler": _scheduler(shapes, family), **family.settings}
    pipeline, missing = _pipeline(parts["unet"].config, family), tuple(n for n in family.needs if n not in parts)
    if len(parts) == 1:
        name = f"the UNet of {family.name} in its original layout"
        return Verdict("model", name, parts, pipeline, missing, settings, family.name)
    return Verdict("pipeline", family.name, parts, pipeline, missing, settings, family.name)


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
_LCM = _Family("LCM", "LatentConsistencyModelPipeline", _SD, {**_CLASSIC, "_class_name": "LCMScheduler"})
_TWO = _Family(  # of the published ones most predict velocity, at 768 pixels; those for inpainting don't
    "Stable Diffusion 2.x", "StableDiffusionPipeline", _SD,
    {**_CLASSIC, "_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}, sample_size=96,
)  # fmt: skip
_TWO_INPAINT = replace(_TWO, scheduler={**_CLASSIC, "_class_name": "DDIMScheduler"}, sample_size=64)
_XL = _Family(
    "Stable Diffusion XL", "StableDiffusionXLPipeline",
    ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet"), _EULER, _XL_VAE, sample_size=128,
)  # fmt: skip
_REFINER = _Family(
    "Stable Diffusion XL refiner", "StableDiffusionXLImg2ImgPipeline",
    ("vae", "text_encoder_2", "tokenizer_2", "unet"), _EULER, _XL_VAE, {"requires_aesthetics_score": True}, 128,
)  # fmt: skip


def _family(config: Mapping[str, Any]) -> _Family:
    if "time_cond_proj_dim" in config:
        return _LCM
    if "addition_embed_type" in config:
        return _REFINER if config["cross_attention_dim"] == 1280 else _XL
    if config["use_linear_projection"]:
        return _TWO_INPAINT if config["in_channels"] == 9 else _TWO
    return _ONE


def _pipeline(config: Mapping[str, Any], family: _Family) -> str:
    if config["in_channels"] == 9:
        return family.pipeline.replace("Pipeline", "InpaintPipeline").replace("Img2ImgInpaint", "Inpaint")
    return family.pipeline


def _scheduler(shapes: Shapes, family: _Family) -> dict[str, Any]:
    """What the family was trained with; some files say by an empty tensor that they predict velocity."""
    config = dict(family.scheduler)
    if config["_class_name"] != "PNDMScheduler":
        config.pop("skip_prk_steps", None)
    prediction, terminal = EMPTY_MARKS
    if prediction in shapes:
        config["prediction_type"] = "v_prediction"
    if terminal in shapes:
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


def vae(shapes: Shapes, prefix: str, known: Mapping[str, Any] | None = None) -> Part:
    """An autoencoder in its original layout; ``known`` is what its family says and shapes don't."""
    config = infer.vae(shapes)
    if known is None and config["latent_channels"] == 16:  # alone it is nearly always that of FLUX.1
        known = {"scaling_factor": 0.3611, "shift_factor": 0.1159}
    config |= {"sample_size": 512, **(known or {})}
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


def _text_encoders(shapes: Shapes) -> dict[str, Part]:
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
