"""The warnings, tips and claims of the two memory guides: what each is about does not happen here, or is said clearly."""

from __future__ import annotations

import importlib.util
import inspect
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from effusion.hooks import apply_group_offloading, apply_layerwise_casting
from tests.placement import tiny_pipelines as tiny
from tests.placement.conftest import travel_always
from torch import nn

import effusion
from effusion.core.errors import PlanConflict
from effusion.placement import lane
from effusion.placement.engine import engine_of

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipelines")
    for name in tiny.MAKERS:
        tiny.save(name, folder)
    return folder


@pytest.fixture
def pipe(saved: Path) -> Iterator[Any]:
    found = tiny.load("sd", saved)
    yield found
    found.remove_all_hooks()


def travelling(pipe: Any) -> None:
    """Without an accelerator: let weights of the host travel all the same."""
    for module in pipe.modules.values():
        if engine_of(module) is not None:
            travel_always(module)


# -- sharding and device maps ------------------------------------------------------------------------------------


def test_sharded_checkpoints_are_the_same_weights(saved: Path, tmp_path: Path) -> None:
    unet = tiny.load("sd", saved).unet
    unet.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    for library in (effusion, diffusers):
        again = library.UNet2DConditionModel.from_pretrained(tmp_path)
        assert all(torch.equal(v, unet.state_dict()[k]) for k, v in again.state_dict().items())


def test_only_balanced_is_supported_there_all_strategies_here(saved: Path) -> None:
    for strategy in ("balanced", "auto", "sequential"):
        found = tiny.load("sd", saved, device_map=strategy)
        assert set(found.hf_device_map) == set(found.modules)
    with pytest.raises(ValueError, match="no device"):
        tiny.load("sd", saved, device_map="unbalanced")


def test_reset_device_map_is_not_necessary(saved: Path) -> None:
    mapped = tiny.load("sd", saved, device_map="balanced")
    wanted = tiny.run("sd", mapped)
    mapped.enable_sequential_cpu_offload(device="cpu")
    assert torch.equal(tiny.run("sd", mapped), wanted)
    mapped.enable_model_cpu_offload(device="cpu")
    assert torch.equal(tiny.run("sd", mapped), wanted)
    assert torch.equal(tiny.run("sd", mapped.to("cpu")), wanted)
    assert mapped.hf_device_map is None


# -- slicing and tiling --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("switch", ["slicing", "tiling"])
def test_a_vae_without_slicing_or_tiling_is_named(switch: str, pipe: Any) -> None:
    """As the guide says of AsymmetricAutoencoderKL: here an error that says what saves memory instead."""

    class Plain(nn.Module):
        config = pipe.vae.config

    pipe.vae = Plain()
    with pytest.raises(PlanConflict, match=f"Plain doesn't support {switch}.*enable_group_offload"):
        getattr(pipe, f"enable_vae_{switch}")()


def test_the_asymmetric_autoencoder_has_slices_but_no_tiles(pipe: Any) -> None:
    pipe.vae = effusion.AsymmetricAutoencoderKL()
    pipe.enable_vae_slicing()
    assert pipe.vae.use_slicing
    with pytest.raises(PlanConflict, match="AsymmetricAutoencoderKL doesn't support tiling"):
        pipe.enable_vae_tiling()


def test_vae_slicing_decodes_one_picture_at_a_time(pipe: Any) -> None:
    wanted, seen = tiny.run("sd", pipe), []
    pipe.vae.decoder.register_forward_pre_hook(lambda m, args: seen.append(args[0].shape[0]))
    pipe.enable_vae_slicing()
    torch.testing.assert_close(tiny.run("sd", pipe), wanted)
    pipe.disable_vae_slicing()
    assert torch.equal(tiny.run("sd", pipe), wanted)
    assert seen == [1, 1, 2]


def test_vae_tiling_is_off_below_its_limit(pipe: Any) -> None:
    limit = pipe.vae.tile_latent_min_size
    small, large = (torch.randn(1, 4, side, side) for side in (limit, 2 * limit))
    with torch.no_grad():
        plain = [pipe.vae.decode(z).sample for z in (small, large)]
        pipe.enable_vae_tiling()
        assert torch.equal(pipe.vae.decode(small).sample, plain[0])
        assert not torch.equal(pipe.vae.decode(large).sample, plain[1])
        pipe.vae.tile_latent_min_size = 4 * limit  # configurable
        assert torch.equal(pipe.vae.decode(large).sample, plain[1])


# -- offloading ------------------------------------------------------------------------------------------------------


def test_moving_before_sequential_offloading_costs_nothing(pipe: Any) -> None:
    """The guide warns not to move the pipeline first: what was there is not left behind."""
    wanted = tiny.run("sd", pipe.to("cpu"))
    pipe.enable_sequential_cpu_offload(device="cpu")
    travelling(pipe)
    assert torch.equal(tiny.run("sd", pipe), wanted)
    assert all(p.device == CPU for m in pipe.modules.values() for p in m.parameters())
    assert lane.lane_to(CPU).held == 0, "the compute device holds weights after the call"


def test_models_may_be_used_outside_of_the_pipeline_in_any_order(pipe: Any) -> None:
    """The guide: run everything in the expected order, or models are not offloaded properly."""
    z = torch.randn(1, 4, 8, 8)
    inputs = (torch.randn(1, 4, 16, 16), 3, torch.randn(1, 5, 16))
    with torch.no_grad():
        wanted = pipe.vae.decode(z).sample, pipe.unet(*inputs).sample
        pipe.enable_model_cpu_offload(device="cpu")
        travelling(pipe)
        for _ in range(2):
            assert torch.equal(pipe.vae.decode(z).sample, wanted[0])
            assert torch.equal(pipe.unet(*inputs).sample, wanted[1])
            assert engine_of(pipe.vae).units[0].cargo is None, "the autoencoder had to make room"


def test_encode_prompt_on_its_own_is_placed(pipe: Any) -> None:
    call = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    wanted = pipe.encode_prompt("a cat", **call)[0]
    pipe.enable_model_cpu_offload(device="cpu")
    travelling(pipe)
    assert torch.equal(pipe.encode_prompt("a cat", **call)[0], wanted)
    assert engine_of(pipe.text_encoder).units[0].cargo is not None, "it was not placed"
    pipe.maybe_free_model_hooks()
    assert engine_of(pipe.text_encoder).units[0].cargo is None


class Casts(nn.Module):
    """Moves and casts its input as its weight is: what the guide warns of."""

    def __init__(self) -> None:
        super().__init__()
        self.wi, self.wo = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.wi(x.to(self.wi.weight.device, self.wi.weight.dtype))
        return self.wo(x.to(self.wo.weight.dtype))


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_weight_dependent_casts_of_inputs_go_with_group_offloading(kind: str, tmp_path: Path) -> None:
    module, x = Casts(), torch.randn(2, 8, dtype=torch.float64)
    with torch.no_grad():
        wanted = module(x)
        apply_group_offloading(module, CPU, offload_type=kind, offload_to_disk_path=tmp_path, use_stream=True)
        assert torch.equal(module(x), wanted)
    engine_of(module).close()  # type: ignore[union-attr]


def test_weight_dependent_casts_of_inputs_go_with_layerwise_casting() -> None:
    """As T5's do: the code asks for the dtype of a weight before it calls the layer."""
    module, x = Casts(), torch.randn(2, 8, dtype=torch.float64)
    apply_layerwise_casting(module, torch.float8_e4m3fn, torch.float32)
    assert {p.dtype for p in module.parameters()} == {torch.float8_e4m3fn}
    with torch.no_grad():
        found = module(x)
    assert found.dtype == torch.float32 and bool(found.isfinite().all())


def test_tiling_with_a_stream_needs_no_dummy_pass(pipe: Any) -> None:
    """Tiles call the decoder several times, in an order that was never seen before."""
    pipe.enable_vae_tiling()
    wanted = tiny.run("sd", pipe)
    pipe.enable_group_offload("cpu", offload_type="leaf_level", use_stream=True)
    travelling(pipe)
    assert torch.equal(tiny.run("sd", pipe), wanted)


def test_several_blocks_on_a_stream_warn(pipe: Any, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("effusion").propagate = True
    with caplog.at_level(logging.WARNING):
        apply_group_offloading(pipe.unet, CPU, num_blocks_per_group=2, use_stream=True)
    assert "num_blocks_per_group=1" in caplog.text


def test_streams_take_no_second_copy_of_host_memory(pipe: Any) -> None:
    """The guide: have twice the memory of the model. Here weights rest once, low_cpu_mem_usage or not."""
    for low in (False, True):
        before = {n: p.untyped_storage().nbytes() for n, p in pipe.unet.named_parameters()}
        pipe.unet.enable_group_offload("cpu", offload_type="leaf_level", use_stream=True, low_cpu_mem_usage=low)
        assert {n: p.untyped_storage().nbytes() for n, p in pipe.unet.named_parameters()} == before


def test_offloading_to_disk_reads_the_files_that_are_there(pipe: Any, tmp_path: Path) -> None:
    wanted = tiny.run("sd", pipe)
    for kind in ("leaf_level", "block_level"):
        pipe.unet.enable_group_offload("cpu", offload_type=kind, offload_to_disk_path=tmp_path / "disk")
        assert torch.equal(tiny.run("sd", pipe), wanted)
    assert not list((tmp_path / "disk").glob("*")), "a second copy was written"


# -- casting, layouts, tracing, attention, autocast ------------------------------------------------------------------


def test_layerwise_casting_combines_with_group_offloading(pipe: Any, tmp_path: Path) -> None:
    pipe.unet.enable_layerwise_casting(torch.float8_e4m3fn)
    wanted = tiny.run("sd", pipe)
    pipe.unet.enable_group_offload("cpu", use_stream=True, offload_to_disk_path=tmp_path)
    assert torch.equal(tiny.run("sd", pipe), wanted)


def test_norms_are_skipped_by_layerwise_casting(pipe: Any) -> None:
    pipe.unet.enable_layerwise_casting(torch.float8_e4m3fn)
    norms = [m for m in pipe.unet.modules() if isinstance(m, (nn.GroupNorm, nn.LayerNorm))]
    assert norms and all(m.weight.dtype == torch.float32 for m in norms)


def test_modulation_is_skipped_by_layerwise_casting(saved: Path) -> None:
    """The guide: weights of normalisation and modulation are left as they are; those of FLUX are linear layers."""
    transformer = tiny.load("flux", saved).transformer
    transformer.enable_layerwise_casting(torch.float8_e4m3fn)
    by_dtype: dict[torch.dtype, list[str]] = {}
    for name, p in transformer.named_parameters():
        by_dtype.setdefault(p.dtype, []).append(name)
    assert any(".norm1.linear." in name for name in by_dtype[torch.float32])
    assert not any("norm" in name for name in by_dtype[torch.float8_e4m3fn])
    assert any(".attn.to_q." in name for name in by_dtype[torch.float8_e4m3fn])


def test_layerwise_casting_goes_with_peft_layers(pipe: Any) -> None:
    """The guide warns of failures on models with PEFT layers."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, pipe.unet)
    wanted = tiny.run("sd", pipe)
    apply_layerwise_casting(pipe.unet, torch.float16, torch.float32)
    assert next(p for n, p in pipe.unet.named_parameters() if "lora_A" in n).dtype == torch.float16
    cast = tiny.run("sd", pipe)
    torch.testing.assert_close(cast, wanted, rtol=2e-2, atol=2e-2)
    pipe.unet.enable_group_offload("cpu", offload_type="leaf_level", use_stream=True)
    travelling(pipe)
    assert torch.equal(tiny.run("sd", pipe), cast)


def test_channels_last_is_kept_by_every_policy(pipe: Any, tmp_path: Path) -> None:
    pipe.unet.to(memory_format=torch.channels_last)
    stride = pipe.unet.conv_out.weight.stride()
    assert stride[1] == 1
    wanted = tiny.run("sd", pipe)
    pipe.enable_group_offload("cpu", use_stream=True, offload_to_disk_path=tmp_path)
    assert torch.equal(tiny.run("sd", pipe), wanted)
    assert pipe.unet.conv_out.weight.stride() == stride


def test_a_traced_unet_is_independent_of_policies(pipe: Any, tmp_path: Path) -> None:
    inputs = (torch.randn(1, 4, 16, 16), torch.tensor(3), torch.randn(1, 5, 16))
    with torch.inference_mode():
        wanted = pipe.unet(*inputs, return_dict=False)[0]
        pipe.unet.forward = lambda *args: type(pipe.unet).forward(pipe.unet, *args, return_dict=False)
        traced = torch.jit.trace(pipe.unet, inputs)
        del pipe.unet.__dict__["forward"]
        pipe.enable_group_offload("cpu", use_stream=True, offload_to_disk_path=tmp_path)
        torch.testing.assert_close(traced(*inputs)[0], wanted)
        assert torch.equal(pipe.unet(*inputs).sample, wanted)
        with pytest.raises(PlanConflict, match="can't be traced while its weights travel"):
            torch.jit.trace(lambda *args: pipe.unet(*args, return_dict=False), inputs)
        assert torch.equal(pipe.unet(*inputs).sample, wanted)


def test_xformers_can_be_asked_for_and_taken_back(pipe: Any) -> None:
    wanted = tiny.run("sd", pipe)
    if importlib.util.find_spec("xformers") is None:
        with pytest.raises(ImportError, match="xformers"):
            pipe.enable_xformers_memory_efficient_attention()
    else:
        pipe.enable_xformers_memory_efficient_attention()
    pipe.disable_xformers_memory_efficient_attention()
    assert torch.equal(tiny.run("sd", pipe), wanted)


def test_autocast_gives_the_same_picture_under_offloading(pipe: Any, tmp_path: Path) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        wanted = tiny.run("sd", pipe)
    pipe.enable_group_offload("cpu", use_stream=True, offload_to_disk_path=tmp_path)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tiny.run("sd", pipe), wanted)
    assert not torch.equal(tiny.run("sd", pipe), wanted)


@pytest.mark.parametrize("size", ["auto", "max", 1])
def test_attention_slicing_changes_rounding_only(size: Any, pipe: Any) -> None:
    wanted = tiny.run("sd", pipe)
    pipe.enable_attention_slicing(size)
    torch.testing.assert_close(tiny.run("sd", pipe), wanted, rtol=1e-4, atol=1e-4)
    pipe.disable_attention_slicing()
    assert torch.equal(tiny.run("sd", pipe), wanted)


# -- the public calls ------------------------------------------------------------------------------------------------

METHODS = {
    "StableDiffusionPipeline": (
        "enable_model_cpu_offload", "enable_sequential_cpu_offload", "enable_group_offload", "reset_device_map",
        "enable_attention_slicing", "disable_attention_slicing", "enable_xformers_memory_efficient_attention",
        "disable_xformers_memory_efficient_attention", "set_use_memory_efficient_attention_xformers",
        "maybe_free_model_hooks", "remove_all_hooks",
    ),
    "UNet2DConditionModel": (
        "enable_group_offload", "enable_layerwise_casting", "enable_xformers_memory_efficient_attention",
        "disable_xformers_memory_efficient_attention", "set_use_memory_efficient_attention_xformers",
        "set_attention_slice", "set_attention_backend",
        "reset_attention_backend", "compile_repeated_blocks",
    ),
    "AutoencoderKL": ("enable_slicing", "disable_slicing", "enable_tiling", "disable_tiling"),
    "AutoencoderKLQwenImage": ("enable_slicing", "disable_slicing", "enable_tiling", "disable_tiling"),
    "AutoencoderTiny": ("enable_slicing", "disable_slicing", "enable_tiling", "disable_tiling"),
    "hooks": ("apply_group_offloading", "apply_layerwise_casting", "apply_layerwise_casting_hook"),
}  # fmt: skip


def parameters(function: Any) -> list[tuple[str, Any, Any]]:
    found = inspect.signature(function).parameters.values()
    return [(p.name, p.kind, p.default) for p in found]


@pytest.mark.parametrize(("where", "name"), [(w, n) for w, names in METHODS.items() for n in names])
def test_memory_methods_have_the_signatures_of_the_peer(where: str, name: str) -> None:
    ours, theirs = (getattr(getattr(library, where), name) for library in (effusion, diffusers))
    wanted = parameters(theirs)
    found = parameters(ours)
    if wanted[-1:] and wanted[-1][1] is inspect.Parameter.VAR_KEYWORD and len(wanted) < len(found):
        wanted = wanted[:-1]
    assert [p[0] for p in found[: len(wanted)]] == [p[0] for p in wanted]
    for (name_, _, ours_default), (_, _, theirs_default) in zip(found, wanted, strict=False):
        plain = {str(d.value) if hasattr(d, "value") else str(d) for d in (ours_default, theirs_default)}
        assert len(plain) == 1, f"{name_}: {ours_default!r}, the peer has {theirs_default!r}"
