"""ModelMixin: loading and saving networks, in both directions with the peer."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import safetensors.torch
import torch
from torch import nn

import effusion
from effusion.core.config import register_to_config
from effusion.core.errors import CheckpointError, MissingFile, UntrustedCode
from effusion.models.base import ModelMixin

CONFIG: dict[str, Any] = {"block_out_channels": (8,), "norm_num_groups": 4, "latent_channels": 2, "layers_per_block": 1}


class Net(ModelMixin):
    """A network with everything that loading must get right."""

    _keep_in_fp32_modules = ["norm"]
    _keys_to_ignore_on_load_unexpected = ["position_ids", "old.*"]
    _legacy_keys = {"query": "to_q"}
    _repeated_blocks = ["Linear"]

    @register_to_config
    def __init__(self, width: int = 4, tie: bool = False) -> None:
        super().__init__()
        self.to_q = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.other = nn.Linear(width, width)
        if tie:
            self.other.weight = self.to_q.weight
        self.table = nn.Embedding(7, width)
        self.scale = nn.Parameter(torch.ones(width))
        self.register_buffer("rotary", torch.arange(4.0).outer(torch.linspace(0, 1, 3)), persistent=False)
        self.register_buffer("count", torch.zeros(2, dtype=torch.int64))


def make(**options: Any) -> Net:
    torch.manual_seed(0)
    net = Net(**options)
    nn.init.normal_(net.scale)
    net.count += 5
    return net


def assert_same(a: nn.Module, b: nn.Module) -> None:
    x, y = a.state_dict(), b.state_dict()
    assert x.keys() == y.keys()
    for name in x:
        assert torch.equal(x[name], y[name]), name


def edit(folder: Path, change: Any) -> None:
    path = folder / "diffusion_pytorch_model.safetensors"
    state = {k: v.clone() for k, v in safetensors.torch.load_file(path).items()}
    safetensors.torch.save_file(change(state) or state, path, {"format": "pt"})


# -- with the peer -------------------------------------------------------------------------------


SMALL_SHARDS: dict[str, Any] = {"max_shard_size": "10KB"}


@pytest.mark.parametrize("options", [{}, SMALL_SHARDS, {"variant": "fp16"}, {"variant": "ema", **SMALL_SHARDS}])
@pytest.mark.parametrize("safe", [True, False])
def test_both_directions_with_the_peer(tmp_path: Path, options: dict[str, Any], safe: bool) -> None:
    theirs = diffusers.AutoencoderKL(**CONFIG)
    theirs.save_pretrained(tmp_path / "theirs", safe_serialization=safe, **options)
    variant = options.get("variant")
    ours = effusion.AutoencoderKL.from_pretrained(tmp_path / "theirs", variant=variant)
    assert_same(ours, theirs)
    ours.save_pretrained(tmp_path / "ours", safe_serialization=safe, **options)
    assert sorted(os.listdir(tmp_path / "ours")) == sorted(os.listdir(tmp_path / "theirs"))
    assert_same(
        diffusers.AutoencoderKL.from_pretrained(tmp_path / "ours", variant=variant, use_safetensors=safe), theirs
    )
    a, b = (json.loads((tmp_path / w / "config.json").read_text()) for w in ("ours", "theirs"))
    assert {k: v for k, v in a.items() if k != "_name_or_path"} == b


def test_single_files_are_byte_for_byte_the_peers(tmp_path: Path) -> None:
    theirs = diffusers.AutoencoderKL(**CONFIG)
    theirs.save_pretrained(tmp_path / "a")
    effusion.AutoencoderKL.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    name = "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16, torch.float64, "float16", "torch.bfloat16"])
def test_dtypes_are_those_of_the_peer(tmp_path: Path, dtype: Any) -> None:
    diffusers.AutoencoderKL(**CONFIG).half().save_pretrained(tmp_path)
    expected = getattr(torch, dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    theirs = diffusers.AutoencoderKL.from_pretrained(tmp_path, torch_dtype=expected)
    ours = effusion.AutoencoderKL.from_pretrained(tmp_path, torch_dtype=dtype)
    assert ours.dtype == theirs.dtype
    assert not ours.training
    assert_same(ours, theirs)
    assert effusion.AutoencoderKL.from_pretrained(tmp_path, dtype="auto").dtype == torch.float16


# -- our own rules -------------------------------------------------------------------------------


def test_round_trip_keeps_everything(tmp_path: Path) -> None:
    net = make()
    net.save_pretrained(tmp_path)
    loaded = Net.from_pretrained(tmp_path)
    assert_same(loaded, net)
    assert torch.equal(loaded.rotary, net.rotary)
    assert loaded.rotary.device.type == "cpu"
    assert all(p.requires_grad for p in loaded.parameters())
    assert not loaded.training
    assert loaded.config.width == 4
    assert loaded.width == 4


def test_nothing_is_copied(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    loaded = Net.from_pretrained(tmp_path)
    part = loaded._weight_slices["to_q.weight"]
    raw = (tmp_path / "diffusion_pytorch_model.safetensors").read_bytes()[part.offset : part.offset + part.nbytes]
    assert loaded.to_q.weight.detach().numpy().tobytes() == raw
    with open("/proc/self/maps") as maps:
        assert any(str(tmp_path) in line for line in maps)
    copied = Net.from_pretrained(tmp_path / ".", disable_mmap=True)
    assert_same(copied, loaded)


def test_training_a_loaded_network_does_not_change_the_file(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    before = (tmp_path / "diffusion_pytorch_model.safetensors").read_bytes()
    loaded = Net.from_pretrained(tmp_path)
    optimizer = torch.optim.SGD(loaded.parameters(), lr=1.0)
    loaded.to_q(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert (tmp_path / "diffusion_pytorch_model.safetensors").read_bytes() == before
    loaded.save_pretrained(tmp_path)  # over the file that it is mapped from
    assert_same(Net.from_pretrained(tmp_path), loaded)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_some_modules_stay_in_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    make().save_pretrained(tmp_path)
    loaded = Net.from_pretrained(tmp_path, torch_dtype=dtype)
    assert loaded.norm.weight.dtype == torch.float32
    assert loaded.to_q.weight.dtype == dtype == loaded.dtype
    assert loaded.count.dtype == torch.int64


def test_missing_and_unexpected_keys_are_listed(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    edit(tmp_path, lambda s: {**{k: v for k, v in s.items() if k != "to_q.bias"}, "strange": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"missing in the file: to_q\.bias") as caught:
        Net.from_pretrained(tmp_path)
    assert "1 that Net does not have: strange" in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_ignorable_and_legacy_keys(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    edit(tmp_path, lambda s: {**{k.replace("to_q", "query"): v for k, v in s.items()}, "old.x": torch.ones(1)})
    assert_same(Net.from_pretrained(tmp_path), make())


def test_mismatched_sizes(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"to_q\.weight is \[4, 4\] in the file, \[8, 8\] here"):
        Net.from_pretrained(tmp_path, width=8)
    edit(tmp_path, lambda s: {**s, "to_q.bias": torch.zeros(3)})
    loaded, info = Net.from_pretrained(tmp_path, ignore_mismatched_sizes=True, output_loading_info=True)
    assert info["mismatched_keys"] == [("to_q.bias", (3,), (4,))]
    assert loaded.to_q.bias.shape == (4,)
    assert torch.equal(loaded.to_q.weight, make().to_q.weight)
    assert not loaded.to_q.bias.is_meta


def test_whole_numbers_where_weights_belong(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    edit(tmp_path, lambda s: {**s, "to_q.weight": torch.zeros(4, 4, dtype=torch.int8)})
    with pytest.raises(CheckpointError, match=r"to_q\.weight is torch\.int8"):
        Net.from_pretrained(tmp_path)


@pytest.mark.parametrize("drop", [True, False])
def test_tied_weights_stay_tied(tmp_path: Path, drop: bool) -> None:
    make(tie=True).save_pretrained(tmp_path)
    if drop:
        edit(tmp_path, lambda s: {k: v for k, v in s.items() if k != "to_q.weight"})
    loaded = Net.from_pretrained(tmp_path)
    assert loaded.other.weight is loaded.to_q.weight
    assert_same(loaded, make(tie=True))


def test_arguments_change_the_configuration_and_unknown_ones_warn(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make().save_pretrained(tmp_path)
    assert Net.from_pretrained(tmp_path, tie=False, nonsense=3, low_cpu_mem_usage=False).config.tie is False
    assert "nonsense" in caplog.text


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ({"torch_dtype": torch.int8}, "floating-point"),
        ({"dtype": "float99"}, "float99"),
        ({"use_safetensors": "yes"}, "use_safetensors"),
        ({"quantization_config": object()}, "quantization_config"),
        ({"device_map": {"a": 7, "b": 8}}, "device"),
    ],
)
def test_options_that_can_not_be(tmp_path: Path, option: dict[str, Any], says: str) -> None:
    make().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=says):
        Net.from_pretrained(tmp_path, **option)


def test_device_map_to_one_device(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    for device_map in ("cpu", "auto", {"": "cpu"}):
        loaded = Net.from_pretrained(tmp_path, device_map=device_map)
        assert {t.device.type for t in (*loaded.parameters(), *loaded.buffers())} == {"cpu"}


def test_folders_that_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match=r"has no file config\.json; it holds nothing"):
        Net.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="neither a folder"):
        Net.from_pretrained(tmp_path / "does" / "not" / "exist", local_files_only=True)
    make().save_config(tmp_path)
    with pytest.raises(MissingFile, match=r"has none of diffusion_pytorch_model\.safetensors"):
        Net.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{broken")
    with pytest.raises(CheckpointError, match=r"config\.json is not valid JSON"):
        Net.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="needs a folder"):
        Net.from_pretrained(None)


@pytest.mark.parametrize("inside", ["../..", "/etc", "a/../../b"])
def test_subfolder_can_not_leave(tmp_path: Path, inside: str) -> None:
    with pytest.raises(CheckpointError, match="outside of its folder"):
        Net.from_pretrained(tmp_path, subfolder=inside)


def test_a_config_of_another_class(tmp_path: Path) -> None:
    effusion.AutoencoderKL(**CONFIG).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="that of a AutoencoderKL, not of a UNet2DConditionModel"):
        effusion.UNet2DConditionModel.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "down_block_types": 7}))
    with pytest.raises(CheckpointError, match="does not build a AutoencoderKL"):
        effusion.AutoencoderKL.from_pretrained(tmp_path)


def test_resaving_removes_old_shards_of_the_same_variant_only(tmp_path: Path) -> None:
    net = make()
    net.save_pretrained(tmp_path, variant="fp16")
    net.save_pretrained(tmp_path, max_shard_size=100)
    assert len(os.listdir(tmp_path)) > 4
    net.save_pretrained(tmp_path)
    name = "diffusion_pytorch_model"
    assert sorted(os.listdir(tmp_path)) == ["config.json", f"{name}.fp16.safetensors", f"{name}.safetensors"]


def test_an_interrupted_save_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make().save_pretrained(tmp_path)
    other = make()
    nn.init.zeros_(other.scale)
    monkeypatch.setattr("os.fsync", lambda fd: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space"):
        other.save_pretrained(tmp_path)
    monkeypatch.undo()
    assert_same(Net.from_pretrained(tmp_path), make())
    assert len(os.listdir(tmp_path)) == 2


def test_only_the_main_process_saves(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path / "x", is_main_process=False)
    assert not (tmp_path / "x").exists()


def test_sizes_and_compiling() -> None:
    net = make()
    assert net.num_parameters() == sum(p.numel() for p in net.parameters())
    assert net.num_parameters(exclude_embeddings=True) == net.num_parameters() - 28
    net.table.requires_grad_(False)
    assert net.num_parameters(only_trainable=True) == net.num_parameters() - 28
    assert net.get_memory_footprint() == 4 * net.num_parameters() + 48 + 16
    assert net.get_memory_footprint(return_buffers=False) == 4 * net.num_parameters()
    with pytest.raises(ValueError, match="does not support gradient checkpointing"):
        net.enable_gradient_checkpointing()
    with pytest.raises(AttributeError, match="nothing_like_this"):
        net.nothing_like_this  # noqa: B018
    net.compile_repeated_blocks(backend="eager")
    assert net.to_q(torch.ones(1, 4)).shape == (1, 4)
    net._repeated_blocks = []  # type: ignore[misc]
    with pytest.raises(ValueError, match="no blocks"):
        net.compile_repeated_blocks()


# -- AutoModel -----------------------------------------------------------------------------------


def test_auto_model_finds_ours_and_transformers(tmp_path: Path) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    effusion.AutoencoderKL(**CONFIG).save_pretrained(tmp_path / "vae")
    assert type(effusion.AutoModel.from_pretrained(tmp_path / "vae")) is effusion.AutoencoderKL
    assert type(effusion.AutoModel.from_pretrained(tmp_path, subfolder="vae")) is effusion.AutoencoderKL
    config = effusion.AutoencoderKL.load_config(tmp_path / "vae")
    assert type(effusion.AutoModel.from_config(config)) is effusion.AutoencoderKL
    assert type(effusion.AutoModel.from_config(tmp_path, subfolder="vae")) is effusion.AutoencoderKL
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=9,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            bos_token_id=0,
            eos_token_id=1,
        )
    )
    text.save_pretrained(tmp_path / "text")
    assert type(effusion.AutoModel.from_pretrained(tmp_path / "text")) is CLIPTextModel
    with pytest.raises(MissingFile, match=r"config\.json"):
        effusion.AutoModel.from_pretrained(tmp_path)


def test_auto_model_uses_the_index_of_a_pipeline(tmp_path: Path) -> None:
    effusion.AutoencoderKL(**CONFIG).save_pretrained(tmp_path / "vae")
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    config.pop("_class_name")
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config))
    (tmp_path / "model_index.json").write_text(json.dumps({"vae": ["diffusers", "AutoencoderKL"]}))
    assert type(effusion.AutoModel.from_pretrained(tmp_path, subfolder="vae")) is effusion.AutoencoderKL


@pytest.mark.parametrize(
    ("config", "error", "says"),
    [
        ({}, CheckpointError, "names no class"),
        ({"_class_name": "NoSuchModel"}, CheckpointError, "NoSuchModel"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, UntrustedCode, "trust_remote_code"),
        ({"_class_name": "os.system"}, CheckpointError, "os.system"),
        ({"model_type": "clip", "architectures": ["__import__"]}, CheckpointError, "__import__"),
    ],
)
def test_auto_model_refuses(tmp_path: Path, config: dict[str, Any], error: type[Exception], says: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(error, match=says):
        effusion.AutoModel.from_pretrained(tmp_path)


def test_a_truncated_file_is_found_before_work(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path, max_shard_size=100)
    shard = sorted(tmp_path.glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=shard.name):
        Net.from_pretrained(tmp_path)
    shutil.rmtree(tmp_path)
