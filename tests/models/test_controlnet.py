"""ControlNetModel and MultiControlNetModel against the peer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from effusion import ControlNetModel, MultiControlNetModel

from .parity import assert_close, assert_same_signature, pair, public_config

TINY: dict[str, Any] = dict(
    block_out_channels=(8, 16),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    layers_per_block=1,
    cross_attention_dim=12,
    norm_num_groups=4,
    attention_head_dim=4,
    conditioning_embedding_out_channels=(4, 8, 8, 8),
)
CONFIGS: dict[str, dict[str, Any]] = {
    "sd": TINY,
    "sd2": {**TINY, "attention_head_dim": (2, 4), "use_linear_projection": True, "upcast_attention": True},
    "sdxl": {
        **TINY,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "transformer_layers_per_block": (1, 2),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 30,
    },
    "shuffle": {**TINY, "global_pool_conditions": True, "layers_per_block": 2},
    "bgr": {**TINY, "controlnet_conditioning_channel_order": "bgr", "num_class_embeds": 5},
    "plain-middle": {**TINY, "mid_block_type": "UNetMidBlock2D", "conditioning_channels": 1},
    "only-cross": {**TINY, "only_cross_attention": True, "mid_block_scale_factor": 2.0, "act_fn": "gelu"},
}


def inputs(config: dict[str, Any], batch: int = 2) -> dict[str, Any]:
    g = torch.Generator().manual_seed(1)
    given: dict[str, Any] = dict(
        sample=torch.randn(batch, 4, 8, 8, generator=g),
        timestep=torch.tensor(300),
        encoder_hidden_states=torch.randn(batch, 5, 12, generator=g),
        controlnet_cond=torch.rand(batch, config.get("conditioning_channels", 3), 64, 64, generator=g),
        conditioning_scale=0.8,
    )
    if config.get("addition_embed_type"):
        size = torch.arange(6.0).expand(batch, 6)
        given["added_cond_kwargs"] = {"text_embeds": torch.randn(batch, 6, generator=g), "time_ids": size}
    if config.get("num_class_embeds"):
        given["class_labels"] = torch.arange(batch)
    return given


def assert_same(ours: Any, theirs: Any) -> None:
    assert len(ours[0]) == len(theirs[0])
    for a, b in zip((*ours[0], ours[1]), (*theirs[0], theirs[1]), strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("guess_mode", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_numbers_and_config_are_the_peers(name: str, guess_mode: bool) -> None:
    theirs, ours = pair("ControlNetModel", **CONFIGS[name])
    given = {**inputs(CONFIGS[name]), "guess_mode": guess_mode}
    with torch.no_grad():
        assert_same(ours(**given, return_dict=False), theirs(**given, return_dict=False))
        assert ours(**given).keys() == theirs(**given).keys()
    assert public_config(ours) == public_config(theirs)
    assert ours.state_dict().keys() == theirs.state_dict().keys()


def test_signatures_are_the_peers() -> None:
    for method in ("__init__", "forward", "from_unet"):
        assert_same_signature(getattr(ControlNetModel, method), getattr(diffusers.ControlNetModel, method))
    assert_same_signature(MultiControlNetModel.forward, diffusers.MultiControlNetModel.forward)


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_made_from_a_unet_it_starts_as_the_peers_and_adds_nothing(name: str) -> None:
    config = {k: v for k, v in CONFIGS[name].items() if not k.startswith("conditioning")}
    up = tuple(k.replace("Down", "Up") for k in reversed(config["down_block_types"]))
    their_unet, our_unet = pair("UNet2DConditionModel", **config, up_block_types=up)
    options: dict[str, Any] = dict(conditioning_embedding_out_channels=(4, 8, 8, 8), conditioning_channels=1)
    theirs = diffusers.ControlNetModel.from_unet(their_unet, **options)
    ours = ControlNetModel.from_unet(our_unet, **options)
    assert public_config(ours) == public_config(theirs)
    names = [k for k in theirs.state_dict() if not k.startswith("controlnet_cond_embedding")]
    assert all(torch.equal(ours.state_dict()[k], theirs.state_dict()[k]) for k in names)
    with torch.no_grad():
        down, mid = ours(**inputs({**config, "conditioning_channels": 1}), return_dict=False)
    assert not any(x.any() for x in (*down, mid))


def test_several_are_summed_and_saved_side_by_side(tmp_path: Path) -> None:
    pairs = [pair("ControlNetModel", seed=i, **TINY) for i in range(2)]
    theirs, ours = (
        cls([p[i] for p in pairs]) for i, cls in enumerate((diffusers.MultiControlNetModel, MultiControlNetModel))
    )
    given = inputs(TINY)
    image = given.pop("controlnet_cond")
    given.update(controlnet_cond=[image, 1 - image], conditioning_scale=[0.5, 2.0])
    with torch.no_grad():
        expected = theirs(**given, return_dict=False)
        assert_same(ours(**given, return_dict=False), expected)
        ours.save_pretrained(tmp_path / "controlnet")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["controlnet", "controlnet_1"]
        assert_same(MultiControlNetModel.from_pretrained(tmp_path / "controlnet")(**given, return_dict=False), expected)
        again = diffusers.MultiControlNetModel.from_pretrained(str(tmp_path / "controlnet"))
        assert_same(again(**given, return_dict=False), expected)
    with pytest.raises(ValueError, match="2 control networks with 1 images"):
        ours(**{**given, "controlnet_cond": [image]})
    with pytest.raises(OSError, match="no control networks"):
        MultiControlNetModel.from_pretrained(tmp_path / "nothing")


def test_what_is_wrong_is_a_clear_error() -> None:
    with pytest.raises(ValueError, match="channel_order 'grb'"):
        ControlNetModel(**{**TINY, "controlnet_conditioning_channel_order": "grb"})
    with pytest.raises(ValueError, match="2 down_block_types for 1"):
        ControlNetModel(**{**TINY, "block_out_channels": (8,)})


def test_training_with_checkpoints_gives_the_same_gradients() -> None:
    _, ours = pair("ControlNetModel", **TINY)
    gradients = []
    for switch in (ours.disable_gradient_checkpointing, ours.enable_gradient_checkpointing):
        switch()
        ours.zero_grad()
        down, mid = ours(**inputs(TINY), return_dict=False)
        sum(x.square().mean() for x in (*down, mid)).backward()
        gradients.append([p.grad.clone() for p in ours.parameters() if p.grad is not None])
    assert len(gradients[0]) > 50
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_attention_can_be_sliced() -> None:
    _, ours = pair("ControlNetModel", **TINY)
    with torch.no_grad():
        before = ours(**inputs(TINY), return_dict=False)
        ours.set_attention_slice("max")
        assert_same(ours(**inputs(TINY), return_dict=False), before)
