"""Tiny random checkpoints of the transformer families, made with the peer's classes; no downloads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from transformers import T5Config, T5EncoderModel

from . import tiny

SHIFT = {"shift_factor": 0.06, "scaling_factor": 1.5, "use_quant_conv": False, "use_post_quant_conv": False}


def t5(width: int = 32) -> T5EncoderModel:
    torch.manual_seed(6)
    return T5EncoderModel(T5Config(vocab_size=514, d_model=width, d_kv=8, d_ff=37, num_layers=2, num_heads=4)).eval()


def shaken(model: Any) -> Any:
    """``model`` with noise on every weight: some are zero at first, which would hide a mistake."""
    torch.manual_seed(7)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model.eval()


def vae(channels: int) -> diffusers.AutoencoderKL:
    torch.manual_seed(1)
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 16), norm_num_groups=4, latent_channels=channels, sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **SHIFT,
    ).eval()  # fmt: skip


def flux(folder: Path, in_channels: int = 4, guidance: bool = False, **schedule: Any) -> dict[str, Any]:
    """Components of a tiny FLUX.1; one latent channel, so a token has four."""
    tok = tiny.tokenizer(folder / "tokenizer")
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=in_channels, out_channels=4, num_layers=1, num_single_layers=1,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8), guidance_embeds=guidance,
    )  # fmt: skip
    return {
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(**schedule),
        "vae": vae(1),
        "text_encoder": tiny.text_encoder(),
        "tokenizer": tok,
        "text_encoder_2": t5(),
        "tokenizer_2": tok,
        "transformer": shaken(transformer),
    }


def flux_controlnet(folder: Path, union: bool = False, several: bool = False) -> dict[str, Any]:
    """Components of a tiny FLUX.1 with one control network, or two of them."""
    torch.manual_seed(3)
    nets = [
        shaken(
            diffusers.FluxControlNetModel(
                patch_size=1,
                in_channels=4,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=32,
                pooled_projection_dim=32,
                axes_dims_rope=(4, 4, 8),
                num_mode=3 if union else None,
            )
        )
        for _ in range(2 if several else 1)
    ]
    return flux(folder) | {"controlnet": diffusers.FluxMultiControlNetModel(nets) if several else nets[0]}


def redux() -> dict[str, Any]:
    """Components of a tiny Redux, without text encoders."""
    from transformers import SiglipImageProcessorPil, SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(0)
    config = SiglipVisionConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16
    )
    return {
        "image_encoder": SiglipVisionModel(config).eval(),
        "feature_extractor": SiglipImageProcessorPil(size={"height": 32, "width": 32}),
        "image_embedder": diffusers.pipelines.flux.modeling_flux.ReduxImageEncoder(redux_dim=8, txt_in_features=4096),
    }


def stable_diffusion_3(folder: Path, in_channels: int = 16) -> dict[str, Any]:
    """Components of a tiny Stable Diffusion 3; its inpainting wants sixteen latent channels."""
    tok = tiny.tokenizer(folder / "tokenizer")
    torch.manual_seed(0)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=in_channels, out_channels=16, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=64, caption_projection_dim=32, pooled_projection_dim=64,
        pos_embed_max_size=48, qk_norm="rms_norm", dual_attention_layers=(0,),
    )  # fmt: skip
    return {
        "transformer": shaken(transformer),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        "vae": vae(16),
        "text_encoder": tiny.text_encoder(projection=True),
        "tokenizer": tok,
        "text_encoder_2": tiny.text_encoder(projection=True, seed=4),
        "tokenizer_2": tok,
        "text_encoder_3": t5(64),
        "tokenizer_3": tok,
    }


def sd3_controlnet(folder: Path, extra: int = 0) -> dict[str, Any]:
    """Components of a tiny Stable Diffusion 3 with a control network, ``extra`` channels for the mask."""
    torch.manual_seed(3)
    controlnet = diffusers.SD3ControlNetModel(
        sample_size=16, patch_size=2, in_channels=16, num_layers=1, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=64, caption_projection_dim=32, pooled_projection_dim=64, out_channels=16,
        pos_embed_max_size=48, extra_conditioning_channels=extra, force_zeros_for_pooled_projection=extra == 0,
    )  # fmt: skip
    return stable_diffusion_3(folder) | {"controlnet": shaken(controlnet)}


def qwen_image() -> dict[str, Any]:
    """Components of a tiny Qwen-Image without its text encoder: calls give embeddings."""
    torch.manual_seed(0)
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=3,
        joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    autoencoder = diffusers.AutoencoderKLQwenImage(
        base_dim=24, z_dim=4, dim_mult=[1, 2, 4], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=[0.0, 0.1, 0.2, 0.3], latents_std=[1.0, 1.1, 1.2, 1.3],
    )  # fmt: skip
    return {
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02),
        "vae": autoencoder.eval(),
        "text_encoder": None,
        "tokenizer": None,
        "transformer": shaken(transformer),
    }


def pixart(folder: Path, alpha: bool) -> dict[str, Any]:
    """Components of a tiny PixArt-alpha or -sigma."""
    torch.manual_seed(0)
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=16, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=3, caption_channels=32,
        in_channels=4, cross_attention_dim=24, out_channels=8, use_additional_conditions=False,
    )  # fmt: skip
    return {
        "transformer": shaken(transformer),
        "tokenizer": tiny.tokenizer(folder / "tokenizer", length=120 if alpha else 300),
        "text_encoder": t5(),
        "vae": tiny.vae(),
        "scheduler": diffusers.DPMSolverMultistepScheduler(),
    }


def dit() -> dict[str, Any]:
    """Components of a tiny DiT."""
    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        sample_size=16, num_layers=2, patch_size=4, attention_head_dim=8, num_attention_heads=2, in_channels=4,
        out_channels=8, num_embeds_ada_norm=1000,
    )  # fmt: skip
    return {"transformer": shaken(transformer), "vae": tiny.vae(), "scheduler": diffusers.DDIMScheduler()}


MAKERS: dict[str, Callable[[Path], Any]] = {
    "flux": lambda f: diffusers.FluxPipeline(**flux(f, use_dynamic_shifting=True)),
    "flux-dev": lambda f: diffusers.FluxPipeline(**flux(f, guidance=True)),
    "flux-fill": lambda f: diffusers.FluxFillPipeline(**flux(f, in_channels=4 + 4 + 16, guidance=True)),
    "flux-control": lambda f: diffusers.FluxControlPipeline(**flux(f, in_channels=8)),
    "flux-kontext": lambda f: diffusers.FluxKontextPipeline(**flux(f, guidance=True)),
    "flux-controlnet": lambda f: diffusers.FluxControlNetPipeline(**flux_controlnet(f)),
    "flux-union": lambda f: diffusers.FluxControlNetPipeline(**flux_controlnet(f, union=True)),
    "flux-redux": lambda f: diffusers.FluxPriorReduxPipeline(**redux()),
    "sd3": lambda f: diffusers.StableDiffusion3Pipeline(**stable_diffusion_3(f)),
    "sd3-33": lambda f: diffusers.StableDiffusion3InpaintPipeline(**stable_diffusion_3(f, 33)),
    "sd3-controlnet": lambda f: diffusers.StableDiffusion3ControlNetPipeline(**sd3_controlnet(f)),
    "sd3-controlnet-mask": lambda f: diffusers.StableDiffusion3ControlNetInpaintingPipeline(**sd3_controlnet(f, 1)),
    "qwen": lambda f: diffusers.QwenImagePipeline(**qwen_image()),
    "qwen-edit": lambda f: diffusers.QwenImageEditPipeline(**qwen_image(), processor=None),
    "pixart-alpha": lambda f: diffusers.PixArtAlphaPipeline(**pixart(f, alpha=True)),
    "pixart-sigma": lambda f: diffusers.PixArtSigmaPipeline(**pixart(f, alpha=False)),
    "dit": lambda f: diffusers.DiTPipeline(**dit()),
}

# components that a checkpoint was saved without; the peer wants to be told
ABSENT: dict[str, dict[str, None]] = {
    "qwen": {"text_encoder": None, "tokenizer": None},
    "qwen-edit": {"text_encoder": None, "tokenizer": None, "processor": None},
}
