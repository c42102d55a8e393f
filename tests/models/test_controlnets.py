"""The control networks of FLUX and SD3 against the peer, and Redux's image encoder."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

import effusion
from effusion import FluxControlNetModel, FluxMultiControlNetModel, SD3ControlNetModel, SD3MultiControlNetModel

from . import test_transformer_flux as flux
from . import test_transformer_sd3 as sd3
from .parity import assert_close, assert_same_signature, pair, public_config

FLUX = {**flux.TINY, "axes_dims_rope": [4, 4, 8]}
FLUX_CONFIGS: dict[str, dict[str, Any]] = {
    "canny": {**FLUX, "guidance_embeds": True},
    "union": {**FLUX, "num_mode": 4},
    "double-only": {**FLUX, "num_single_layers": 0},
    "pixels": {**FLUX, "conditioning_embedding_channels": 4, "patch_size": 2},
}
SD3 = {**sd3.TINY, "num_layers": 2}
SD3_CONFIGS: dict[str, dict[str, Any]] = {
    "canny": SD3,
    "inpaint": {**SD3, "extra_conditioning_channels": 1},
    "3.5-medium": {**SD3, "qk_norm": "rms_norm", "dual_attention_layers": (0,)},
    "3.5-large": {**SD3, "joint_attention_dim": None, "use_pos_embed": False},
}


def noise(*size: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def flux_inputs(config: dict[str, Any]) -> dict[str, Any]:
    given = {**flux.inputs(config), "conditioning_scale": 0.7, "controlnet_cond": noise(2, 12, 16)}
    if config.get("num_mode"):
        given["controlnet_mode"] = torch.tensor([[1], [3]])
    if config.get("conditioning_embedding_channels"):
        given["controlnet_cond"] = noise(2, 3, 64, 48)
    return given


def sd3_inputs(config: dict[str, Any]) -> dict[str, Any]:
    given = {**sd3.inputs(config), "conditioning_scale": 0.7}
    given["controlnet_cond"] = noise(2, 4 + config.get("extra_conditioning_channels", 0), 16, 8)
    if config["joint_attention_dim"] is None:
        given.update(encoder_hidden_states=None, hidden_states=noise(2, 32, 32))
    return given


def assert_same_samples(ours: Any, theirs: Any) -> None:
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine is None) == (other is None)
        for a, b in zip(mine or (), other or (), strict=True):
            assert_close(a, b)


@pytest.mark.parametrize("name", FLUX_CONFIGS)
def test_flux_numbers_and_config_are_the_peers(name: str) -> None:
    theirs, ours = pair("FluxControlNetModel", **FLUX_CONFIGS[name])
    given = flux_inputs(FLUX_CONFIGS[name])
    with torch.no_grad():
        assert_same_samples(ours(**given, return_dict=False), theirs(**given, return_dict=False))
        assert ours(**given).keys() == theirs(**given).keys()
    assert public_config(ours) == public_config(theirs)
    assert ours.state_dict().keys() == theirs.state_dict().keys()


@pytest.mark.parametrize("name", SD3_CONFIGS)
def test_sd3_numbers_and_config_are_the_peers(name: str) -> None:
    theirs, ours = pair("SD3ControlNetModel", **SD3_CONFIGS[name])
    given = sd3_inputs(SD3_CONFIGS[name])
    with torch.no_grad():
        assert_same_samples(ours(**given, return_dict=False), theirs(**given, return_dict=False))
        assert ours(**given).keys() == theirs(**given).keys()
    assert public_config(ours) == public_config(theirs)
    assert ours.state_dict().keys() == theirs.state_dict().keys()


@pytest.mark.parametrize("name", ["FluxControlNetModel", "SD3ControlNetModel"])
def test_signatures_are_the_peers(name: str) -> None:
    for method in ("__init__", "forward", "from_transformer"):
        assert_same_signature(getattr(getattr(effusion, name), method), getattr(getattr(diffusers, name), method))


@pytest.mark.parametrize("name", ["FluxMultiControlNetModel", "SD3MultiControlNetModel"])
def test_signatures_of_several_are_the_peers(name: str) -> None:
    assert_same_signature(getattr(effusion, name).forward, getattr(diffusers, name).forward)


@pytest.mark.parametrize("nets", [1, 2])
def test_several_flux_networks_are_summed(nets: int) -> None:
    pairs = [pair("FluxControlNetModel", seed=i, **FLUX_CONFIGS["union"]) for i in range(nets)]
    given = {
        **flux.inputs(FLUX),
        "controlnet_cond": [noise(2, 12, 16, seed=i) for i in range(2)],
        "controlnet_mode": [torch.tensor([0, 1]), torch.tensor([2, 3])],
        "conditioning_scale": [0.5, 2.0],
    }
    theirs, ours = (
        diffusers.FluxMultiControlNetModel([a for a, _ in pairs]),
        FluxMultiControlNetModel([b for _, b in pairs]),
    )
    with torch.no_grad():
        assert_same_samples(ours(**given, return_dict=False), theirs(**given, return_dict=False))
    if nets > 1:
        with pytest.raises(ValueError, match="2 control networks with 1 images"):
            ours(**{**given, "controlnet_cond": [noise(2, 12, 16)]})


def test_several_sd3_networks_are_summed() -> None:
    pairs = [pair("SD3ControlNetModel", seed=i, **SD3) for i in range(2)]
    given = {
        **sd3.inputs(SD3),
        "controlnet_cond": [noise(2, 4, 16, 8, seed=i) for i in range(2)],
        "conditioning_scale": [0.5, 2.0],
    }
    theirs = diffusers.SD3MultiControlNetModel([a for a, _ in pairs])
    ours = SD3MultiControlNetModel([b for _, b in pairs])
    with torch.no_grad():
        assert_same_samples(ours(**given, return_dict=False), theirs(**given, return_dict=False))
    with pytest.raises(ValueError, match="2 control networks with 1 images"):
        ours(**{**given, "controlnet_cond": [noise(2, 4, 16, 8)]})


def test_flux_from_transformer_starts_as_the_peers_and_adds_nothing() -> None:
    theirs, ours = pair("FluxTransformer2DModel", **flux.CONFIGS["dev"])
    options = dict(num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2)
    mine = FluxControlNetModel.from_transformer(ours, **options)
    other = diffusers.FluxControlNetModel.from_transformer(theirs, **options)
    assert public_config(mine) == {k: v for k, v in public_config(other).items() if k != "out_channels"}
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in mine.state_dict().items())
    with torch.no_grad():
        assert all(not s.any() for part in mine(**flux_inputs(flux.CONFIGS["dev"]), return_dict=False) for s in part)


def test_sd3_from_transformer_starts_as_the_peers_and_adds_nothing() -> None:
    theirs, ours = pair("SD3Transformer2DModel", **sd3.CONFIGS["3.5-medium"])
    mine = SD3ControlNetModel.from_transformer(ours, num_layers=2)
    other = diffusers.SD3ControlNetModel.from_transformer(theirs, num_layers=2)
    assert public_config(mine) == public_config(other)
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in mine.state_dict().items())
    with torch.no_grad():
        given = sd3_inputs({**SD3, "extra_conditioning_channels": 1})
        assert all(not s.any() for s in mine(**given, return_dict=False)[0])
    with pytest.raises(ValueError, match="num_layers=3 blocks can't be taken"):
        SD3ControlNetModel.from_transformer(ours, num_layers=None)


def test_what_is_missing_or_too_much_is_a_clear_error() -> None:
    _, union = pair("FluxControlNetModel", **FLUX_CONFIGS["union"])
    given = flux_inputs(FLUX_CONFIGS["union"])
    with pytest.raises(ValueError, match="controlnet_mode"):
        union(**{**given, "controlnet_mode": None})
    _, canny = pair("SD3ControlNetModel", **SD3)
    with pytest.raises(ValueError, match=r"takes latents .* \(2, 32, 32\)"):
        canny(**{**sd3_inputs(SD3), "hidden_states": noise(2, 32, 32)})
    with pytest.raises(ValueError, match="needs `encoder_hidden_states`"):
        canny(**{**sd3_inputs(SD3), "encoder_hidden_states": None})
    _, large = pair("SD3ControlNetModel", **SD3_CONFIGS["3.5-large"])
    with pytest.raises(ValueError, match="leave out"):
        large(**{**sd3_inputs(SD3_CONFIGS["3.5-large"]), "encoder_hidden_states": noise(2, 5, 24)})


def test_training_with_checkpoints_gives_the_same_gradients() -> None:
    for name, config, given in (
        ("FluxControlNetModel", FLUX, flux_inputs(FLUX)),
        ("SD3ControlNetModel", SD3, sd3_inputs(SD3)),
    ):
        _, ours = pair(name, **config)
        gradients = []
        for switch in (ours.disable_gradient_checkpointing, ours.enable_gradient_checkpointing):
            switch()
            ours.zero_grad()
            sum(s.square().mean() for part in ours(**given, return_dict=False) for s in part).backward()
            gradients.append([p.grad.clone() for p in ours.parameters() if p.grad is not None])
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b)


def test_compiled_as_one_graph() -> None:
    _, ours = pair("FluxControlNetModel", **FLUX_CONFIGS["union"])
    given = flux_inputs(FLUX_CONFIGS["union"])
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(ours, backend="eager", fullgraph=True)(**given, return_dict=False)
        assert_same_samples(compiled, ours(**given, return_dict=False))


def test_redux_numbers_are_the_peers() -> None:
    theirs, ours = pair("ReduxImageEncoder", redux_dim=12, txt_in_features=8)
    with torch.no_grad():
        assert_close(ours(noise(2, 5, 12)).image_embeds, theirs(noise(2, 5, 12)).image_embeds)
    assert public_config(ours) == public_config(theirs)
