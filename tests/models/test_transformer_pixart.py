"""PixArtTransformer2DModel and DiTTransformer2DModel against the peer."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from effusion import DiTTransformer2DModel, PixArtTransformer2DModel

from . import transformer_checks as checks
from .parity import assert_close, assert_same_signature, pair, public_config

TINY: dict[str, Any] = dict(
    num_attention_heads=2,
    attention_head_dim=12,
    num_layers=3,
    sample_size=8,
    cross_attention_dim=24,
    caption_channels=20,
)
PIXART: dict[str, dict[str, Any]] = {
    "sigma": {**TINY, "use_additional_conditions": False},
    "alpha": {**TINY, "use_additional_conditions": True},
    "alpha-large": {**TINY, "sample_size": 128, "upcast_attention": True},
    "stretched": {**TINY, "interpolation_scale": 3, "out_channels": None},
    "affine": {**TINY, "norm_elementwise_affine": True, "activation_fn": "geglu", "attention_bias": False},
}
DIT: dict[str, dict[str, Any]] = {
    "plain": dict(num_attention_heads=2, attention_head_dim=12, num_layers=3, sample_size=8, num_embeds_ada_norm=10),
    "variance": dict(
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        sample_size=16,
        patch_size=4,
        out_channels=8,
        num_embeds_ada_norm=5,
        norm_elementwise_affine=True,
    ),
}


def pixart_inputs(config: dict[str, Any], height: int = 8, width: int = 8) -> dict[str, Any]:
    g = torch.Generator().manual_seed(1)
    sizes = {"resolution": torch.tensor([[64.0, 96.0], [32.0, 8.0]]), "aspect_ratio": torch.tensor([[0.5], [2.0]])}
    return dict(
        hidden_states=torch.randn(2, 4, height, width, generator=g),
        encoder_hidden_states=torch.randn(2, 6, 20, generator=g),
        timestep=torch.tensor([3.0, 900.0]),
        added_cond_kwargs=sizes,
    )


def dit_inputs(size: int = 8) -> dict[str, Any]:
    latents = torch.randn(2, 4, size, size, generator=torch.Generator().manual_seed(1))
    return dict(hidden_states=latents, timestep=torch.tensor([3, 900]), class_labels=torch.tensor([4, 5]))


@pytest.mark.parametrize("size", [(8, 8), (12, 6)])
@pytest.mark.parametrize("name", PIXART)
def test_pixart_numbers_and_config_are_the_peers(name: str, size: tuple[int, int]) -> None:
    theirs, ours = pair("PixArtTransformer2DModel", **PIXART[name])
    given = pixart_inputs(PIXART[name], *size)
    assert_close(checks.run(ours, given), checks.run(theirs, given))
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]])
    tokens = size[0] * size[1] // 4
    masked = {
        **given,
        "encoder_attention_mask": mask,
        "attention_mask": (torch.arange(tokens) < tokens - 2).long().expand(2, -1),
    }
    assert_close(checks.run(ours, masked), checks.run(theirs, masked))
    assert (checks.run(ours, masked) - checks.run(ours, given)).abs().max() > 1e-3
    assert public_config(ours) == public_config(theirs)
    assert ours.state_dict().keys() == theirs.state_dict().keys()


@pytest.mark.parametrize("name", DIT)
def test_dit_numbers_and_config_are_the_peers(name: str) -> None:
    theirs, ours = pair("DiTTransformer2DModel", **DIT[name])
    given = dit_inputs(DIT[name]["sample_size"])
    assert_close(checks.run(ours, given), checks.run(theirs, given))
    assert public_config(ours) == public_config(theirs)
    assert ours.state_dict().keys() == theirs.state_dict().keys()


def test_dit_takes_pictures_that_are_not_square() -> None:
    _, ours = pair("DiTTransformer2DModel", **DIT["plain"])
    given = dit_inputs()
    wide = {**given, "hidden_states": torch.randn(2, 4, 4, 12)}
    tall = {**given, "hidden_states": wide["hidden_states"].transpose(2, 3)}
    assert checks.run(ours, wide).shape == (2, 4, 4, 12)
    assert checks.run(ours, tall).shape == (2, 4, 12, 4)


@pytest.mark.parametrize("cls", [PixArtTransformer2DModel, DiTTransformer2DModel])
def test_signatures_are_the_peers(cls: Any) -> None:
    peer = getattr(diffusers, cls.__name__)
    assert_same_signature(cls.__init__, peer.__init__)
    assert_same_signature(cls.forward, peer.forward)
    for name in ("_skip_layerwise_casting_patterns", "_keep_in_fp32_modules", "_supports_group_offloading"):
        assert getattr(cls, name, True) == getattr(peer, name)


def test_what_is_missing_or_wrong_is_a_clear_error() -> None:
    _, pixart = pair("PixArtTransformer2DModel", **PIXART["alpha"])
    given = pixart_inputs(PIXART["alpha"])
    with pytest.raises(ValueError, match="resolution and aspect_ratio"):
        pixart(**{**given, "added_cond_kwargs": None})
    with pytest.raises(ValueError, match="give both"):
        pixart(**{**given, "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}})
    _, dit = pair("DiTTransformer2DModel", **DIT["plain"])
    with pytest.raises(ValueError, match="class_labels"):
        dit(dit_inputs()["hidden_states"], torch.zeros(2))
    with pytest.raises(ValueError, match="'layer_norm': a DiT"):
        DiTTransformer2DModel(norm_type="layer_norm")
    with pytest.raises(ValueError, match="'layer_norm': a PixArt"):
        PixArtTransformer2DModel(norm_type="layer_norm")
    with pytest.raises(ValueError, match="number of classes"):
        DiTTransformer2DModel(num_embeds_ada_norm=None)


def test_pixart_stands_training_compiling_and_fake_tensors() -> None:
    config = PIXART["alpha"]
    _, ours = pair("PixArtTransformer2DModel", **config)
    given = pixart_inputs(config, 12, 6)
    checks.check_checkpointing(ours, given)
    checks.check_compiling(ours, given)
    checks.check_fake(lambda: PixArtTransformer2DModel(**config).eval(), given, torch.Size([2, 8, 12, 6]))


def test_dit_stands_training_compiling_and_fake_tensors() -> None:
    _, ours = pair("DiTTransformer2DModel", **DIT["plain"])
    checks.check_checkpointing(ours, dit_inputs())
    checks.check_compiling(ours, dit_inputs())
    checks.check_fake(lambda: DiTTransformer2DModel(**DIT["plain"]).eval(), dit_inputs(), torch.Size([2, 4, 8, 8]))


def test_pixart_fuses_and_unfuses() -> None:
    _, ours = pair("PixArtTransformer2DModel", **PIXART["sigma"])
    given = pixart_inputs(PIXART["sigma"])
    before = checks.run(ours, given)
    ours.fuse_qkv_projections()
    assert_close(checks.run(ours, given), before, 1e-6)
    ours.unfuse_qkv_projections()
    assert torch.equal(checks.run(ours, given), before)


def test_what_depends_on_time_and_text_only_can_be_hoisted() -> None:
    _, ours = pair("PixArtTransformer2DModel", **PIXART["sigma"])
    names = checks.hoistable(ours, pixart_inputs(PIXART["sigma"]))
    assert "adaln_single.linear" in names
    assert {f"transformer_blocks.{i}.attn2.to_{x}" for i in range(3) for x in "kv"} <= names
    _, dit = pair("DiTTransformer2DModel", **DIT["plain"])
    names = checks.hoistable(dit, dit_inputs())
    assert {f"transformer_blocks.{i}.norm1.linear" for i in range(3)} | {"proj_out_1"} <= names


def test_dropped_labels_train_the_embedding_of_no_class() -> None:
    _, ours = pair("DiTTransformer2DModel", **DIT["plain"])
    ours.train()
    torch.manual_seed(0)
    ours(**{k: v.repeat_interleave(20, 0) for k, v in dit_inputs().items()}).sample.square().mean().backward()
    table = ours.transformer_blocks[0].norm1.emb.class_embedder.embedding_table.weight.grad
    assert set(table.abs().sum(1).nonzero().flatten().tolist()) == {4, 5, 10}
