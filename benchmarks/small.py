"""Random pipelines of moderate size, a few hundred megabytes each: large enough that numbers of memory mean something."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tests.pipelines.tiny import tokenizer
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

import effusion


def _clip(width: int, projection: bool = False) -> Any:
    config = CLIPTextConfig(
        vocab_size=514, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=6,
        num_attention_heads=width // 64, projection_dim=width, bos_token_id=512, eos_token_id=513, pad_token_id=1,
        max_position_embeddings=77,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def _t5(width: int) -> Any:
    config = T5Config(vocab_size=514, d_model=width, d_kv=64, d_ff=4 * width, num_layers=6, num_heads=width // 64)
    return T5EncoderModel(config).eval()


def _vae(w: int, channels: int = 4) -> Any:
    quant = channels == 4
    return effusion.AutoencoderKL(
        block_out_channels=(w, 2 * w, 4 * w, 4 * w), latent_channels=channels, layers_per_block=2, sample_size=256,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        use_quant_conv=quant, use_post_quant_conv=quant, shift_factor=None if quant else 0.06,
        norm_num_groups=w // 2,
    ).eval()  # fmt: skip


def _unet(w: int, cross: int, **options: Any) -> Any:
    return effusion.UNet2DConditionModel(
        block_out_channels=(2 * w, 4 * w, 8 * w), norm_num_groups=w // 2, layers_per_block=2,
        sample_size=32, cross_attention_dim=cross,
        attention_head_dim=8, down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), **options,
    ).eval()  # fmt: skip


def _ddim() -> Any:
    return effusion.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", set_alpha_to_one=False, steps_offset=1,
        clip_sample=False,
    )  # fmt: skip


def _sd(folder: Path, w: int) -> Any:
    return effusion.StableDiffusionPipeline(
        vae=_vae(w), text_encoder=_clip(8 * w), tokenizer=tokenizer(folder / "tok"), unet=_unet(w, 8 * w), scheduler=_ddim(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def _sdxl(folder: Path, w: int) -> Any:
    tok = tokenizer(folder / "tok")
    unet = _unet(
        w, 16 * w, addition_embed_type="text_time", addition_time_embed_dim=128, use_linear_projection=True,
        projection_class_embeddings_input_dim=8 * w + 6 * 128, transformer_layers_per_block=(1, 2, 2),
    )  # fmt: skip
    return effusion.StableDiffusionXLPipeline(
        vae=_vae(w), text_encoder=_clip(8 * w), text_encoder_2=_clip(8 * w, projection=True), tokenizer=tok, tokenizer_2=tok,
        unet=unet, scheduler=_ddim(),
    )  # fmt: skip


def _flux(folder: Path, w: int) -> Any:
    tok = tokenizer(folder / "tok")
    transformer = effusion.FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=3, num_single_layers=6, attention_head_dim=64, num_attention_heads=w // 8,
        joint_attention_dim=8 * w, pooled_projection_dim=8 * w, axes_dims_rope=(8, 28, 28),
    ).eval()  # fmt: skip
    return effusion.FluxPipeline(
        scheduler=effusion.FlowMatchEulerDiscreteScheduler(), vae=_vae(w, 16), text_encoder=_clip(8 * w), tokenizer=tok,
        text_encoder_2=_t5(8 * w), tokenizer_2=tok, transformer=transformer,
    )  # fmt: skip


def _sd3(folder: Path, w: int) -> Any:
    tok = tokenizer(folder / "tok")
    transformer = effusion.SD3Transformer2DModel(
        sample_size=64, patch_size=2, in_channels=16, out_channels=16, num_layers=8, attention_head_dim=64,
        num_attention_heads=w // 8, joint_attention_dim=16 * w, caption_projection_dim=8 * w, pooled_projection_dim=16 * w,
        pos_embed_max_size=96,
    ).eval()  # fmt: skip
    return effusion.StableDiffusion3Pipeline(
        transformer=transformer, scheduler=effusion.FlowMatchEulerDiscreteScheduler(shift=3.0), vae=_vae(w, 16),
        text_encoder=_clip(8 * w, projection=True), tokenizer=tok, text_encoder_2=_clip(8 * w, projection=True), tokenizer_2=tok,
        text_encoder_3=_t5(16 * w), tokenizer_3=tok,
    )  # fmt: skip


def _pixart(folder: Path, w: int) -> Any:
    transformer = effusion.PixArtTransformer2DModel(
        sample_size=32, num_layers=10, patch_size=2, attention_head_dim=64, num_attention_heads=w // 8,
        caption_channels=8 * w, in_channels=4, cross_attention_dim=8 * w, out_channels=8, use_additional_conditions=False,
    ).eval()  # fmt: skip
    return effusion.PixArtSigmaPipeline(
        transformer=transformer, tokenizer=tokenizer(folder / "tok", length=300), text_encoder=_t5(8 * w), vae=_vae(w),
        scheduler=effusion.DPMSolverMultistepScheduler(),
    )  # fmt: skip


MAKERS: dict[str, Callable[[Path, int], Any]] = {
    "Stable Diffusion": _sd,
    "SDXL": _sdxl,
    "SD 3": _sd3,
    "FLUX.1": _flux,
    "PixArt-Sigma": _pixart,
}


def save(name: str, folder: Path, width: int = 64) -> Path:
    """Write the pipeline ``name`` with random weights; the folder it is in. Half the ``width`` has a quarter of them."""
    torch.manual_seed(0)
    target = folder / name.replace(" ", "-")
    MAKERS[name](folder, width).save_pretrained(target)
    return target
