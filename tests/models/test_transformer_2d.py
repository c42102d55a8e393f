"""Transformer2DModel in its four kinds against the peer, and old checkpoints under their new names."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from effusion import DiTTransformer2DModel, PixArtTransformer2DModel, Transformer2DModel

from . import transformer_checks as checks
from .parity import assert_close, assert_same_signature, pair, public_config

COMMON: dict[str, Any] = dict(num_attention_heads=2, attention_head_dim=8, norm_num_groups=4, num_layers=2)
PATCHES = {**COMMON, "in_channels": 4, "patch_size": 2, "sample_size": 8, "norm_elementwise_affine": False}
CONFIGS: dict[str, dict[str, Any]] = {
    "pixels": {**COMMON, "in_channels": 8, "cross_attention_dim": 12},
    "pixels-linear": {
        **COMMON,
        "in_channels": 8,
        "cross_attention_dim": 12,
        "use_linear_projection": True,
        "only_cross_attention": True,
        "attention_bias": True,
        "activation_fn": "gelu",
    },
    "pixels-timed": {**COMMON, "in_channels": 8, "num_embeds_ada_norm": 10, "double_self_attention": True},
    "vectors": {
        **COMMON,
        "num_vector_embeds": 7,
        "sample_size": 4,
        "num_embeds_ada_norm": 10,
        "cross_attention_dim": 12,
    },
    "dit": {**PATCHES, "num_embeds_ada_norm": 10, "norm_type": "ada_norm_zero"},
    "pixart": {
        **PATCHES,
        "out_channels": 8,
        "norm_type": "ada_norm_single",
        "caption_channels": 12,
        "cross_attention_dim": 16,
        "use_additional_conditions": False,
    },
}


def inputs(name: str) -> dict[str, Any]:
    g = torch.Generator().manual_seed(1)
    text = torch.randn(2, 5, 12, generator=g)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    if name == "vectors":
        index = torch.randint(0, 7, (2, 16), generator=g)
        return dict(hidden_states=index, encoder_hidden_states=text, timestep=torch.tensor(3))
    if name == "dit":
        given = dict(timestep=torch.tensor([3, 900]), class_labels=torch.tensor([1, 4]))
        return {**given, "hidden_states": torch.randn(2, 4, 8, 8, generator=g)}
    given = dict(encoder_hidden_states=text, encoder_attention_mask=mask)
    if name == "pixart":
        return {**given, "hidden_states": torch.randn(2, 4, 8, 8, generator=g), "timestep": torch.tensor([3, 900])}
    given["hidden_states"] = torch.randn(2, 8, 4, 6, generator=g)
    return {"hidden_states": given["hidden_states"], "timestep": torch.tensor(3)} if name == "pixels-timed" else given


@pytest.mark.parametrize("name", CONFIGS)
def test_numbers_and_config_are_the_peers(name: str) -> None:
    theirs, ours = pair("Transformer2DModel", **CONFIGS[name])
    assert_close(checks.run(ours, inputs(name)), checks.run(theirs, inputs(name)))
    assert public_config(ours) == public_config(theirs)
    assert ours.state_dict().keys() == theirs.state_dict().keys()


def test_signatures_are_the_peers() -> None:
    assert_same_signature(Transformer2DModel.__init__, diffusers.Transformer2DModel.__init__)
    assert_same_signature(Transformer2DModel.forward, diffusers.Transformer2DModel.forward)


@pytest.mark.parametrize(("name", "cls"), [("dit", DiTTransformer2DModel), ("pixart", PixArtTransformer2DModel)])
def test_old_checkpoints_are_loaded_as_what_they_are_called_now(
    name: str, cls: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    theirs, ours = pair("Transformer2DModel", **CONFIGS[name])
    theirs.save_pretrained(tmp_path)
    logging.getLogger("effusion").addHandler(caplog.handler)
    again = Transformer2DModel.from_pretrained(tmp_path)
    logging.getLogger("effusion").removeHandler(caplog.handler)
    assert not caplog.records
    assert type(again) is cls
    assert torch.equal(checks.run(again, inputs(name)), checks.run(ours, inputs(name)))
    assert type(Transformer2DModel.from_config(ours.config)) is cls


def test_the_others_keep_their_name(tmp_path: Path) -> None:
    _, ours = pair("Transformer2DModel", **CONFIGS["vectors"])
    ours.save_pretrained(tmp_path)
    assert torch.equal(
        checks.run(Transformer2DModel.from_pretrained(tmp_path), inputs("vectors")), checks.run(ours, inputs("vectors"))
    )
    other = diffusers.Transformer2DModel.from_pretrained(tmp_path)
    assert_close(checks.run(ours, inputs("vectors")), checks.run(other, inputs("vectors")))


@pytest.mark.parametrize("name", ["pixels", "vectors"])
def test_checkpointing_gives_the_same_gradients(name: str) -> None:
    _, ours = pair("Transformer2DModel", **CONFIGS[name])
    checks.check_checkpointing(ours, inputs(name))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_channels": None}, "give either in_channels"),
        ({"num_vector_embeds": 4, "patch_size": 2}, "give either in_channels"),
        ({"patch_size": 2}, "needs sample_size"),
        ({"patch_size": 2, "sample_size": 8}, "'layer_norm' with patch_size"),
        ({"norm_type": "ada_norm_zero"}, "without patch_size"),
        ({"attention_type": "gated"}, "'gated' is not supported"),
    ],
)
def test_what_does_not_fit_is_a_clear_error(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Transformer2DModel(**{**CONFIGS["pixels"], **change})
