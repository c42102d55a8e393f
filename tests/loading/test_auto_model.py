"""AutoModel over a pipeline's folder: whatever a component is, loaded as the peer loads it, and nothing unpickled here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from tests.hub_server import HubServer

import effusion
from effusion.core.errors import CheckpointError


@pytest.mark.parametrize("name", ["unet", "vae", "text_encoder", "scheduler", "tokenizer"])
def test_every_component_by_its_folder(folder: Path, name: str) -> None:
    theirs, ours = (lib.AutoModel.from_pretrained(str(folder), subfolder=name) for lib in (diffusers, effusion))
    assert type(ours).__name__ == type(theirs).__name__
    if isinstance(theirs, torch.nn.Module):
        state = ours.state_dict()
        assert all(torch.equal(state[key], value) for key, value in theirs.state_dict().items())
        assert ours.training is theirs.training is False


@pytest.mark.parametrize("given", [{"torch_dtype": torch.float16}, {"dtype": "bfloat16"}, {"variant": "fp16"}])
def test_options_reach_networks_of_transformers(folder: Path, given: dict[str, Any]) -> None:
    model = effusion.AutoModel.from_pretrained(folder, subfolder="text_encoder", **given)
    wanted = {"float16": torch.float16, "bfloat16": torch.bfloat16}
    dtype = given.get("torch_dtype") or wanted.get(given.get("dtype", ""), torch.float32)
    assert {p.dtype for p in model.parameters()} == {dtype}
    model, info = effusion.AutoModel.from_pretrained(folder / "text_encoder", output_loading_info=True)
    assert info["missing_keys"] == info["unexpected_keys"] == []
    assert type(effusion.AutoModel.from_config(json.loads((folder / "text_encoder/config.json").read_text()))) is type(
        model
    )


def test_pickled_weights_of_transformers_are_opened_elsewhere(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = folder / "text_encoder"
    before = effusion.AutoModel.from_pretrained(inside).state_dict()
    torch.save(before, inside / "pytorch_model.bin")
    for path in inside.glob("*.safetensors"):
        path.unlink()

    def load(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("unpickled in this process")

    monkeypatch.setattr(torch, "load", load)
    after = effusion.AutoModel.from_pretrained(inside).state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_networks_of_transformers_are_strict(folder: Path) -> None:
    path = folder / "text_encoder" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*truncated"):
        effusion.AutoModel.from_pretrained(folder, subfolder="text_encoder")


def test_out_of_a_repository(hub: HubServer, folder: Path) -> None:
    hub.add("us/pipe", folder)
    for name in ("text_encoder", "scheduler", "tokenizer"):
        ours = effusion.AutoModel.from_pretrained("us/pipe", subfolder=name)
        assert type(ours) is type(effusion.AutoModel.from_pretrained(folder, subfolder=name))


def test_components_say_where_they_are_from(folder: Path) -> None:
    theirs, ours = (lib.DiffusionPipeline.from_pretrained(str(folder)) for lib in (diffusers, effusion))
    for name in ("unet", "vae"):
        assert getattr(ours, name).config._name_or_path == getattr(theirs, name).config._name_or_path
    assert ours.text_encoder.name_or_path == theirs.text_encoder.name_or_path
