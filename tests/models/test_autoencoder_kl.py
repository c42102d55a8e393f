"""AutoencoderKL against the peer: numbers, tiles, slices, keys of old files, gradients."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from effusion import AutoencoderKL
from effusion.nn.vae import DiagonalGaussianDistribution

from .parity import assert_close, assert_same_signature, pair, public_config

TINY: dict[str, Any] = dict(
    block_out_channels=(8, 16),
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    norm_num_groups=4,
    sample_size=16,
)
CONFIGS: dict[str, dict[str, Any]] = {
    "stable-diffusion": {**TINY, "layers_per_block": 2},
    "sixteen-channels": {**TINY, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False},
    "attention-in-blocks": {
        **TINY,
        "down_block_types": ("AttnDownEncoderBlock2D", "DownEncoderBlock2D"),
        "up_block_types": ("UpDecoderBlock2D", "AttnUpDecoderBlock2D"),
    },
    "no-attention": {**TINY, "mid_block_add_attention": False},
    "gelu-grey": {**TINY, "act_fn": "gelu", "in_channels": 1, "out_channels": 1},
}


def picture(config: dict[str, Any], *size: int) -> torch.Tensor:
    return torch.rand(2, config.get("in_channels", 3), *size, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_numbers(name: str) -> None:
    theirs, ours = pair("AutoencoderKL", **CONFIGS[name])
    assert public_config(ours) == public_config(theirs)
    x = picture(CONFIGS[name], 12, 20)
    assert_close(ours.encode(x).latent_dist.parameters, theirs.encode(x).latent_dist.parameters)
    assert_close(ours(x).sample, theirs(x).sample)
    draws = [m(x, True, False, torch.Generator().manual_seed(2))[0] for m in (ours, theirs)]
    assert_close(*draws)


@pytest.mark.parametrize("size", [(40, 24), (16, 17), (56, 56)])
@torch.no_grad()
def test_tiles_and_slices(size: tuple[int, int]) -> None:
    theirs, ours = pair("AutoencoderKL", **TINY)
    x = picture(TINY, *size)
    whole = ours(x).sample
    ours.enable_slicing()
    torch.testing.assert_close(ours(x).sample, whole)
    for model in (theirs, ours):
        model.enable_tiling()
    for key in ("tile_sample_min_size", "tile_latent_min_size", "tile_overlap_factor"):
        assert getattr(ours, key) == getattr(theirs, key)
    assert_close(ours(x).sample, theirs(x).sample)
    assert not torch.equal(ours(x).sample, whole)
    ours.disable_tiling()
    ours.disable_slicing()
    assert torch.equal(ours(x).sample, whole)


def test_signatures() -> None:
    for name in ("__init__", "forward", "encode", "decode", "tiled_encode", "tiled_decode", "blend_v", "enable_tiling"):
        assert_same_signature(getattr(AutoencoderKL, name), getattr(diffusers.AutoencoderKL, name))
    for fact in ("_no_split_modules", "_repeated_blocks", "_skip_layerwise_casting_patterns"):
        assert getattr(AutoencoderKL, fact) == getattr(diffusers.AutoencoderKL, fact)


def test_old_keys_are_named() -> None:
    ours = AutoencoderKL(**TINY)
    old = {}
    for key, value in ours.state_dict().items():
        for was, now in ours._legacy_keys.items():
            key = key.replace(now, was)
        old[key] = value
    assert any(".proj_attn." in key for key in old)
    theirs = diffusers.AutoencoderKL(**TINY)
    theirs._fix_state_dict_keys_on_load(old)
    assert old.keys() == ours.state_dict().keys()


def test_gradient_checkpointing() -> None:
    _, ours = pair("AutoencoderKL", **TINY)
    x = picture(TINY, 8, 8)
    gradients = []
    for enable in (False, True):
        ours.zero_grad()
        if enable:
            ours.enable_gradient_checkpointing()
        ours(x).sample.square().mean().backward()
        gradients.append([p.grad.clone() for p in ours.parameters()])
    assert ours.is_gradient_checkpointing
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain)


@torch.no_grad()
def test_fused_projections() -> None:
    _, ours = pair("AutoencoderKL", **TINY)
    x, state, count = picture(TINY, 8, 8), ours.state_dict(), sum(p.numel() for p in ours.parameters())
    before = ours(x).sample
    ours.fuse_qkv_projections()
    assert any(name.endswith("to_qkv.weight") for name, _ in ours.named_parameters())
    assert sum(p.numel() for p in ours.parameters()) == count, "fusing must not keep the weights twice"
    assert ours.state_dict().keys() == state.keys()
    assert_close(ours(x).sample, before)
    ours.unfuse_qkv_projections()
    assert torch.equal(ours(x).sample, before)


def test_distribution() -> None:
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution as Theirs

    p, x = torch.randn(2, 8, 3, 3), torch.randn(2, 4, 3, 3)
    ours, theirs = DiagonalGaussianDistribution(p), Theirs(p)
    others = DiagonalGaussianDistribution(p.flip(0)), Theirs(p.flip(0))
    assert torch.equal(ours.kl(), theirs.kl())
    assert torch.equal(ours.nll(x), theirs.nll(x))
    assert torch.equal(ours.kl(others[0]), theirs.kl(others[1]))
    assert torch.equal(ours.mode(), theirs.mode())
    assert torch.equal(DiagonalGaussianDistribution(p, True).sample(), ours.mean)


def test_unknown_block_is_refused() -> None:
    with pytest.raises(ValueError, match=r"UpBlock.*AttnUpDecoderBlock2D"):
        AutoencoderKL(up_block_types=("UpBlock",))
    with pytest.raises(ValueError, match="equally long"):
        AutoencoderKL(block_out_channels=(8, 16))
