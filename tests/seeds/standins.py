"""Tiny checkpoints that stand in for the published ones which the snippets name."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import diffusers
import torch
from tests.pipelines import tiny, tiny_transformers

Files = dict[str, bytes]


def files_of(folder: Path) -> Files:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def saved(component: Any, **options: Any) -> Files:
    """The files that saving ``component`` makes."""
    with TemporaryDirectory() as folder:
        component.save_pretrained(folder, **options)
        return files_of(Path(folder))


def _vae() -> diffusers.AutoencoderKL:
    """Eight pixels per latent, as the published ones."""
    torch.manual_seed(1)
    return diffusers.AutoencoderKL(
        block_out_channels=(4,) * 4, norm_num_groups=4, latent_channels=4, sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    ).eval()  # fmt: skip


def _unet(cross: int, **options: Any) -> diffusers.UNet2DConditionModel:
    torch.manual_seed(2)
    return diffusers.UNet2DConditionModel(
        block_out_channels=(4, 4, 8), layers_per_block=1, sample_size=8, norm_num_groups=4, attention_head_dim=4,
        down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"), cross_attention_dim=cross,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"), **options,
    ).eval()  # fmt: skip


def _stable_diffusion(folder: Path) -> diffusers.StableDiffusionPipeline:
    """As wide as the published one where the snippets show it: 768 features of text."""
    parts = tiny.stable_diffusion(folder)
    parts |= {"vae": _vae(), "text_encoder": tiny.text_encoder(hidden=768), "unet": _unet(768)}
    parts |= {"scheduler": tiny.scheduler("PNDMScheduler", skip_prk_steps=True), **tiny.safety(folder)}
    return diffusers.StableDiffusionPipeline(**parts)


def _stable_diffusion_xl(folder: Path) -> diffusers.StableDiffusionXLPipeline:
    unet = _unet(
        64, addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=80,
        use_linear_projection=True, transformer_layers_per_block=(1, 1, 2),
    )  # fmt: skip
    return diffusers.StableDiffusionXLPipeline(**tiny.stable_diffusion_xl(folder) | {"vae": _vae(), "unet": unet})


def _pipeline(make: Any, **options: Any) -> Files:
    with TemporaryDirectory() as folder:
        return saved(make(Path(folder)), **options)


@cache
def stable_diffusion() -> Files:
    return _pipeline(_stable_diffusion)


@cache
def stable_diffusion_variant(variant: str) -> Files:
    """Every component's weights under the name of ``variant`` only."""
    return _pipeline(_stable_diffusion, variant=variant)


@cache
def stable_diffusion_half() -> Files:
    """The ``fp16`` branch of old: the ordinary names, half precision inside."""
    return _pipeline(lambda folder: _stable_diffusion(folder).to(torch.float16))


@cache
def controlnet() -> Files:
    torch.manual_seed(3)
    net = diffusers.ControlNetModel(
        block_out_channels=(4, 4, 8), layers_per_block=1, norm_num_groups=4, attention_head_dim=4,
        down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"), cross_attention_dim=768,
        conditioning_embedding_out_channels=(4, 4, 4, 4),
    )  # fmt: skip
    return saved(net)


@cache
def stable_diffusion_xl() -> Files:
    return _pipeline(_stable_diffusion_xl)


@cache
def sharded_xl_unet() -> Files:
    """The network of the XL stand-in in several files."""
    with TemporaryDirectory() as folder:
        return saved(_stable_diffusion_xl(Path(folder)).unet, max_shard_size="50KB")


def _flux(folder: Path) -> diffusers.FluxPipeline:
    torch.manual_seed(1)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4,) * 4, norm_num_groups=4, latent_channels=1, sample_size=32, **tiny_transformers.SHIFT,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    ).eval()  # fmt: skip
    return diffusers.FluxPipeline(**tiny_transformers.flux(folder) | {"vae": vae})


@cache
def flux() -> Files:
    return _pipeline(_flux)


CUSTOM = """
from diffusers import StableDiffusionPipeline

class Mine(StableDiffusionPipeline):
    sign = "mine"
"""


@cache
def with_code() -> Files:
    """A pipeline whose class is in its repository."""
    files = dict(stable_diffusion())
    index = json.loads(files["model_index.json"])
    files["model_index.json"] = json.dumps({**index, "_class_name": ["pipeline", "Mine"]}).encode()
    return {**files, "pipeline.py": CUSTOM.encode()}


@cache
def flux_transformer() -> Files:
    """As deep as the published one where a device map names its blocks."""
    torch.manual_seed(3)
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=38, attention_head_dim=8, num_attention_heads=1,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(2, 2, 4), guidance_embeds=True,
    )  # fmt: skip
    return {f"transformer/{name}": data for name, data in saved(transformer).items()}


def write(files: Files, folder: Path) -> Path:
    """Put ``files`` into ``folder``."""
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def part(files: Files, name: str) -> Files:
    """The files of one component."""
    return {f.removeprefix(f"{name}/"): data for f, data in files.items() if f.startswith(f"{name}/")}
