"""Networks of a pipeline wait for whoever asks for them first, and nothing shows that they did."""

from __future__ import annotations

import copy
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.loading.test_pipeline_loading import assert_same

import effusion
from effusion.core.errors import CheckpointError
from effusion.weights.prepare import Prepared

NETWORKS = {"unet", "vae", "text_encoder"}


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The classes of the networks that have got their weights, in order."""
    names: list[str] = []
    build = Prepared.build

    def noted(self: Any) -> Any:
        names.append(type(self.model).__name__)
        return build(self)

    monkeypatch.setattr(Prepared, "build", noted)
    return names


def test_a_network_is_read_when_it_is_asked_for(folder: Path, built: list[str]) -> None:
    pipe = effusion.DiffusionPipeline.from_pretrained(folder, variant="fp16")
    assert not built
    assert not NETWORKS & set(vars(pipe))
    unet = pipe.unet
    assert built == ["UNet2DConditionModel"]
    assert pipe.unet is unet
    assert unet.dtype == torch.float32
    assert not any(p.is_meta for p in unet.parameters())
    assert built == ["UNet2DConditionModel"]
    with pytest.raises(AttributeError, match="'StableDiffusionPipeline' object has no attribute 'transformer'"):
        _ = pipe.transformer


def test_what_is_replaced_is_never_read(folder: Path, built: list[str]) -> None:
    pipe = effusion.DiffusionPipeline.from_pretrained(folder)
    other = effusion.AutoencoderTiny()
    pipe.vae = other
    assert pipe.vae is other
    assert pipe.config["vae"] == ("diffusers", "AutoencoderTiny")
    pipe.register_modules(unet=None)
    assert pipe.unet is None
    assert "text_encoder" in dir(pipe)
    del pipe.text_encoder
    assert not hasattr(pipe, "text_encoder")
    assert not built


def test_the_files_may_be_gone_by_then(folder: Path, tmp_path: Path) -> None:
    whole = effusion.DiffusionPipeline.from_pretrained(folder, disable_mmap=True)
    assert vars(whole).keys() >= {"unet", "vae", "text_encoder"}
    pipe = effusion.DiffusionPipeline.from_pretrained(folder)
    half = effusion.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float16)
    half.save_pretrained(folder)  # over the files that wait to be read
    shutil.rmtree(folder)
    assert_same(pipe, whole)


def test_moving_reads_straight_to_the_device(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    devices: list[Any] = []
    build = Prepared.build

    def noted(self: Any) -> Any:
        devices.append(self.options.device)
        return build(self)

    monkeypatch.setattr(Prepared, "build", noted)
    pipe = effusion.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float16).to("meta")
    assert devices
    assert set(devices) == {torch.device("meta")}
    assert all(p.is_meta and p.dtype == torch.float16 for p in pipe.unet.parameters())
    devices.clear()
    pipe = effusion.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float16).to(torch.float32)
    assert set(devices) == {None}
    assert pipe.unet.conv_in.weight.dtype == torch.float32


@pytest.mark.parametrize("how", ["copy", "deepcopy"])
def test_copies_are_whole(folder: Path, how: str) -> None:
    pipe = effusion.DiffusionPipeline.from_pretrained(folder)
    other = getattr(copy, how)(pipe)
    assert_same(other, effusion.DiffusionPipeline.from_pretrained(folder))
    assert (other.unet is pipe.unet) == (how == "copy")


def test_two_threads_get_the_same_network(folder: Path, built: list[str]) -> None:
    pipe = effusion.DiffusionPipeline.from_pretrained(folder)
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(pipe.unet)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(unet) for unet in found}) == 1
    assert built == ["UNet2DConditionModel"]


def test_what_may_fail_fails_while_loading(folder: Path, built: list[str]) -> None:
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        effusion.DiffusionPipeline.from_pretrained(folder)
    assert not built


def test_classes_of_other_people_are_given_whole_networks(folder: Path) -> None:
    class Curious(effusion.DiffusionPipeline):
        def __init__(self, unet: Any, scheduler: Any) -> None:
            super().__init__()
            self.register_modules(unet=unet, scheduler=scheduler)
            self.mean = float(unet.conv_in.weight.mean())

    pipe = Curious.from_pretrained(folder)
    assert pipe.mean == float(pipe.unet.conv_in.weight.mean())
