"""QwenImageTransformer2DModel against the peer, and what compiling, offloading and training ask of it."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from effusion import QwenImageTransformer2DModel

from . import transformer_checks as checks
from .parity import assert_close, assert_same_signature, pair, public_config

TINY: dict[str, Any] = dict(
    in_channels=16,
    out_channels=4,
    num_layers=3,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=24,
    axes_dims_rope=(4, 4, 8),
)
CONFIGS: dict[str, dict[str, Any]] = {
    "image": TINY,
    "edit-2511": {**TINY, "zero_cond_t": True},
    "layered": {**TINY, "use_additional_t_cond": True, "use_layer3d_rope": True},
}
SHAPES: dict[str, list[tuple[int, int, int]]] = {
    "one": [(1, 3, 5)],
    "edit": [(1, 3, 4), (1, 2, 6), (1, 1, 3)],
    "many": [(1, 1, 2)] * 7,
}


def inputs(config: dict[str, Any], shapes: list[tuple[int, int, int]]) -> dict[str, Any]:
    g = torch.Generator().manual_seed(1)
    given = dict(
        hidden_states=torch.randn(2, sum(f * h * w for f, h, w in shapes), 16, generator=g),
        encoder_hidden_states=torch.randn(2, 6, 24, generator=g),
        timestep=torch.rand(2, generator=g),
        img_shapes=[shapes] * 2,
    )
    return {**given, "additional_t_cond": torch.tensor([0, 1])} if config.get("use_additional_t_cond") else given


MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("name", CONFIGS)
def test_numbers_and_config_are_the_peers(name: str, shapes: str) -> None:
    theirs, ours = pair("QwenImageTransformer2DModel", **CONFIGS[name])
    given = inputs(CONFIGS[name], SHAPES[shapes])
    plain = checks.run(ours, given)
    assert_close(plain, checks.run(theirs, given))
    masked = {**given, "encoder_hidden_states_mask": MASK.bool()}
    assert_close(checks.run(ours, masked), checks.run(theirs, masked))
    difference = (checks.run(ours, masked) - plain).abs().amax(dim=(1, 2))
    assert difference[0] < 1e-5 < 1e-3 < difference[1]
    assert public_config(ours) == public_config(theirs)
    assert ours.state_dict().keys() == theirs.state_dict().keys()


def test_signatures_are_the_peers() -> None:
    peer = diffusers.QwenImageTransformer2DModel
    assert_same_signature(QwenImageTransformer2DModel.__init__, peer.__init__)
    assert_same_signature(QwenImageTransformer2DModel.forward, peer.forward)
    for name in ("_no_split_modules", "_skip_layerwise_casting_patterns", "_repeated_blocks", "_keep_in_fp32_modules"):
        assert getattr(QwenImageTransformer2DModel, name) == getattr(peer, name)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_controlnet_samples_are_added_where_the_peer_adds_them(n: int) -> None:
    theirs, ours = pair("QwenImageTransformer2DModel", **TINY)
    given = {**inputs(TINY, SHAPES["one"]), "controlnet_block_samples": [torch.randn(2, 15, 32) for _ in range(n)]}
    assert_close(checks.run(ours, given), checks.run(theirs, given))


def test_what_is_missing_or_impossible_is_a_clear_error() -> None:
    given = inputs(TINY, SHAPES["one"])
    _, ours = pair("QwenImageTransformer2DModel", **TINY)
    with pytest.raises(ValueError, match="img_shapes"):
        ours(**{**given, "img_shapes": None})
    with pytest.raises(ValueError, match="guidance"):
        ours(**given, guidance=torch.ones(2))
    _, layered = pair("QwenImageTransformer2DModel", **CONFIGS["layered"])
    with pytest.raises(ValueError, match="additional_t_cond"):
        layered(**given)


@pytest.mark.parametrize("name", ["edit-2511"])
def test_fusing_checkpointing_compiling_and_fake_tensors(name: str) -> None:
    _, ours = pair("QwenImageTransformer2DModel", **CONFIGS[name])
    given = {**inputs(CONFIGS[name], SHAPES["edit"]), "encoder_hidden_states_mask": MASK}
    checks.check_fusing(ours, given)
    checks.check_checkpointing(ours, given)
    checks.check_compiling(ours, given)
    checks.check_fake(lambda: QwenImageTransformer2DModel(**CONFIGS[name]).eval(), given, torch.Size([2, 27, 16]))


def test_what_depends_on_time_and_text_only_can_be_hoisted() -> None:
    _, ours = pair("QwenImageTransformer2DModel", **TINY)
    names = checks.hoistable(ours, inputs(TINY, SHAPES["edit"]))
    assert {n for n, _ in ours.named_modules() if n.endswith(("img_mod.1", "txt_mod.1", "norm_out.linear"))} <= names
    assert {f"transformer_blocks.0.attn.add_{x}_proj" for x in "qkv"} <= names
    assert "img_in" not in names


def test_rotary_tables_are_computed_once_for_the_same_shapes() -> None:
    _, ours = pair("QwenImageTransformer2DModel", **TINY)
    text = torch.zeros(1)
    first = ours.pos_embed([(1, 2, 3)], 4, text)
    assert ours.pos_embed([(1, 2, 3)], 4, torch.zeros(2)) is first
    assert ours.pos_embed([(1, 3, 2)], 4, text) is not first
    assert ours.pos_embed([(1, 2, 3)], 4, text.to("meta")).is_meta
