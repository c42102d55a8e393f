"""SD3Transformer2DModel against the peer, and what compiling, offloading and training ask of it."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from effusion import SD3Transformer2DModel

from . import transformer_checks as checks
from .parity import assert_close, assert_same_signature, pair, public_config

TINY: dict[str, Any] = dict(
    sample_size=8,
    in_channels=4,
    out_channels=4,
    num_layers=3,
    attention_head_dim=8,
    num_attention_heads=4,
    joint_attention_dim=24,
    caption_projection_dim=32,
    pooled_projection_dim=20,
    pos_embed_max_size=12,
)
CONFIGS: dict[str, dict[str, Any]] = {
    "3-medium": TINY,
    "3.5-large": {**TINY, "qk_norm": "rms_norm"},
    "3.5-medium": {**TINY, "qk_norm": "rms_norm", "dual_attention_layers": (0, 1)},
    "other-channels": {**TINY, "in_channels": 8, "patch_size": 4, "sample_size": 16},
}


def inputs(config: dict[str, Any], height: int = 16, width: int = 8) -> dict[str, Any]:
    g = torch.Generator().manual_seed(1)
    return dict(
        hidden_states=torch.randn(2, config["in_channels"], height, width, generator=g),
        encoder_hidden_states=torch.randn(2, 5, 24, generator=g),
        pooled_projections=torch.randn(2, 20, generator=g),
        timestep=torch.rand(2, generator=g) * 1000,
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_numbers_and_config_are_the_peers(name: str) -> None:
    theirs, ours = pair("SD3Transformer2DModel", **CONFIGS[name])
    given = inputs(CONFIGS[name])
    assert_close(checks.run(ours, given), checks.run(theirs, given))
    assert public_config(ours) == public_config(theirs)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    fresh = SD3Transformer2DModel(**CONFIGS[name])
    assert torch.equal(fresh.pos_embed.pos_embed, theirs.pos_embed.pos_embed)


def test_signatures_are_the_peers() -> None:
    peer = diffusers.SD3Transformer2DModel
    assert_same_signature(SD3Transformer2DModel.__init__, peer.__init__)
    assert_same_signature(SD3Transformer2DModel.forward, peer.forward)
    for name in ("_no_split_modules", "_skip_layerwise_casting_patterns", "_repeated_blocks", "_keep_in_fp32_modules"):
        assert getattr(SD3Transformer2DModel, name) == getattr(peer, name)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("skip", [None, [1], [0, 2]])
def test_controlnet_samples_and_skipped_layers(n: int, skip: list[int] | None) -> None:
    theirs, ours = pair("SD3Transformer2DModel", **CONFIGS["3.5-medium"])
    more = {"block_controlnet_hidden_states": [torch.randn(2, 32, 32) for _ in range(n)], "skip_layers": skip}
    given = inputs(TINY)
    assert_close(checks.run(ours, {**given, **more}), checks.run(theirs, {**given, **more}))
    assert (checks.run(ours, {**given, **more}) - checks.run(ours, given)).abs().max() > 1e-2


def test_a_picture_beyond_the_table_of_positions_is_a_clear_error() -> None:
    _, ours = pair("SD3Transformer2DModel", **TINY)
    with pytest.raises(ValueError, match="26x8 latents is 13x4 patches; this network has positions for 12x12"):
        ours(**inputs(TINY, height=26))


def test_feed_forward_in_chunks_is_the_same() -> None:
    _, ours = pair("SD3Transformer2DModel", **TINY)
    before = checks.run(ours, inputs(TINY))
    sizes = []
    ours.transformer_blocks[0].ff.register_forward_pre_hook(lambda module, args: sizes.append(tuple(args[0].shape)))
    ours.enable_forward_chunking(3, dim=1)
    assert_close(checks.run(ours, inputs(TINY)), before, 1e-6)
    ours.enable_forward_chunking()
    assert_close(checks.run(ours, inputs(TINY)), before, 1e-6)
    ours.disable_forward_chunking()
    assert torch.equal(checks.run(ours, inputs(TINY)), before)
    assert sizes == [(2, 3, 32)] * 10 + [(2, 2, 32)] + [(1, 32, 32)] * 2 + [(2, 32, 32)]
    with pytest.raises(ValueError, match="dim must be 0"):
        ours.enable_forward_chunking(dim=2)


def test_fusing_checkpointing_compiling_and_fake_tensors() -> None:
    config = CONFIGS["3.5-medium"]
    _, ours = pair("SD3Transformer2DModel", **config)
    given = inputs(config)
    checks.check_fusing(ours, given)
    checks.check_checkpointing(ours, given)
    checks.check_compiling(ours, given)
    checks.check_fake(lambda: SD3Transformer2DModel(**config).eval(), given, torch.Size([2, 4, 16, 8]))


def test_what_depends_on_time_and_text_only_can_be_hoisted() -> None:
    _, ours = pair("SD3Transformer2DModel", **CONFIGS["3.5-medium"])
    names = checks.hoistable(ours, inputs(TINY))
    modulations = {n for n, _ in ours.named_modules() if n.endswith(".linear")}
    assert len(modulations) == 7
    assert modulations <= names
    assert {f"transformer_blocks.0.attn.add_{x}_proj" for x in "qkv"} <= names


def test_processors_are_named_as_the_peers() -> None:
    theirs, ours = pair("SD3Transformer2DModel", **CONFIGS["3.5-medium"])
    assert set(ours.attn_processors) == set(theirs.attn_processors)
