"""Tiny pipelines of this library, saved once and loaded from files: their weights are slices of these."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tests.pipelines.tiny import tokenizer
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import effusion

SIZE = 32


def _clip(projection: bool = False) -> Any:
    config = CLIPTextConfig(
        vocab_size=514, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        projection_dim=16, bos_token_id=512, eos_token_id=513, pad_token_id=1, max_position_embeddings=77,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def _vae(channels: int = 4) -> Any:
    return effusion.AutoencoderKL(
        block_out_channels=(4, 8), norm_num_groups=2, latent_channels=channels, sample_size=16, layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        use_quant_conv=channels == 4, use_post_quant_conv=channels == 4, shift_factor=0.1 if channels != 4 else None,
    ).eval()  # fmt: skip


def _unet(**options: Any) -> Any:
    return effusion.UNet2DConditionModel(
        block_out_channels=(8, 8), layers_per_block=1, sample_size=SIZE // 2, norm_num_groups=2, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D",) * 2,
        **{"cross_attention_dim": 16, **options},
    ).eval()  # fmt: skip


def _ddim() -> Any:
    return effusion.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", set_alpha_to_one=False, steps_offset=1,
        clip_sample=False,
    )  # fmt: skip


def _sd(folder: Path) -> Any:
    return effusion.StableDiffusionPipeline(
        vae=_vae(), text_encoder=_clip(), tokenizer=tokenizer(folder / "tok"), unet=_unet(), scheduler=_ddim(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def _sdxl(folder: Path) -> Any:
    tok = tokenizer(folder / "tok")
    unet = _unet(
        addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=16 + 24,
        use_linear_projection=True, cross_attention_dim=32,
    )  # fmt: skip
    return effusion.StableDiffusionXLPipeline(
        vae=_vae(), text_encoder=_clip(), text_encoder_2=_clip(True), tokenizer=tok, tokenizer_2=tok, unet=unet,
        scheduler=_ddim(),
    )  # fmt: skip


def _flux(folder: Path) -> Any:
    transformer = effusion.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(2, 2, 4),
    ).eval()  # fmt: skip
    from transformers import T5Config, T5EncoderModel

    t5 = T5EncoderModel(T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)).eval()
    return effusion.FluxPipeline(
        scheduler=effusion.FlowMatchEulerDiscreteScheduler(), vae=_vae(4), text_encoder=_clip(),
        tokenizer=tokenizer(folder / "tok"), text_encoder_2=t5, tokenizer_2=None, transformer=transformer,
    )  # fmt: skip


MAKERS = {"sd": _sd, "sdxl": _sdxl, "flux": _flux}
CLASSES = {"sd": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline", "flux": "FluxPipeline"}


def save(name: str, folder: Path) -> Path:
    torch.manual_seed(0)
    MAKERS[name](folder).save_pretrained(folder / name)
    return folder / name


def load(name: str, folder: Path, **options: Any) -> Any:
    if name == "flux":  # its prompt is given as embeddings: no tokenizer for T5
        options["tokenizer_2"] = None
    pipe = getattr(effusion, CLASSES[name]).from_pretrained(folder / name, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def denoiser(pipe: Any) -> Any:
    return pipe.components.get("unet") or pipe.components["transformer"]


def run(name: str, pipe: Any, **options: Any) -> torch.Tensor:
    """Two pictures, ``(2, 32, 32, 3)``."""
    g = torch.Generator().manual_seed(5)
    text: dict[str, Any] = {"prompt": ["a cat", "a dog"], "guidance_scale": 3.0}
    if name == "flux":
        text = {"prompt_embeds": torch.randn(2, 5, 16, generator=g), "guidance_scale": 1.0}
        text["pooled_prompt_embeds"] = torch.randn(2, 16, generator=g)
    call = {"num_inference_steps": 2, "height": SIZE, "width": SIZE, "output_type": "pt", "generator": g, **text}
    return pipe(**{**call, **options}).images
