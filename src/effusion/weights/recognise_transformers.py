"""Files of the transformer generation told apart: FLUX.1, Stable Diffusion 3, PixArt, Qwen-Image, and text encoders."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .entries import Computed
from .layouts import infer, pixart, qwen_image, text
from .layouts import stable_diffusion as classic
from .layouts import transformers as layouts
from .layouts.infer import Shapes, below
from .layouts.table import Row, translate
from .recognise_unets import UNET, VAE, vae
from .verdict import Part, Verdict

Config = Mapping[str, Any]
_SMALLER = 768  # width of the smaller of the two CLIP encoders, CLIP-L
_CLIP_L, _CLIP_G, _T5 = (f"text_encoders.{name}.transformer." for name in ("clip_l", "clip_g", "t5xxl"))
_FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}
_DEV = {**_FLOW, "shift": 3.0, "use_dynamic_shifting": True}
_SIXTEEN = {"sample_size": 1024, "force_upcast": True}
FLUX_VAE = {**_SIXTEEN, "scaling_factor": 0.3611, "shift_factor": 0.1159}
SD3_VAE = {**_SIXTEEN, "scaling_factor": 1.5305, "shift_factor": 0.0609}


@dataclass(frozen=True)
class _Kind:
    """A family: how its transformer is told and read, and what belongs to it."""

    name: str
    mark: str  # a tensor that only this family has
    class_name: str
    config: Callable[[Shapes], dict[str, Any]]
    table: Callable[[Config], tuple[Row, ...]]
    pipeline: Callable[[Config, Shapes], str]
    needs: tuple[str, ...]
    encoders: Mapping[str, str] = field(default_factory=dict)  # prefix in the file -> component
    vae: Callable[[str], Config] = lambda pipeline: {}
    scheduler: Callable[[Config], Config] = lambda config: _FLOW


def _flux_pipeline(config: Config, shapes: Shapes) -> str:
    names = {384: "FluxFillPipeline", 128: "FluxControlPipeline"}
    return names.get(config["in_channels"], "FluxPipeline")


def _pixart_pipeline(config: Config, shapes: Shapes) -> str:
    """Alpha has 120 tokens of text and sigma 300, which shows in the caption that stands for none."""
    tokens = shapes.get("y_embedder.y_embedding", (0,))[0]
    alpha = tokens == 120 or (tokens != 300 and config["use_additional_conditions"])
    return "PixArtAlphaPipeline" if alpha else "PixArtSigmaPipeline"


def _pixart_vae(pipeline: str) -> Config:
    return {"scaling_factor": 0.18215 if pipeline == "PixArtAlphaPipeline" else 0.13025}


_THREE = ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
_KINDS = (
    _Kind(
        "FLUX.1", "double_blocks.0.img_attn.qkv.weight", "FluxTransformer2DModel", layouts.flux,
        lambda config: layouts.FLUX, _flux_pipeline,
        ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
        {_CLIP_L: "text_encoder", _T5: "text_encoder_2"},
        lambda pipeline: FLUX_VAE,
        lambda config: _DEV if config["guidance_embeds"] else _FLOW,
    ),
    _Kind(
        "Stable Diffusion 3", "joint_blocks.0.x_block.attn.qkv.weight", "SD3Transformer2DModel", layouts.sd3,
        lambda config: layouts.sd3_table(config["num_layers"]), lambda config, shapes: "StableDiffusion3Pipeline",
        ("vae", *_THREE), {_CLIP_L: "text_encoder", _CLIP_G: "text_encoder_2", _T5: "text_encoder_3"},
        lambda pipeline: SD3_VAE,
        lambda config: {**_FLOW, "shift": 3.0},
    ),
    _Kind(
        "PixArt", "y_embedder.y_proj.fc1.weight", "PixArtTransformer2DModel", pixart.pixart,
        lambda config: pixart.PIXART, _pixart_pipeline, ("vae", "text_encoder", "tokenizer"),
        {_T5: "text_encoder"}, _pixart_vae,
        scheduler=lambda config: {"_class_name": "DPMSolverMultistepScheduler", "beta_schedule": "linear"},
    ),
    _Kind(
        "Qwen-Image", "transformer_blocks.0.img_mod.1.weight", "QwenImageTransformer2DModel", qwen_image.transformer,
        lambda config: qwen_image.TRANSFORMER, lambda config, shapes: "QwenImagePipeline", ("vae", "text_encoder", "tokenizer"),
        scheduler=lambda config: {**_FLOW, "use_dynamic_shifting": True, "shift_terminal": 0.02, "max_shift": 0.9,
                                  "base_shift": 0.5, "base_image_seq_len": 256, "max_image_seq_len": 8192,
                                  "time_shift_type": "exponential"},
    ),
)  # fmt: skip


def recognise_transformer(shapes: Shapes) -> Verdict | None:
    """A diffusion transformer in its original layout, alone or with what belongs to it; ``None`` if there is none."""
    for kind in _KINDS:
        prefix = next((p for p in (UNET, "") if p + kind.mark in shapes), None)
        if prefix is not None:
            return _verdict(kind, shapes, prefix)
    return None


def _verdict(kind: _Kind, shapes: Shapes, prefix: str) -> Verdict:
    config = kind.config(below(shapes, prefix))
    pipeline = kind.pipeline(config, below(shapes, prefix))
    parts = {"transformer": Part(kind.class_name, prefix, kind.table(config), config)}
    for place in (VAE, "vae."):
        if f"{place}decoder.conv_in.weight" in shapes:
            parts["vae"] = vae(below(shapes, place), place, kind.vae(pipeline))
    for place, name in kind.encoders.items():
        encoder = _encoder(below(shapes, place), place, projected=kind.class_name.startswith("SD3"))
        if encoder is not None:
            parts[name] = encoder
    missing = tuple(n for n in kind.needs if n not in parts)
    settings = {"scheduler": kind.scheduler(config)}
    whole = len(parts) > 1
    name = kind.name if whole else f"the transformer of {kind.name} in its original layout"
    return Verdict("pipeline" if whole else "model", name, parts, pipeline, missing, settings, kind.name)


def _encoder(shapes: Shapes, prefix: str, projected: bool) -> Part | None:
    """The text encoder whose tensors are ``shapes`` (transformers' names), or ``None`` if it is not there."""
    if "text_model.embeddings.token_embedding.weight" in shapes:
        width = shapes["text_model.embeddings.token_embedding.weight"][1]
        config = infer.clip(shapes, "gelu" if width > _SMALLER else "quick_gelu")
        class_name = "CLIPTextModelWithProjection" if projected else "CLIPTextModel"
        table = classic.CLIP if projected else classic.CLIP[:1]
        # files may leave out the projection of the smaller encoder, where it does nothing; that of the larger one does
        one = Computed((), lambda: torch.eye(width), torch.float32, (width, width))
        defaults = {"text_projection.weight": one} if projected and width == _SMALLER else {}
        return Part(class_name, prefix, table, config, "transformers", defaults)
    if "shared.weight" in shapes:
        return Part("T5EncoderModel", prefix, text.T5, text.t5(shapes), "transformers")
    return None


def recognise_text_encoder(shapes: Shapes) -> Verdict | None:
    """A text encoder alone: CLIP or T5, as transformers or llama.cpp name its tensors."""
    if "enc.blk.0.attn_q.weight" in shapes and "token_embd.weight" in shapes:
        ours = {hit.names[0]: s for n, s in shapes.items() if (hit := translate(text.T5_LLAMA, n)) is not None}
        part = Part("T5EncoderModel", "", text.T5_LLAMA, text.t5(ours), "transformers")
        return Verdict("model", "a T5 encoder in the layout of llama.cpp", {"text_encoder": part})
    marks = {"encoder.block.0.layer.0.SelfAttention.q.weight", "text_model.encoder.layers.0.self_attn.q_proj.weight"}
    if not marks & set(shapes):
        return None
    found = _encoder(shapes, "", projected="text_projection.weight" in shapes)
    return None if found is None else Verdict("model", f"a text encoder ({found.class_name})", {"text_encoder": found})


def recognise_qwen_vae(shapes: Shapes) -> Verdict | None:
    """Qwen-Image's autoencoder in the layout of Wan's."""
    if not {"encoder.downsamples.0.residual.2.weight", "decoder.head.2.weight", "conv2.weight"} <= set(shapes):
        return None
    config = qwen_image.vae(shapes)
    table = qwen_image.vae_table(len(config["dim_mult"]), config["num_res_blocks"])
    part = Part("AutoencoderKLQwenImage", "", table, config)
    return Verdict("model", "the autoencoder of Qwen-Image in its original layout", {"vae": part})
