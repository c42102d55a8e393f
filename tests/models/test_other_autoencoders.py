"""AutoencoderTiny and AsymmetricAutoencoderKL against the peer."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from effusion import AsymmetricAutoencoderKL, AutoencoderTiny

from .parity import assert_close, assert_same_signature, pair, public_config

TINY: dict[str, Any] = dict(
    encoder_block_out_channels=(8, 8, 8, 8),
    decoder_block_out_channels=(8, 8, 8, 8),
    num_encoder_blocks=(1, 2, 1, 1),
    num_decoder_blocks=(2, 1, 1, 1),
)
ASYM: dict[str, Any] = dict(
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    down_block_out_channels=(4, 4, 8, 8),
    up_block_out_channels=(4, 8, 16, 16),
    norm_num_groups=4,
    layers_per_up_block=1,
)


def picture(*size: int) -> torch.Tensor:
    return torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("change", [{}, {"act_fn": "gelu", "latent_channels": 16}, {"upsample_fn": "bilinear"}])
@torch.no_grad()
def test_tiny_numbers(change: dict[str, Any]) -> None:
    theirs, ours = pair("AutoencoderTiny", **{**TINY, **change})
    assert public_config(ours) == public_config(theirs)
    x = picture(16, 24)
    assert_close(ours.encode(x).latents, theirs.encode(x).latents)
    z = theirs.encode(x).latents
    assert_close(ours.decode(z).sample, theirs.decode(z).sample)
    assert_close(ours(x).sample, theirs(x).sample)
    whole = ours.decode(z).sample
    ours.enable_slicing()
    torch.testing.assert_close(ours.decode(z).sample, whole)


@torch.no_grad()
def test_tiny_tiles() -> None:
    theirs, ours = pair("AutoencoderTiny", **TINY)
    x = picture(64, 80)
    for model in (theirs, ours):
        model.enable_tiling()
        model.tile_sample_min_size, model.tile_latent_min_size, model.tile_overlap_factor = 32, 4, 0.5
    for key in ("spatial_scale_factor", "tile_overlap_factor"):
        assert getattr(ours, key) == getattr(theirs, key)
    z = theirs.encode(x).latents
    assert_close(ours.encode(x).latents, z)
    assert_close(ours.decode(z).sample, theirs.decode(z).sample)
    ours.disable_tiling()
    assert not torch.allclose(ours.encode(x).latents, z)


@torch.no_grad()
def test_asymmetric_numbers() -> None:
    theirs, ours = pair("AsymmetricAutoencoderKL", **ASYM)
    assert public_config(ours) == public_config(theirs)
    x = picture(16, 24)
    mask = torch.zeros(2, 1, 16, 24)
    mask[..., 4:12, 8:] = 1
    assert_close(ours.encode(x).latent_dist.parameters, theirs.encode(x).latent_dist.parameters)
    assert_close(ours(x).sample, theirs(x).sample)
    masked = ours(x, mask).sample
    assert_close(masked, theirs(x, mask).sample)
    assert not torch.allclose(masked, ours(x).sample)
    ours.enable_slicing()
    torch.testing.assert_close(ours(x, mask).sample, masked)
    torch.testing.assert_close(ours(x, mask[:1]).sample, masked)


@pytest.mark.parametrize(("name", "config"), [("AutoencoderTiny", TINY), ("AsymmetricAutoencoderKL", ASYM)])
def test_gradient_checkpointing(name: str, config: dict[str, Any]) -> None:
    _, ours = pair(name, **config)
    x, mask = picture(16, 16), torch.ones(2, 1, 16, 16)
    mask[..., 8:] = 0
    gradients = []
    for enable in (False, True):
        ours.zero_grad()
        if enable:
            ours.enable_gradient_checkpointing()
        z = ours.encode(x, return_dict=False)[0]
        out = ours.decode(z).sample if name == "AutoencoderTiny" else ours.decode(z.mode(), None, x, mask).sample
        out.square().mean().backward()
        gradients.append({n: p.grad.clone() for n, p in ours.named_parameters()})
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient)


def test_signatures_and_facts() -> None:
    for ours, theirs in (
        (AutoencoderTiny, diffusers.AutoencoderTiny),
        (AsymmetricAutoencoderKL, diffusers.AsymmetricAutoencoderKL),
    ):
        for name in ("__init__", "forward", "encode", "decode"):
            assert_same_signature(getattr(ours, name), getattr(theirs, name))
        assert ours._skip_layerwise_casting_patterns == theirs._skip_layerwise_casting_patterns


def test_bad_options_are_named() -> None:
    with pytest.raises(ValueError, match="encoder_block_out_channels and num_encoder_blocks"):
        AutoencoderTiny(encoder_block_out_channels=(8, 8))
    with pytest.raises(ValueError, match="block type"):
        AsymmetricAutoencoderKL(down_block_types=("Other",))
