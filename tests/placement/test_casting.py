"""Layerwise casting: the peer's numbers, with every policy, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import diffusers.hooks
import pytest
import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from effusion.models.transformer_flux import FluxTransformer2DModel
from effusion.placement import casting, moving, policies
from effusion.placement.casting import apply_layerwise_casting
from effusion.placement.engine import engine_of

from . import toys
from .conftest import Policy

FP8 = torch.float8_e4m3fn
CONFIG: dict[str, Any] = {
    "patch_size": 1, "in_channels": 4, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 16,
    "num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": (4, 4, 8),
}  # fmt: skip


def flux_inputs() -> dict[str, Any]:
    g = torch.Generator().manual_seed(3)
    return {
        "hidden_states": torch.randn(1, 16, 4, generator=g),
        "encoder_hidden_states": torch.randn(1, 6, 32, generator=g),
        "pooled_projections": torch.randn(1, 32, generator=g),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(6, 3),
        "return_dict": False,
    }


def pair() -> tuple[nn.Module, nn.Module]:
    theirs = diffusers.FluxTransformer2DModel(**CONFIG).eval()
    ours = FluxTransformer2DModel(**CONFIG).eval()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"skip_modules_pattern": ("context",)},
        {"skip_modules_classes": (nn.LayerNorm,)},
        {"storage_dtype": torch.float8_e5m2},
        {"storage_dtype": torch.bfloat16},
    ],
    ids=str,
)
def test_same_weights_and_numbers_as_the_peer(options: dict[str, Any]) -> None:
    ours, theirs = pair()
    given = {"storage_dtype": FP8, "compute_dtype": torch.float32, **options}
    ours.enable_layerwise_casting(**given)
    theirs.enable_layerwise_casting(**given)
    assert {n: p.dtype for n, p in ours.named_parameters()} == {n: p.dtype for n, p in theirs.named_parameters()}
    assert ours.dtype == theirs.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(ours(**flux_inputs())[0], theirs(**flux_inputs())[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["UNet2DConditionModel", "AutoencoderKL", "SD3Transformer2DModel"])
def test_same_layers_as_the_peer(name: str) -> None:
    import effusion

    tiny: dict[str, dict[str, Any]] = {
        "UNet2DConditionModel": {
            "block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 2, "attention_head_dim": 4,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "cross_attention_dim": 8,
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        },
        "AutoencoderKL": {"block_out_channels": (4,), "norm_num_groups": 2},
        "SD3Transformer2DModel": {
            "num_layers": 1, "attention_head_dim": 4, "num_attention_heads": 2, "joint_attention_dim": 8,
            "caption_projection_dim": 8, "pooled_projection_dim": 8, "pos_embed_max_size": 4, "sample_size": 4,
        },
    }  # fmt: skip
    ours, theirs = getattr(effusion, name)(**tiny[name]), getattr(diffusers, name)(**tiny[name])
    for network in (ours, theirs):
        network.enable_layerwise_casting(FP8, torch.float32)
    wanted = {n: p.dtype for n, p in theirs.named_parameters()}
    assert FP8 in wanted.values()
    assert {n: p.dtype for n, p in ours.named_parameters()} == wanted


@pytest.mark.parametrize("pattern", ["auto", None, ("norm",), ("^enter$", r"\.up")], ids=str)
@pytest.mark.parametrize("classes", [None, (nn.Conv2d,)], ids=str)
def test_any_module_like_the_peer(pattern: Any, classes: Any) -> None:
    ours, theirs = toys.Net(), toys.Net()
    theirs.load_state_dict(ours.state_dict())
    apply_layerwise_casting(ours, FP8, torch.float32, pattern, classes)
    diffusers.hooks.apply_layerwise_casting(theirs, FP8, torch.float32, pattern, classes)
    if pattern is not None or classes is not None:
        wanted = {n: p.dtype for n, p in theirs.named_parameters()}
        assert {n: p.dtype for n, p in ours.named_parameters()} == wanted
    theirs.shift.data, x = ours.shift.data.clone().float(), torch.randn(2, 16)
    with torch.no_grad():
        for a, b in zip(ours(x), theirs(x), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_class_names_may_be_given_in_part() -> None:
    module = toys.Net()
    apply_layerwise_casting(module, FP8, torch.float32, "auto", skip_modules_classes=["conv"], non_blocking=True)
    assert module.conv.weight.dtype == torch.float32
    assert module.enter.weight.dtype == FP8


def test_under_every_policy_the_same_bits(policy: Policy, tmp_path: Path) -> None:
    """Cast first, policy first, both: as resident and cast."""
    module, x = toys.Net(), torch.randn(2, 16)
    plain = {k: v.clone() for k, v in module.state_dict().items()}
    apply_layerwise_casting(module, FP8, torch.float32)
    with torch.no_grad():
        wanted = module(x)
        policy(module, tmp_path)
        for _ in range(2):
            assert all(torch.equal(a, b) for a, b in zip(module(x), wanted, strict=True))
        policies.free(module)
        assert module.enter.weight.dtype == FP8
        policies.remove(module)
        assert all(torch.equal(a, b) for a, b in zip(module(x), wanted, strict=True))

        other = toys.Net()
        other.load_state_dict(plain), other.shift.copy_(module.shift)
        policy(other, tmp_path)
        other(x)
        apply_layerwise_casting(other, FP8, torch.float32)
        for _ in range(2):
            assert all(torch.equal(a, b) for a, b in zip(other(x), wanted, strict=True))
        policies.remove(other)


def test_undone_is_as_before_where_the_file_is_known(tmp_path: Path) -> None:
    ours, _ = pair()
    ours.save_pretrained(tmp_path)
    for mapped in (True, False):
        model = FluxTransformer2DModel.from_pretrained(tmp_path, disable_mmap=not mapped)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        model.enable_layerwise_casting()
        model.disable_layerwise_casting()
        same = all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert same == mapped
        assert {v.dtype for v in model.state_dict().values()} == {torch.float32}
        assert engine_of(model) is None or not engine_of(model).transforms  # type: ignore[union-attr]


def test_saving_keeps_the_stored_form(tmp_path: Path) -> None:
    ours, _ = pair()
    ours.enable_layerwise_casting()
    with torch.no_grad():
        wanted = ours(**flux_inputs())[0]
    ours.enable_group_offload("cpu", offload_type="leaf_level", offload_to_disk_path=tmp_path / "off")
    ours.save_pretrained(tmp_path / "saved")
    again = FluxTransformer2DModel.from_pretrained(tmp_path / "saved", torch_dtype="auto")
    assert again.proj_out.weight.dtype == torch.float32
    assert again.x_embedder.weight.dtype == FP8
    stored = ours.state_dict()
    assert all(torch.equal(v.view(torch.uint8), stored[k].view(torch.uint8)) for k, v in again.state_dict().items())
    again.enable_layerwise_casting(compute_dtype=torch.float32)
    with torch.no_grad():  # the same weights at other addresses: sums may round differently
        torch.testing.assert_close(again(**flux_inputs())[0], wanted, rtol=1e-5, atol=1e-6)
    ours.disable_group_offload()


def test_dtype_changes_what_is_computed_with(tmp_path: Path) -> None:
    module, x = toys.Net(), torch.randn(2, 16)
    apply_layerwise_casting(module, FP8, torch.float32)
    stored = {k: v.clone() for k, v in module.state_dict().items()}
    moving.to(module, torch.bfloat16)
    assert module.enter.weight.dtype == FP8
    assert torch.equal(module.enter.weight.view(torch.uint8), stored["enter.weight"].view(torch.uint8))
    assert casting.compute_dtype(module) == torch.bfloat16
    with torch.no_grad():
        assert module(x.bfloat16())[0].dtype == torch.bfloat16


def test_parts_can_be_cast_inside_an_offloaded_whole(tmp_path: Path) -> None:
    module, x = toys.Net(), torch.randn(2, 16)
    policies.apply_group_offloading(module, "cpu", offload_type="leaf_level", offload_to_disk_path=tmp_path)
    apply_layerwise_casting(module.blocks[1], FP8, torch.float32)
    assert module.blocks[1].up.weight.dtype == FP8 and module.blocks[2].up.weight.dtype == torch.float32
    with torch.no_grad():
        offloaded = module(x)
        policies.remove(module)
        assert all(torch.equal(a, b) for a, b in zip(module(x), offloaded, strict=True))


def test_encoders_of_transformers(policy: Policy, tmp_path: Path) -> None:
    """Their code reads dtypes of weights it has not called yet, and of the first parameter."""
    clip = CLIPTextModel(
        CLIPTextConfig(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    ).eval()
    t5 = T5EncoderModel(
        T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu")
    ).eval()
    ids = torch.tensor([[5, 6, 7, 1]])
    for encoder in (clip, t5):
        apply_layerwise_casting(encoder, FP8, torch.bfloat16)
        encoder.to(torch.bfloat16)
        apply_layerwise_casting(encoder, FP8, torch.bfloat16)
        assert encoder.dtype == torch.bfloat16
        with torch.no_grad():
            wanted = encoder(ids, attention_mask=torch.ones_like(ids))[0]
            assert wanted.dtype == torch.bfloat16 and bool(wanted.isfinite().all())
            policy(encoder, tmp_path)
            assert torch.equal(encoder(ids, attention_mask=torch.ones_like(ids))[0], wanted)
        policies.remove(encoder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"storage_dtype": torch.int8, "compute_dtype": torch.float32}, "floating-point"),
        ({"storage_dtype": FP8, "compute_dtype": "float32"}, "floating-point"),
        ({"storage_dtype": FP8, "compute_dtype": torch.float32, "skip_modules_pattern": "("}, "regular expression"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    module = toys.Net()
    with pytest.raises(ValueError, match=message):
        apply_layerwise_casting(module, **arguments)
    assert {p.dtype for p in module.parameters()} == {torch.float32}
