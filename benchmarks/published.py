"""Pipelines of the published sizes without their bytes: configurations, headers, and files that are one hole.

Enough to load and to plan with; every weight is zero and takes no room on the disk.
"""

from __future__ import annotations

import functools
import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tests.pipelines.tiny import tokenizer
from torch import Tensor, nn

import effusion
from effusion.weights.safetensors_file import DTYPE_NAMES

from .unet_step import SDXL

DTYPE = torch.bfloat16


def _clip(large: bool = False, projection: bool = True) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    width, layers = (1280, 32) if large else (768, 12)
    config = CLIPTextConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=width // 64,
        projection_dim=width, hidden_act="gelu" if large else "quick_gelu",
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def _t5() -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(
            vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
            feed_forward_proj="gated-gelu", tie_word_embeddings=False,
        )
    )  # fmt: skip


def _qwen_vl() -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {
        "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 128000,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "rope_theta": 1e6,
    }  # fmt: skip
    vision = {"hidden_size": 1280, "intermediate_size": 3420, "depth": 32, "num_heads": 16, "out_hidden_size": 3584}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))


def _vae(channels: int) -> Any:
    quant = channels == 4
    return effusion.AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), latent_channels=channels, layers_per_block=2, sample_size=1024,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        use_quant_conv=quant, use_post_quant_conv=quant, shift_factor=None if quant else 0.1159, scaling_factor=0.3611,
    )  # fmt: skip


def flux(short: Any, long: Any, scheduler: Any) -> Any:
    return effusion.FluxPipeline(
        scheduler=scheduler, vae=_vae(16),
        text_encoder=_clip(projection=False), tokenizer=short, text_encoder_2=_t5(), tokenizer_2=long,
        transformer=effusion.FluxTransformer2DModel(guidance_embeds=True),
    )  # fmt: skip


def sdxl(short: Any, long: Any, scheduler: Any) -> Any:
    unet = effusion.UNet2DConditionModel(**SDXL)
    return effusion.StableDiffusionXLPipeline(
        vae=_vae(4), text_encoder=_clip(projection=False), text_encoder_2=_clip(large=True), tokenizer=short,
        tokenizer_2=short, unet=unet, scheduler=scheduler,
    )  # fmt: skip


def stable_diffusion_3_5(short: Any, long: Any, scheduler: Any) -> Any:
    transformer = effusion.SD3Transformer2DModel(
        sample_size=128, num_layers=38, attention_head_dim=64, num_attention_heads=38, caption_projection_dim=2432,
        pos_embed_max_size=192, qk_norm="rms_norm",
    )  # fmt: skip
    return effusion.StableDiffusion3Pipeline(
        transformer=transformer, scheduler=scheduler, vae=_vae(16),
        text_encoder=_clip(), tokenizer=short, text_encoder_2=_clip(large=True), tokenizer_2=short,
        text_encoder_3=_t5(), tokenizer_3=long,
    )  # fmt: skip


def qwen_image(short: Any, long: Any, scheduler: Any) -> Any:
    return effusion.QwenImagePipeline(
        scheduler=scheduler, vae=effusion.AutoencoderKLQwenImage(),
        text_encoder=_qwen_vl(), tokenizer=long, transformer=effusion.QwenImageTransformer2DModel(),
    )  # fmt: skip


def pixart(short: Any, long: Any, scheduler: Any) -> Any:
    transformer = effusion.PixArtTransformer2DModel(
        sample_size=128, caption_channels=4096, in_channels=4, out_channels=8, cross_attention_dim=1152,
        use_additional_conditions=False,
    )  # fmt: skip
    return effusion.PixArtSigmaPipeline(
        transformer=transformer, tokenizer=long, text_encoder=_t5(), vae=_vae(4),
        scheduler=scheduler,
    )  # fmt: skip


_flow = functools.partial(effusion.FlowMatchEulerDiscreteScheduler, shift=3.0)
PIPELINES: dict[str, tuple[Callable[[Any, Any, Any], Any], Callable[[], Any]]] = {
    "FLUX.1": (flux, functools.partial(_flow, use_dynamic_shifting=True)),
    "SDXL": (sdxl, effusion.EulerDiscreteScheduler),
    "Stable Diffusion 3.5 large": (stable_diffusion_3_5, _flow),
    "Qwen-Image": (qwen_image, functools.partial(_flow, use_dynamic_shifting=True)),
    "PixArt-Sigma": (pixart, effusion.DPMSolverMultistepScheduler),
}


def save(name: str, folder: Path) -> Path:
    """Write the pipeline ``name`` without bytes of weights; the folder it is in."""
    target = folder / name.replace(" ", "-")
    short, long = tokenizer(folder / "short"), tokenizer(folder / "long", length=512)
    face, schedule = PIPELINES[name]
    scheduler = schedule()
    with torch.device("meta"):
        pipe = face(short, long, scheduler)
    pipe.save_config(target)
    for part, component in pipe.components.items():
        if not isinstance(component, nn.Module):
            if component is not None:
                component.save_pretrained(target / part)
            continue
        ours = hasattr(component, "save_config")
        (component.save_config if ours else component.config.save_pretrained)(target / part)
        file = "diffusion_pytorch_model" if ours else "model"
        hollow(target / part / f"{file}.safetensors", component.to(DTYPE).state_dict())
    return target


def hollow(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file of ``tensors`` that is one hole behind its header."""
    header, at = {}, 0
    for name, tensor in tensors.items():
        end = at + tensor.nbytes
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
