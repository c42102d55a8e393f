"""AutoencoderKLQwenImage against the peer: images, videos, tiles, slices."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.autoencoders import autoencoder_kl_qwenimage

from effusion import AutoencoderKLQwenImage

from .parity import assert_close, assert_same_signature, pair, public_config

TINY: dict[str, Any] = dict(
    base_dim=8,
    z_dim=4,
    dim_mult=[1, 2, 2],
    num_res_blocks=1,
    temperal_downsample=[False, True],
    latents_mean=[0.0] * 4,
    latents_std=[1.0] * 4,
)
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": TINY,
    "two-blocks": {**TINY, "num_res_blocks": 2, "dim_mult": [1, 1, 2], "input_channels": 4},
    "more-time": {**TINY, "temperal_downsample": [True, True]},
    "attention": {**TINY, "attn_scales": [1.0, 0.5]},
}


def noise(*size: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("frames", [1, 5, 11])
@pytest.mark.parametrize("name", CONFIGS)
def test_numbers_and_config_are_the_peers(name: str, frames: int, monkeypatch: pytest.MonkeyPatch) -> None:
    block = autoencoder_kl_qwenimage.QwenImageAttentionBlock
    forward = block.forward  # the peer hands its frame cache to blocks that don't take one, and fails
    monkeypatch.setattr(block, "forward", lambda self, x, *cache: forward(self, x))
    theirs, ours = pair("AutoencoderKLQwenImage", **CONFIGS[name])
    x = noise(2, CONFIGS[name].get("input_channels", 3), frames, 16, 24)
    with torch.no_grad():
        mine, other = ours.encode(x).latent_dist, theirs.encode(x).latent_dist
        assert_close(mine.parameters, other.parameters)
        assert_close(ours.decode(other.mean).sample, theirs.decode(other.mean).sample)
        assert ours.decode(other.mean, return_dict=False)[0].abs().max() <= 1
        drawn = ours(x, sample_posterior=True, generator=torch.Generator().manual_seed(2)).sample
        assert_close(drawn, theirs(x, sample_posterior=True, generator=torch.Generator().manual_seed(2)).sample)
    assert public_config(ours) == public_config(theirs)
    assert ours.state_dict().keys() == theirs.state_dict().keys()


def test_signatures_are_the_peers() -> None:
    for name in ("__init__", "forward", "encode", "decode", "enable_tiling", "tiled_encode", "tiled_decode"):
        assert_same_signature(getattr(AutoencoderKLQwenImage, name), getattr(diffusers.AutoencoderKLQwenImage, name))


@pytest.mark.parametrize("frames", [1, 5])
def test_tiles_are_the_peers(frames: int) -> None:
    theirs, ours = pair("AutoencoderKLQwenImage", **TINY)
    x, z = noise(1, 3, frames, 40, 28), noise(1, 4, 1 + (frames - 1) // 2, 10, 7)
    with torch.no_grad():
        plain = ours.decode(z).sample
        for model in (theirs, ours):
            model.enable_tiling(16, 20, 12, 16)
        assert_close(ours.encode(x).latent_dist.parameters, theirs.encode(x).latent_dist.parameters)
        assert_close(ours.decode(z).sample, theirs.decode(z).sample)
        assert_close(ours.tiled_encode(x), theirs.tiled_encode(x))
        assert (ours.decode(z).sample - plain).abs().max() > 1e-3
        ours.disable_tiling()
        assert torch.equal(ours.decode(z).sample, plain)


def test_slices_give_the_same() -> None:
    _, ours = pair("AutoencoderKLQwenImage", **TINY)
    x, z = noise(3, 3, 1, 16, 16), noise(3, 4, 1, 4, 4)
    seen: list[int] = []
    ours.decoder.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[0]))
    with torch.no_grad():
        latents, image = ours.encode(x).latent_dist.mean, ours.decode(z).sample
        ours.enable_slicing()
        assert_close(ours.encode(x).latent_dist.mean, latents, 1e-6)
        assert_close(ours.decode(z).sample, image, 1e-6)
    assert seen == [3, 1, 1, 1]


def test_a_frame_depends_on_no_later_one() -> None:
    _, ours = pair("AutoencoderKLQwenImage", **TINY)
    z = noise(1, 4, 4, 4, 4)
    with torch.no_grad():
        assert_close(ours.decode(z).sample[:, :, :3], ours.decode(z[:, :, :2]).sample, 1e-5)


def test_training_reaches_every_weight() -> None:
    _, ours = pair("AutoencoderKLQwenImage", **TINY)
    ours.train()
    latents = ours.encode(noise(1, 3, 5, 16, 16)).latent_dist.sample()
    ours.decoder(ours.post_quant_conv(latents)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ours.parameters())
