"""Stable Diffusion's files (Rombach et al., 2022) told apart: 1.x, 2.x, XL, refiner, inpainting, LCM, ControlNet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from ..core import registry
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
# Playground 2.5 was trained with the preconditioning of Karras et al. (2022); its files say so by two tensors
EDM_MARKS = ("edm_mean", "edm_std")
_EDM = {
    "_class_name": "EDMDPMSolverMultistepScheduler", "sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5,
    "rho": 7.0, "solver_order": 2, "algorithm_type": "dpmsolver++", "solver_type": "midpoint",
}  # fmt: skip
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
    unet = _unet(below(shapes, prefix), prefix)
    family = _family(unet.config, shapes)
    parts = {"unet": unet}
    if f"{VAE}decoder.conv_in.weight" in shapes:
        parts["vae"] = vae(below(shapes, VAE), VAE, family.vae)
        if family.scheduler is _EDM:
            parts["vae"] = _with_statistics(parts["vae"], shapes)
    parts.update(_text_encoders(shapes))
    settings = {"scheduler": _scheduler(shapes, family), **family.settings}
    missing = tuple(n for n in family.needs if n not in parts) if family.pipeline else ()
    lone = len(parts) == 1
    name = f"the UNet of {family.name} in its original layout" if lone else family.name
    if family.pipeline is None:
        name += ", for which there is no pipeline here; its networks can be loaded by themselves"
    kind = "model" if lone else "pipeline"
    return Verdict(kind, name, parts, family.pipeline, missing, settings, family.name)


@dataclass(frozen=True)
class _Family:
    name: str
    pipeline: str | None
    needs: tuple[str, ...]
    scheduler: Mapping[str, Any]
    vae: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    sample_size: int = 64


_SD = ("vae", "text_encoder", "tokenizer", "unet")
SD_VAE = {"scaling_factor": 0.18215}
XL_VAE = {"scaling_factor": 0.13025, "sample_size": 1024, "force_upcast": True}
_ONE = _Family("Stable Diffusion 1.x", "StableDiffusionPipeline", _SD, _CLASSIC, SD_VAE)
_LCM = _Family("LCM", "LatentConsistencyModelPipeline", _SD, {**_CLASSIC, "_class_name": "LCMScheduler"}, SD_VAE)
_TWO = _Family(  # of the published ones most predict velocity, at 768 pixels; those for other tasks don't
    "Stable Diffusion 2.x", "StableDiffusionPipeline", _SD,
    {**_CLASSIC, "_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}, SD_VAE, sample_size=96,
)  # fmt: skip
_TWO_TASKS = replace(_TWO, scheduler={**_CLASSIC, "_class_name": "DDIMScheduler"}, sample_size=64)
_UPSCALER = replace(_TWO, vae={"scaling_factor": 0.08333, "sample_size": 256}, sample_size=128)
_XL = _Family(
    "Stable Diffusion XL", "StableDiffusionXLPipeline",
    ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet"), _EULER, XL_VAE, sample_size=128,
)  # fmt: skip
_XL_LCM = replace(_XL, name="Stable Diffusion XL, LCM", scheduler={**_EULER, "_class_name": "LCMScheduler"})
_PLAYGROUND = replace(_XL, name="Playground 2.5", scheduler=_EDM, vae={**XL_VAE, "scaling_factor": 0.5})
_REFINER = _Family(
    "Stable Diffusion XL refiner", "StableDiffusionXLImg2ImgPipeline",
    ("vae", "text_encoder_2", "tokenizer_2", "unet"), _EULER, XL_VAE, {"requires_aesthetics_score": True}, 128,
)  # fmt: skip
# what a UNet may be given beside latents, by the number of its input channels
_INPUTS = {
    5: "for depth to image",
    7: "for upscaling by four",
    8: "for editing by instruction (InstructPix2Pix)",
}


def _family(config: Mapping[str, Any], shapes: Shapes) -> _Family:
    """The family of a UNet, with the pipeline for the channels that it is given; ``None`` as that if there is none."""
    base, channels = _base(config, shapes), config["in_channels"]
    if config.get("class_embed_type") == "projection":
        return replace(base, name=f"{base.name} conditioned on a picture (unCLIP)", pipeline=None)
    if channels == config["out_channels"]:
        return base
    if channels == 9:
        inpaint = str(base.pipeline).replace("Pipeline", "InpaintPipeline").replace("Img2ImgInpaint", "Inpaint")
        if inpaint in registry.public_names():
            return replace(base, pipeline=inpaint)
    what = _INPUTS.get(channels, "for inpainting" if channels == 9 else f"with {channels} input channels")
    return replace(base, name=f"{base.name} {what}", pipeline=None)


def _base(config: Mapping[str, Any], shapes: Shapes) -> _Family:
    distilled = "time_cond_proj_dim" in config
    if "addition_embed_type" in config:
        if config["cross_attention_dim"] == 1280:
            return _REFINER
        if set(EDM_MARKS) <= set(shapes):
            return _PLAYGROUND
        return _XL_LCM if distilled else _XL
    if distilled:
        return _LCM
    if config["use_linear_projection"]:
        tasks = {4: _TWO, 7: _UPSCALER}
        return tasks.get(config["in_channels"], _TWO_TASKS)
    return _ONE


def _with_statistics(part: Part, shapes: Shapes) -> Part:
    """The latents of Playground 2.5 are normalised channel by channel, by numbers that are in the file."""
    for name in EDM_MARKS:
        if prod(shapes[name]) != part.config["latent_channels"]:
            raise ValueError(f"{name} {list(shapes[name])} is not one number for each channel of the latents")
    return replace(part, facts=dict(zip(("latents_mean", "latents_std"), EDM_MARKS, strict=True)))


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
    config["sample_size"] = _base(config, shapes).sample_size
    projection = "class_embed_type" in config
    blocks, layers = len(config["block_out_channels"]), config["layers_per_block"]
    table = stable_diffusion.unet(blocks, layers, infer.up_attention(config), projection)
    return Part("UNet2DConditionModel", prefix, table, config)


def _controlnet(shapes: Shapes, prefix: str) -> Part:
    config = infer.controlnet(shapes)
    blocks, layers = len(config["block_out_channels"]), config["layers_per_block"]
    table = stable_diffusion.controlnet(blocks, layers, infer.controlnet_hints(shapes))
    return Part("ControlNetModel", prefix, table, config)


def vae(shapes: Shapes, prefix: str, known: Mapping[str, Any]) -> Part:
    """An autoencoder in its original layout; ``known`` is what its family says and shapes don't."""
    config = {**infer.vae(shapes), "sample_size": 512, **known}
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
            found[name] = Part("CLIPTextModel", prefix, stable_diffusion.CLIP[:1], config, "transformers")
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
