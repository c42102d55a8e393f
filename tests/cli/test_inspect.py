"""``effusion inspect`` counts from headers, and names what is broken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from effusion.cli import inspect
from effusion.cli.main import main


def network(folder, name="diffusion_pytorch_model.safetensors", dtype=torch.float32, cls="UNet2DConditionModel"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"_class_name": cls}))
    save_file({"a": torch.zeros(3, 5, dtype=dtype), "b": torch.zeros(7, dtype=torch.float32)}, folder / name)


@pytest.fixture
def pipeline(tmp_path):
    network(tmp_path / "unet", dtype=torch.float16)
    network(tmp_path / "vae", "diffusion_pytorch_model-00001-of-00002.safetensors")
    save_file({"c": torch.zeros(100)}, tmp_path / "vae" / "diffusion_pytorch_model-00002-of-00002.safetensors")
    network(tmp_path / "vae", "diffusion_pytorch_model.fp16.safetensors", dtype=torch.float16)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "vocab.json").write_text("{}")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    return tmp_path


def test_a_pipeline(pipeline) -> None:
    found = {c.name: c for c in inspect.components(str(pipeline))}
    assert list(found) == ["pipeline", "unet", "vae", "tokenizer"]
    assert found["pipeline"].cls == "StableDiffusionPipeline"
    assert (found["unet"].parameters, found["unet"].nbytes) == (22, 3 * 5 * 2 + 7 * 4)
    assert found["unet"].dtypes == {"float16": 15, "float32": 7}
    assert (found["vae"].parameters, found["vae"].nbytes, found["vae"].variants) == (122, 488, ["fp16"])
    assert (found["tokenizer"].library, found["tokenizer"].parameters) == ("transformers", 0)


def test_the_table_and_json(pipeline, capsys) -> None:
    assert main(["inspect", str(pipeline)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["component", "class", "parameters", "bytes", "dtype"]
    assert lines[2].split()[:5] == ["unet", "UNet2DConditionModel", "22", "58", "B"]
    assert lines[-1].split() == ["total", "144", "546", "B"]
    assert main(["inspect", str(pipeline), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[1]["parameters"] == 22


def test_a_network_and_a_file(pipeline) -> None:
    (network_,) = inspect.components(str(pipeline / "unet"))
    assert (network_.cls, network_.parameters) == ("UNet2DConditionModel", 22)
    (file,) = inspect.components(str(pipeline / "unet" / "diffusion_pytorch_model.safetensors"))
    assert file.parameters == 22


def test_weights_are_not_read(pipeline, monkeypatch) -> None:
    from effusion.weights.safetensors_file import SafetensorsFile

    monkeypatch.setattr(SafetensorsFile, "tensor", lambda *a, **k: pytest.fail("weights were read"))
    assert inspect.components(str(pipeline))


def test_a_pickle_is_weighed_not_opened(tmp_path) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"\x80 not a pickle")
    (found,) = inspect.components(str(tmp_path))
    assert (found.nbytes, found.parameters) == (14, 0)
    assert "not read" in found.note


def test_a_folder_with_a_missing_component_is_said(pipeline, capsys) -> None:
    (pipeline / "tokenizer" / "vocab.json").unlink()
    assert main(["inspect", str(pipeline)]) == 0
    assert "its folder is missing" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "no such", "nothing in it", "index"])
def test_broken_models_are_one_line(pipeline, damage, capsys) -> None:
    weights = pipeline / "unet" / "diffusion_pytorch_model.safetensors"
    target = pipeline
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-3])
    elif damage == "empty":
        weights.write_bytes(b"")
    elif damage == "text":
        weights.write_text("<html>" * 20)
    elif damage == "no such":
        target = pipeline / "nowhere"
    elif damage == "nothing in it":
        target = pipeline / "new"
        target.mkdir()
    else:
        (pipeline / "model_index.json").write_text("[1]")
    assert main(["inspect", str(target)]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("effusion: ")
    assert said.err.count("\n") == 1


def test_a_repository_on_the_hub(pipeline, monkeypatch) -> None:
    """Headers are asked for by range; simulated, as tests have no network."""
    from types import SimpleNamespace

    import huggingface_hub

    from effusion.core import hub

    asked = []

    class Api:
        def parse_safetensors_file_metadata(self, repo, name, revision):
            asked.append(name)
            info = SimpleNamespace(dtype="F16", shape=[3, 5], data_offsets=(0, 30))
            return SimpleNamespace(tensors={"a": info})

    names = [p.relative_to(pipeline).as_posix() for p in pipeline.rglob("*") if p.is_file()]
    monkeypatch.setattr(hub, "repo_files", lambda repo, revision=None: ("abc", names))
    monkeypatch.setattr(hub, "resolve_file", lambda repo, name, revision=None: pipeline / name)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    found = {c.name: c for c in inspect.components("someone/model")}
    assert (found["unet"].parameters, found["vae"].parameters) == (15, 30)
    assert sorted(asked)[-1] == "vae/diffusion_pytorch_model-00002-of-00002.safetensors"
    assert len(asked) == 3


@pytest.mark.parametrize(("n", "text"), [(0, "-"), (999, "999"), (1500, "1.5 k"), (859520964, "859.5 M")])
def test_counts_are_read_easily(n: int, text: str) -> None:
    assert inspect.count(n) == text


@pytest.mark.parametrize(("n", "text"), [(0, "-"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 * 2**40, "5120.0 GiB")])
def test_sizes_are_read_easily(n: int, text: str) -> None:
    assert inspect.size(n) == text


@pytest.mark.parametrize("name", ["x.ckpt", "x.pt", "a name (2).pth"])
def test_a_torch_file_by_itself_is_weighed(tmp_path, name) -> None:
    torch.save({"a": torch.zeros(3)}, tmp_path / name)
    (found,) = inspect.components(str(tmp_path / name))
    assert (found.nbytes, found.parameters) == ((tmp_path / name).stat().st_size, 0)
    assert "not read" in found.note
    (found,) = inspect.components(str(tmp_path)) if "(" not in name else (found,)
    assert "not read" in found.note


@pytest.mark.parametrize("architectures", ["CLIPTextModel", 7, [], {"a": 1}, None])
def test_strange_architectures(tmp_path, architectures) -> None:
    network(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": architectures, "model_type": "clip"}))
    (found,) = inspect.components(str(tmp_path))
    assert found.cls == "clip"


def test_a_single_file_is_recognised(tmp_path: Path) -> None:
    save_file({"foo": torch.zeros(3)}, tmp_path / "f.safetensors")
    (unknown,) = inspect.components(str(tmp_path / "f.safetensors"))
    assert "unknown" in unknown.note
    assert (unknown.parameters, unknown.nbytes, unknown.dtypes) == (3, 12, {"F32": 3})
    save_file({"x.lora_A.weight": torch.zeros(4, 768)}, tmp_path / "l.safetensors")
    (lora,) = inspect.components(str(tmp_path / "l.safetensors"))
    assert "LoRA" in lora.note
