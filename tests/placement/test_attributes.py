"""What the memory switches leave behind for scripts to read, beside the peer's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest

import effusion

from . import tiny_pipelines as tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("sd")
    tiny.save("sd", found)
    return found / "sd"


def both(folder: Path) -> list[Any]:
    return [
        library.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
        for library in (effusion, diffusers)
    ]


def test_model_offloading_leaves_a_handle_for_each_component(folder: Path) -> None:
    ours, theirs = both(folder)
    for pipe in (ours, theirs):
        pipe.enable_model_cpu_offload(device="cpu")
    assert len(ours._all_hooks) == len(theirs._all_hooks) == 3
    assert ours._offload_gpu_id == theirs._offload_gpu_id == 0
    assert ours._offload_device.type == theirs._offload_device.type == "cpu"
    assert ours._execution_device.type == theirs._execution_device.type
    for pipe in (ours, theirs):
        for hook in pipe._all_hooks:
            hook.offload()
        pipe.remove_all_hooks()
    assert ours._all_hooks == theirs._all_hooks == []


def test_sequential_offloading_leaves_no_handles(folder: Path) -> None:
    ours, theirs = both(folder)
    for pipe in (ours, theirs):
        pipe.enable_sequential_cpu_offload(device="cpu")
    assert ours._all_hooks == theirs._all_hooks == []
    assert ours._offload_device.type == theirs._offload_device.type == "cpu"


def test_a_policy_replaces_the_device_map(folder: Path) -> None:
    pipe = effusion.StableDiffusionPipeline.from_pretrained(folder, device_map="balanced", safety_checker=None)
    assert set(pipe.hf_device_map) == set(pipe.modules)
    pipe.enable_group_offload("cpu", offload_type="leaf_level")
    assert pipe.hf_device_map is None
