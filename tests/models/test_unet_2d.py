"""UNet2DModel against the peer."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from effusion import UNet2DModel

from .parity import assert_close, assert_same_signature, pair, public_config

DDPM: dict[str, Any] = dict(
    block_out_channels=(8, 16),
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    norm_num_groups=4,
    layers_per_block=1,
    attention_head_dim=4,
)
CONFIGS: dict[str, dict[str, Any]] = {
    "ddpm": DDPM,
    "google-ddpm": {
        **DDPM,
        "attention_head_dim": None,
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-6,
        "layers_per_block": 2,
    },
    "latent": {**DDPM, "in_channels": 4, "out_channels": 4, "center_input_sample": True},
    "fourier": {**DDPM, "time_embedding_type": "fourier"},
    "learned": {**DDPM, "time_embedding_type": "learned", "num_train_timesteps": 50},
    "consistency": {
        **DDPM,
        "resnet_time_scale_shift": "scale_shift",
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "num_class_embeds": 5,
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    },
    "edm-mid-norm": {**DDPM, "resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 2},
    "class-timestep": {**DDPM, "class_embed_type": "timestep", "act_fn": "mish"},
    "class-identity": {**DDPM, "class_embed_type": "identity", "mid_block_scale_factor": 1.3},
    "no-attention-in-middle": {**DDPM, "add_attention": False},
    "no-middle": {**DDPM, "mid_block_type": None, "time_embedding_dim": 12},
}


def inputs(name: str) -> dict[str, Any]:
    config = CONFIGS[name]
    generator = torch.Generator().manual_seed(3)
    given: dict[str, Any] = {
        "timestep": 37,
        "sample": torch.randn(2, config.get("in_channels", 3), 8, 8, generator=generator),
    }
    if "num_class_embeds" in config or config.get("class_embed_type") == "timestep":
        given["class_labels"] = torch.tensor([1, 3])
    elif "class_embed_type" in config:
        given["class_labels"] = torch.randn(2, 32, generator=generator)
    return given


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_numbers(name: str) -> None:
    theirs, ours = pair("UNet2DModel", **CONFIGS[name])
    assert public_config(ours) == public_config(theirs)
    given = inputs(name)
    tolerance = 1e-4 if name == "fourier" else 1e-5  # divided by the noise level after the sum
    assert_close(ours(**given).sample, theirs(**given).sample, tolerance)
    given["timestep"] = torch.tensor([3, 41])
    assert_close(ours(**given, return_dict=False)[0], theirs(**given, return_dict=False)[0], tolerance)


def test_gradient_checkpointing() -> None:
    theirs, ours = pair("UNet2DModel", **DDPM)
    gradients = []
    for model in (theirs, ours):
        model.train()(**inputs("ddpm")).sample.square().mean().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
    ours.zero_grad()
    ours.enable_gradient_checkpointing()
    ours(**inputs("ddpm")).sample.square().mean().backward()
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[1][name])
        torch.testing.assert_close(parameter.grad, gradients[0][name], rtol=1e-4, atol=1e-6)


def test_signatures_and_facts() -> None:
    for name in ("__init__", "forward"):
        assert_same_signature(getattr(UNet2DModel, name), getattr(diffusers.UNet2DModel, name))
    for fact in ("_no_split_modules", "_repeated_blocks", "_skip_layerwise_casting_patterns"):
        assert getattr(UNet2DModel, fact) == getattr(diffusers.UNet2DModel, fact)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"down_block_types": ("DownBlock2D", "SkipDownBlock2D")}, "down_block_types 'SkipDownBlock2D'"),
        ({"up_block_types": ("UpBlock2D",)}, "equally long"),
        ({"mid_block_type": "UNetMidBlock2DCrossAttn"}, "mid_block_type"),
        ({"downsample_type": "other"}, "downsample_type 'other'"),
        ({"class_embed_type": "other"}, "class_embed_type 'other'"),
        ({"time_embedding_type": "learned"}, "num_train_timesteps"),
        ({"time_embedding_type": "other"}, "time_embedding_type 'other'"),
    ],
)
def test_bad_options_are_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        UNet2DModel(**{**DDPM, **change})


def test_labels_must_fit() -> None:
    with pytest.raises(ValueError, match="class_labels must be None"):
        UNet2DModel(**DDPM)(torch.zeros(1, 3, 8, 8), 1, class_labels=torch.tensor([1]))
    with pytest.raises(ValueError, match="give class_labels"):
        UNet2DModel(**DDPM, num_class_embeds=3)(torch.zeros(1, 3, 8, 8), 1)
