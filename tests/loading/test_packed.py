"""Packed weights: they rest as bytes of the file, and give the numbers of unpacked ones under every policy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import gguf
import pytest
import safetensors.torch
import torch
import transformers
from tests.pipelines import tiny_transformers

import effusion
from effusion.core.errors import CheckpointError
from effusion.placement.patches import LowRank, add_patch, remove_patch
from effusion.weights import gguf_writing, single_file
from effusion.weights.checkpoint import open_file
from effusion.weights.layouts import text
from effusion.weights.layouts.table import to_theirs

Config = effusion.GGUFQuantizationConfig


def sd3(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    theirs = diffusers.SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=32,
        num_attention_heads=2, joint_attention_dim=64, caption_projection_dim=64, pooled_projection_dim=64,
        pos_embed_max_size=16, qk_norm="rms_norm", dual_attention_layers=(0,),
    )  # fmt: skip
    return tiny_transformers.shaken(theirs)


@pytest.fixture(scope="module")
def theirs() -> Any:
    return sd3()


@pytest.fixture(scope="module")
def ours(theirs: Any) -> Any:
    made = effusion.SD3Transformer2DModel.from_config(dict(theirs.config))
    made.load_state_dict(theirs.state_dict())
    return made.eval()


@pytest.fixture(scope="module")
def file(ours: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("packed") / "f.gguf"
    ours.save_single_file(path, packing="Q8_0")
    return path


def inputs() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 4, 16, 16, generator=g), "timestep": torch.tensor([500.0, 20.0]),
        "encoder_hidden_states": torch.randn(2, 7, 64, generator=g), "pooled_projections": torch.randn(2, 64, generator=g),
    }  # fmt: skip


def run(model: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    with torch.no_grad():
        return model(**{n: t.to(dtype) for n, t in inputs().items()}).sample  # type: ignore[no-any-return]


def load(file: Path, **options: Any) -> Any:
    return effusion.SD3Transformer2DModel.from_single_file(file, **options)


def test_packed_and_unpacked_give_the_same_numbers(file: Path, ours: Any) -> None:
    packed, whole = load(file, quantization_config=Config()), load(file)
    assert packed.dtype == torch.float32
    weight = packed.transformer_blocks[0].attn.to_q.weight
    assert (weight.dtype, tuple(weight.shape)) == (torch.uint8, (64, 64 // 32 * 34))
    assert torch.equal(run(packed), run(whole))
    assert (run(whole) - run(ours)).abs().max() < 0.05 * run(ours).abs().max()
    assert packed.get_memory_footprint() < 0.5 * whole.get_memory_footprint()
    half = load(file, quantization_config=Config(compute_dtype=torch.bfloat16))
    assert half.dtype == torch.bfloat16
    assert torch.equal(run(half, torch.bfloat16), run(load(file, torch_dtype=torch.bfloat16), torch.bfloat16))
    unpacked = packed.dequantize()
    assert {n: t.dtype for n, t in unpacked.state_dict().items()} == {n: t.dtype for n, t in whole.state_dict().items()}
    assert torch.equal(run(unpacked), run(whole))


def test_the_weights_are_the_mapped_file(file: Path) -> None:
    packed = load(file, quantization_config=Config())
    data = file.read_bytes()
    raw = packed.transformer_blocks[1].attn.to_k.weight
    assert data.count(raw.numpy().tobytes()) == 1
    areas = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(file))]
    ranges = [tuple(int(x, 16) for x in area[0].split("-")) for area in areas]
    assert any(start <= raw.data_ptr() < stop for start, stop in ranges)


POLICIES: dict[str, Any] = {
    "leaf": lambda m, folder: m.enable_group_offload("cpu", offload_type="leaf_level"),
    "block": lambda m, folder: m.enable_group_offload("cpu", offload_type="block_level", num_blocks_per_group=1),
    "disk": lambda m, folder: m.enable_group_offload(
        "cpu", offload_type="block_level", num_blocks_per_group=1, offload_to_disk_path=str(folder)
    ),
    "device map": lambda m, folder: m.apply_device_map({"": "disk"}, offload_folder=str(folder)),
    "casting beside": lambda m, folder: m.enable_layerwise_casting(torch.float32, torch.float32),
}


@pytest.mark.parametrize("policy", POLICIES)
def test_under_every_policy(policy: str, file: Path, tmp_path: Path) -> None:
    expected = run(load(file))
    packed = load(file, quantization_config=Config())
    POLICIES[policy](packed, tmp_path)
    assert torch.equal(run(packed), expected)
    assert torch.equal(run(packed), expected)
    assert packed.transformer_blocks[0].attn.to_q.weight.dtype == torch.uint8


def test_deltas_over_packed_weights(file: Path) -> None:
    packed, whole = load(file, quantization_config=Config()), load(file)
    before = run(packed)
    path = "transformer_blocks.1.attn.to_q.weight"
    torch.manual_seed(2)
    delta = LowRank(torch.randn(64, 4), torch.randn(4, 64))
    for model in (packed, whole):
        add_patch(model, "style", {path: delta}, 0.5)
    assert torch.equal(run(packed), run(whole))
    assert not torch.equal(run(packed), before)
    packed.enable_group_offload("cpu", offload_type="leaf_level")
    assert torch.equal(run(packed), run(whole))
    with pytest.raises(ValueError, match="of its shape"):
        add_patch(packed, "other", {path: LowRank(torch.ones(68, 1), torch.ones(1, 64))})
    remove_patch(packed, "style")
    assert torch.equal(run(packed), before)


@pytest.mark.parametrize("packing", ["Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", None])
def test_writing_is_read_by_the_reference_and_the_peer(
    packing: str | None, ours: Any, theirs: Any, tmp_path: Path
) -> None:
    path = tmp_path / "f.gguf"
    ours.save_single_file(path, packing=packing)
    expected = single_file.original_state(ours)
    reader = gguf.GGUFReader(path)
    assert {t.name for t in reader.tensors} == set(expected)
    for found in reader.tensors:
        value = torch.from_numpy(gguf.quants.dequantize(found.data, found.tensor_type))
        source = expected[found.name]
        packs = packing is not None and source.ndim == 2 and found.name.endswith(".weight")
        assert found.tensor_type.name == (packing if packs else "F32"), found.name
        kind = found.tensor_type
        again = gguf.quants.dequantize(gguf.quants.quantize(source.numpy(), kind), kind)
        assert torch.equal(value.view(source.shape), torch.from_numpy(again).view(source.shape))
    theirs.save_config(tmp_path)
    read = diffusers.SD3Transformer2DModel.from_single_file(
        str(path), config=str(tmp_path), quantization_config=diffusers.GGUFQuantizationConfig(torch.float32)
    )
    mine = load(path, quantization_config=Config()).state_dict()
    for name, tensor in read.state_dict().items():
        assert torch.equal(torch.as_tensor(tensor.numpy()), mine[name]), name


def test_what_rests_packed_is_written_as_it_is(file: Path, tmp_path: Path) -> None:
    packed = load(file, quantization_config=Config())
    packed.save_single_file(tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == file.read_bytes()
    with pytest.raises(ValueError, match="rest packed.*dequantize"):
        packed.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="rest packed"):
        packed.save_single_file(tmp_path / "x.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.gguf"]


def test_what_can_not_be_written(ours: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Q8_0"):
        ours.save_single_file(tmp_path / "f.gguf", packing="Q4_K")
    with pytest.raises(ValueError, match=r"end in \.gguf"):
        ours.save_single_file(tmp_path / "f.safetensors", packing="Q8_0")
    assert not list(tmp_path.iterdir())


# -- eight-bit floats with scales, as ComfyUI writes them ---------------------------------------------


def scaled(state: dict[str, torch.Tensor], scale: str, rows: bool) -> dict[str, torch.Tensor]:
    """``state`` with the weights of linear layers as float8 and a scale beside each."""
    out = {"scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)}
    for name, tensor in state.items():
        out[name] = tensor
        if tensor.ndim == 2 and name.endswith(".weight"):
            factor = tensor.abs().amax(dim=1) / 448 if rows else (tensor.abs().max() / 448).reshape(1)
            out[name] = (tensor / factor.unsqueeze(-1)).to(torch.float8_e4m3fn)
            stem = name.removesuffix(".weight")
            out[f"{stem}.{scale}"] = factor
            out[f"{stem}.scale_input"] = torch.ones(1)
    return out


@pytest.mark.parametrize(("scale", "rows"), [("scale_weight", False), ("weight_scale", False), ("weight_scale", True)])
def test_scaled_float8_files(scale: str, rows: bool, ours: Any, tmp_path: Path) -> None:
    state = scaled(single_file.original_state(ours), scale, rows)
    safetensors.torch.save_file(state, tmp_path / "f.safetensors")
    whole = load(tmp_path / "f.safetensors")
    for name, tensor in single_file.original_state(whole).items():
        factor = state.get(f"{name.removesuffix('.weight')}.{scale}")
        expected = state[name] if factor is None or name not in state else state[name].float() * factor.unsqueeze(-1)
        assert torch.equal(tensor, expected), name
    packed = load(tmp_path / "f.safetensors", quantization_config=Config())
    assert packed.transformer_blocks[0].attn.to_q.weight.dtype == torch.uint8
    assert torch.equal(run(packed), run(whole))
    with pytest.raises(ValueError, match="GGUF has no name"):
        packed.save_single_file(tmp_path / "f.gguf")


@pytest.mark.parametrize("listed", [True, False])
def test_scaled_float8_in_shards(listed: bool, ours: Any, tmp_path: Path) -> None:
    """Weights in the first shard, their scales in the second; an index may leave out the scales."""
    state = scaled(ours.state_dict(), "scale_weight", rows=False)
    safetensors.torch.save_file(state, tmp_path / "whole.safetensors")
    aside = ("scale_weight", "scale_input", "scaled_fp8")
    index: dict[str, str] = {}
    for i, shard in enumerate([{n for n in state if not n.endswith(aside)}, {n for n in state if n.endswith(aside)}]):
        name = f"diffusion_pytorch_model-{i + 1:05d}-of-00002.safetensors"
        safetensors.torch.save_file({n: state[n] for n in shard}, tmp_path / name)
        index |= {n: name for n in shard if listed or not n.endswith("scale_weight")}
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    ours.save_config(tmp_path)
    whole = load(tmp_path / "whole.safetensors", config=tmp_path).state_dict()
    sharded = effusion.SD3Transformer2DModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(sharded[n], t) for n, t in whole.items())


def test_a_scale_that_fits_no_rows(tmp_path: Path) -> None:
    state = {"a.weight": torch.zeros(4, 4).to(torch.float8_e4m3fn), "a.scale_weight": torch.ones(3)}
    safetensors.torch.save_file(state, tmp_path / "f.safetensors")
    with pytest.raises(CheckpointError, match=r"a\.scale_weight \[3\] is no scale of \[4, 4\]"):
        open_file(tmp_path / "f.safetensors")


def test_a_packed_text_encoder(tmp_path: Path) -> None:
    config = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu", vocab_size=99
    )
    torch.manual_seed(3)
    t5 = transformers.T5EncoderModel(config).eval()
    state = {n: t for n, t in t5.state_dict().items() if n != "encoder.embed_tokens.weight"}
    gguf_writing.write(tmp_path / "t5.gguf", to_theirs(state, text.T5_LLAMA), "t5encoder", "Q8_0")
    packed = effusion.load(tmp_path / "t5.gguf", quantization_config=Config())
    whole = effusion.load(tmp_path / "t5.gguf")
    assert packed.shared.weight.dtype == torch.uint8
    ids = torch.tensor([[5, 9, 88, 1]])
    with torch.no_grad():
        expected = whole(ids).last_hidden_state
        assert torch.equal(packed(ids).last_hidden_state, expected)
        assert (expected - t5(ids).last_hidden_state).abs().max() < 0.1
