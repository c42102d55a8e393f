"""FluxTransformer2DModel against the peer, and what compiling, offloading and training ask of it."""

from __future__ import annotations

import copy
from typing import Any

import diffusers
import pytest
import torch

from effusion import FluxTransformer2DModel
from effusion.nn.joint_attention import JointAttnProcessor

from . import transformer_checks as checks
from .parity import assert_close, assert_same_signature, pair, public_config

TINY: dict[str, Any] = dict(
    in_channels=16,
    num_layers=2,
    num_single_layers=3,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=24,
    pooled_projection_dim=20,
    axes_dims_rope=(4, 4, 8),
)
CONFIGS: dict[str, dict[str, Any]] = {
    "schnell": TINY,
    "dev": {**TINY, "guidance_embeds": True},
    "fill": {**TINY, "guidance_embeds": True, "in_channels": 96, "out_channels": 16},
    "control": {**TINY, "guidance_embeds": True, "in_channels": 32, "out_channels": 16},
    "two-by-two": {**TINY, "patch_size": 2},
}


def inputs(config: dict[str, Any], batch: int = 2) -> dict[str, Any]:
    g = torch.Generator().manual_seed(1)

    def noise(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=g)

    given = dict(
        hidden_states=noise(batch, 12, config["in_channels"]),
        encoder_hidden_states=noise(batch, 5, 24),
        pooled_projections=noise(batch, 20),
        timestep=torch.rand(batch, generator=g),
        img_ids=torch.randint(0, 9, (12, 3), generator=g).float(),
        txt_ids=torch.zeros(5, 3),
    )
    return {**given, "guidance": torch.full((batch,), 3.5)} if config.get("guidance_embeds") else given


@pytest.mark.parametrize("name", CONFIGS)
def test_numbers_and_config_are_the_peers(name: str) -> None:
    theirs, ours = pair("FluxTransformer2DModel", **CONFIGS[name])
    given = inputs(CONFIGS[name])
    assert_close(checks.run(ours, given), checks.run(theirs, given))
    assert public_config(ours) == public_config(theirs)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    theirs.load_state_dict(ours.state_dict(), strict=True)


def test_signatures_are_the_peers() -> None:
    peer = diffusers.FluxTransformer2DModel
    assert_same_signature(FluxTransformer2DModel.__init__, peer.__init__)
    assert_same_signature(FluxTransformer2DModel.forward, peer.forward)
    for name in ("_no_split_modules", "_skip_layerwise_casting_patterns", "_repeated_blocks", "_keep_in_fp32_modules"):
        assert getattr(FluxTransformer2DModel, name) == getattr(peer, name)


@pytest.mark.parametrize(("double", "single", "repeat"), [(1, 2, False), (2, 3, False), (2, 0, True), (1, 0, True)])
def test_controlnet_samples_are_added_where_the_peer_adds_them(double: int, single: int, repeat: bool) -> None:
    theirs, ours = pair("FluxTransformer2DModel", **TINY)
    given = inputs(TINY)
    more = {
        "controlnet_block_samples": [torch.randn(2, 12, 32) for _ in range(double)],
        "controlnet_single_block_samples": [torch.randn(2, 12, 32) for _ in range(single)] or None,
        "controlnet_blocks_repeat": repeat,
    }
    plain = checks.run(ours, given)
    assert_close(checks.run(ours, {**given, **more}), checks.run(theirs, {**given, **more}))
    assert (checks.run(ours, {**given, **more}) - plain).abs().max() > 1e-2


def test_half_precision_stays_near_the_peer() -> None:
    theirs, ours = pair("FluxTransformer2DModel", **CONFIGS["dev"])
    given = {k: v.bfloat16() if k != "img_ids" else v for k, v in inputs(CONFIGS["dev"]).items()}
    exact = checks.run(theirs, {k: v.float() for k, v in given.items()})
    wrong = (checks.run(theirs.bfloat16(), given) - exact).abs().max()
    assert (checks.run(ours.bfloat16(), given) - exact).abs().max() <= 1.5 * wrong


def test_missing_guidance_is_a_clear_error() -> None:
    _, ours = pair("FluxTransformer2DModel", **CONFIGS["dev"])
    with pytest.raises(ValueError, match="guidance"):
        ours(**inputs(TINY))


def test_batched_positions_are_understood(caplog: pytest.LogCaptureFixture) -> None:
    _, ours = pair("FluxTransformer2DModel", **TINY)
    given = inputs(TINY)
    batched = {**given, "img_ids": given["img_ids"].expand(2, 12, 3), "txt_ids": given["txt_ids"].expand(2, 5, 3)}
    assert torch.equal(checks.run(ours, batched), checks.run(ours, given))


def test_fused_projections() -> None:
    _, ours = pair("FluxTransformer2DModel", **TINY)
    checks.check_fusing(ours, inputs(TINY))


def test_adapters_are_not_fused_over() -> None:
    _, ours = pair("FluxTransformer2DModel", **TINY)

    class Patched(torch.nn.Linear):
        pass

    ours.transformer_blocks[0].attn.to_k = Patched(32, 32)
    with pytest.raises(ValueError, match="Patched"):
        ours.fuse_qkv_projections()


def test_checkpointing_compiling_and_fake_tensors() -> None:
    _, ours = pair("FluxTransformer2DModel", **CONFIGS["dev"])
    given = inputs(CONFIGS["dev"])
    checks.check_checkpointing(ours, given)
    checks.check_compiling(ours, given)
    checks.check_fake(lambda: FluxTransformer2DModel(**CONFIGS["dev"]).eval(), given, torch.Size([2, 12, 16]))


def test_what_depends_on_time_and_text_only_can_be_hoisted() -> None:
    _, ours = pair("FluxTransformer2DModel", **CONFIGS["dev"])
    names = checks.hoistable(ours, inputs(CONFIGS["dev"]))
    modulations = {n for n, _ in ours.named_modules() if n.endswith(".linear")}
    assert len(modulations) == 8
    assert modulations <= names
    assert {f"transformer_blocks.0.attn.add_{x}_proj" for x in "qkv"} <= names
    assert "x_embedder" not in names


def test_rotary_tables_are_computed_once_for_the_same_positions() -> None:
    _, ours = pair("FluxTransformer2DModel", **TINY)
    given = inputs(TINY)
    rotary = ours.pos_embed
    first = rotary(given["txt_ids"], given["img_ids"])
    checks.run(ours, given)
    assert rotary(given["txt_ids"], given["img_ids"]) is first
    given["img_ids"][0] += 1  # written to: not the same positions any more
    second = rotary(given["txt_ids"], given["img_ids"])
    assert not torch.equal(first, second)
    assert torch.equal(second, rotary(given["txt_ids"].clone(), given["img_ids"].clone()))
    with torch.inference_mode():
        assert rotary(given["txt_ids"], given["img_ids"]) is not second
    assert not copy.deepcopy(ours).pos_embed.memo._entries


def test_processors_can_be_replaced_and_get_the_arguments_they_know() -> None:
    _, ours = pair("FluxTransformer2DModel", **TINY)
    given = inputs(TINY)
    plain = checks.run(ours, given)
    seen = []

    class Scaled(JointAttnProcessor):
        def __call__(self, *args: Any, strength: float = 1.0) -> Any:  # type: ignore[override]
            seen.append(strength)
            out = super().__call__(*args)
            return tuple(strength * o for o in out) if isinstance(out, tuple) else strength * out

    before = ours.attn_processors
    assert set(before) == set(diffusers.FluxTransformer2DModel(**TINY).attn_processors)
    ours.set_attn_processor(Scaled())
    changed = checks.run(ours, {**given, "joint_attention_kwargs": {"strength": 0.5, "unknown": 1}})
    assert seen == [0.5] * 5
    assert (changed - plain).abs().max() > 1e-3
    ours.set_attn_processor(before)
    assert torch.equal(checks.run(ours, given), plain)
    with pytest.raises(ValueError, match="5 attention modules"):
        ours.set_attn_processor({"transformer_blocks.0.attn.processor": Scaled()})


def test_float16_keeps_the_largest_values_finite() -> None:
    from effusion.models.transformer_flux import _within_half

    assert _within_half(torch.tensor([float("inf"), -float("inf")]).half()).tolist() == [65504.0, -65504.0]
    assert _within_half(torch.tensor([float("inf")])).isinf().all()
