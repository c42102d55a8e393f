"""Tiny random checkpoints of published shapes, made with the peer's classes; no downloads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

SIZE = 32  # pixels; the tiny VAE scales by 2, the tiny UNet works on 16 x 16


def tokenizer(folder: Path, length: int = 77) -> CLIPTokenizer:
    """A CLIP tokenizer that knows every byte and no merges."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in visible]
    letters = [chr(b) for b in visible] + [chr(256 + i) for i in range(len(hidden))]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"model_max_length": length, "tokenizer_class": "CLIPTokenizer"})
    )
    return CLIPTokenizer.from_pretrained(folder)


def text_encoder(projection: bool = False, hidden: int = 32, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=514, hidden_size=hidden, intermediate_size=37, num_hidden_layers=3, num_attention_heads=4,
        projection_dim=32, bos_token_id=512, eos_token_id=513, pad_token_id=1, max_position_embeddings=77,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def vae(seed: int = 1, **options: Any) -> diffusers.AutoencoderKL:
    torch.manual_seed(seed)
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4, sample_size=SIZE,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **options,
    ).eval()  # fmt: skip


def unet(in_channels: int = 4, cross: int = 32, seed: int = 2, **options: Any) -> diffusers.UNet2DConditionModel:
    torch.manual_seed(seed)
    made = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=SIZE // 2, in_channels=in_channels, out_channels=4,
        norm_num_groups=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=4,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=cross, **options,
    )  # fmt: skip
    return listening(made).eval()


def listening(network: torch.nn.Module, gain: float = 8.0) -> Any:
    """A network of fresh weights hardly hears its conditioning; raise it, so that tests notice what is done to it."""
    ports = ("attn2.to_v", "attn2.to_out", "add_embedding.linear_2", "cond_proj")
    for name, parameter in network.named_parameters():
        if any(port in name for port in ports):
            parameter.data *= gain
    return network


def xl_unet(in_channels: int = 4, cross: int = 64, ids: int = 6, seed: int = 2) -> diffusers.UNet2DConditionModel:
    return unet(
        in_channels, cross, seed, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=32 + 8 * ids, use_linear_projection=True,
        transformer_layers_per_block=(1, 2),
    )  # fmt: skip


def controlnet(cross: int = 32, seed: int = 11, **options: Any) -> diffusers.ControlNetModel:
    """A control network for :func:`unet`, whose last layers are not the zeros that training starts from."""
    torch.manual_seed(seed)
    made = diffusers.ControlNetModel(
        block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), cross_attention_dim=cross,
        conditioning_embedding_out_channels=(8, 16), **options,
    )  # fmt: skip
    for name, parameter in made.named_parameters():
        if name.startswith("controlnet_"):
            torch.nn.init.normal_(parameter, std=0.2)
    return listening(made).eval()


def xl_controlnet(cross: int = 64, ids: int = 6, seed: int = 11) -> diffusers.ControlNetModel:
    return controlnet(
        cross, seed, addition_embed_type="text_time", addition_time_embed_dim=8, use_linear_projection=True,
        projection_class_embeddings_input_dim=32 + 8 * ids, transformer_layers_per_block=(1, 2),
    )  # fmt: skip


def scheduler(name: str = "DDIMScheduler", **options: Any) -> Any:
    base = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    if name in ("DDIMScheduler", "PNDMScheduler"):
        base |= {"set_alpha_to_one": False, "steps_offset": 1}
    return getattr(diffusers, name)(**base, **options)


def stable_diffusion(
    folder: Path, in_channels: int = 4, schedule: str = "DDIMScheduler", **unet_options: Any
) -> dict[str, Any]:
    """Components of a tiny Stable Diffusion 1.x."""
    return {
        "vae": vae(),
        "text_encoder": text_encoder(),
        "tokenizer": tokenizer(folder / "tokenizer"),
        "unet": unet(in_channels, **unet_options),
        "scheduler": scheduler(schedule),
        "safety_checker": None,
        "feature_extractor": None,
    }


def stable_diffusion_xl(
    folder: Path, in_channels: int = 4, schedule: str = "EulerDiscreteScheduler", refiner: bool = False
) -> dict[str, Any]:
    """Components of a tiny Stable Diffusion XL, base or refiner."""
    tok = tokenizer(folder / "tokenizer")
    return {
        "vae": vae(),
        "text_encoder": None if refiner else text_encoder(),
        "text_encoder_2": text_encoder(projection=True, seed=5),
        "tokenizer": None if refiner else tok,
        "tokenizer_2": tok,
        "unet": xl_unet(in_channels, 32 if refiner else 64, 5 if refiner else 6),
        "scheduler": scheduler(schedule),
    }


def v_prediction() -> Any:
    """The scheduler of Stable Diffusion 2.x at 768 pixels."""
    return scheduler("DDIMScheduler", prediction_type="v_prediction")


def safety(folder: Path, seed: int = 7) -> dict[str, Any]:
    """A safety checker and its feature extractor."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    torch.manual_seed(seed)
    vision = {"hidden_size": 16, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(vision_config={**vision, "image_size": SIZE, "patch_size": 8}, projection_dim=16)
    return {
        "safety_checker": StableDiffusionSafetyChecker(config).eval(),
        "feature_extractor": CLIPImageProcessor(crop_size=SIZE, size=SIZE),
    }


def asymmetric_vae(seed: int = 8) -> diffusers.AsymmetricAutoencoderKL:
    torch.manual_seed(seed)
    return diffusers.AsymmetricAutoencoderKL(
        down_block_out_channels=(8, 16), up_block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, sample_size=SIZE,
        layers_per_down_block=1, layers_per_up_block=1,
    ).eval()  # fmt: skip


def tiny_vae(seed: int = 9) -> diffusers.AutoencoderTiny:
    torch.manual_seed(seed)
    return diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1), latent_channels=4,
    ).eval()  # fmt: skip


def unconditional_unet(seed: int = 10) -> diffusers.UNet2DModel:
    torch.manual_seed(seed)
    return diffusers.UNet2DModel(
        sample_size=16, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip
