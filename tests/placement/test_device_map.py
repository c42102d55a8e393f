"""Device maps of networks and pipelines, without accelerators: host memory and disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

import effusion
from effusion.core.errors import PlanConflict
from effusion.placement import device_map, machine, policies
from effusion.placement.engine import engine_of

from . import tiny_pipelines as tiny
from . import toys


@pytest.mark.parametrize(
    "placement",
    ["auto", "balanced", "cpu", {"": "cpu"}, {"": "disk"}, {"": "cpu", "blocks.1": "disk", "blocks.3.up": "disk"}],
    ids=str,
)
def test_maps_of_a_network(placement: Any, tmp_path: Path) -> None:
    module, x = toys.Net(), torch.randn(2, 16)
    with torch.no_grad():
        resident = module(x)
        placed = device_map.apply_device_map(module, placement, offload_folder=tmp_path)
        for _ in range(2):
            assert all(torch.equal(a, b) for a, b in zip(module(x), resident, strict=True))
    assert device_map.device_map_of(module) == placed
    if "disk" in placed.values():
        engine = engine_of(module)
        assert engine is not None and all(u.row.home == "disk" for u in engine.units)
        assert list(tmp_path.iterdir())
    policies.remove(module)
    assert not list(tmp_path.iterdir())


def test_the_map_is_shown_as_the_peer_shows_it(tmp_path: Path) -> None:
    tiny.save("sd", tmp_path)
    for given in ("cpu", torch.device("cpu"), {"": "cpu"}, "auto"):
        ours, theirs = (
            library.UNet2DConditionModel.from_pretrained(tmp_path / "sd", subfolder="unet", device_map=given)
            for library in (effusion, diffusers)
        )
        assert ours.hf_device_map == theirs.hf_device_map
    ours, theirs = (
        library.StableDiffusionPipeline.from_pretrained(tmp_path / "sd", device_map="cpu", safety_checker=None)
        for library in (effusion, diffusers)
    )
    assert ours.hf_device_map == theirs.hf_device_map == "cpu"
    for pipe in (ours, theirs):
        pipe.reset_device_map()
    assert ours.hf_device_map is theirs.hf_device_map is None


def test_memory_limits_are_kept(tmp_path: Path) -> None:
    module, x = toys.Net(), torch.randn(2, 16)
    with torch.no_grad():
        resident = module(x)
        placed = device_map.apply_device_map(
            module, "auto", max_memory={"cpu": "14KB", "disk": "1GB"}, offload_folder=tmp_path
        )
        assert all(torch.equal(a, b) for a, b in zip(module(x), resident, strict=True))
    assert set(placed.values()) == {"cpu", "disk"}
    engine = engine_of(module)
    assert engine is not None
    streamed = sum(u.row.nbytes for u in engine.units)
    total = sum(t.nbytes for t in [*module.parameters(), *module.buffers()])
    assert 0 < total - streamed <= 14_000
    policies.remove(module)


@pytest.mark.parametrize(
    ("placement", "options", "message"),
    [
        ({"": "cpu", "nowhere": "disk"}, {}, "nowhere"),
        ({"blocks": "cpu"}, {}, "leaves out"),
        ("cuda:7", {}, "no device 'cuda:7'"),
        ({"": "gpu"}, {}, "no device"),
        ("auto", {"max_memory": {"cpu": "1KB"}}, "fits on no device"),
        ("auto", {"max_memory": {"cpu": "1 parsec"}}, "no size"),
    ],
)
def test_bad_maps(placement: Any, options: Any, message: str) -> None:
    module, x = toys.Net(), torch.randn(2, 16)
    with pytest.raises(ValueError, match=message):
        device_map.apply_device_map(module, placement, **options)
    module(x)
    assert device_map.device_map_of(module) is None


def test_disk_without_a_folder_is_refused() -> None:
    with pytest.raises(PlanConflict, match="offload_folder"):
        device_map.apply_device_map(toys.Net(), {"": "disk"})


def test_loading_by_a_map(tmp_path: Path) -> None:
    saved = tiny.save("sd", tmp_path)
    plain = effusion.UNet2DConditionModel.from_pretrained(saved, subfolder="unet")
    inputs = (torch.randn(1, 4, 16, 16), 3, torch.randn(1, 5, 16))
    unet = effusion.UNet2DConditionModel.from_pretrained(saved, subfolder="unet", device_map={"": "disk"})
    assert unet.hf_device_map == {"": "disk"}
    assert not list(tmp_path.glob("effusion-*")), "weights of a file are read from that file"
    with torch.no_grad():
        assert torch.equal(unet(*inputs).sample, plain(*inputs).sample)
    auto = effusion.UNet2DConditionModel.from_pretrained(saved, subfolder="unet", device_map="auto")
    assert auto.hf_device_map is not None
    assert not hasattr(plain, "hf_device_map"), "accelerate takes any network with a map for one of its own"


def test_pipelines_by_a_map(tmp_path: Path) -> None:
    tiny.save("sd", tmp_path)
    wanted = tiny.run("sd", tiny.load("sd", tmp_path))
    pipe = tiny.load("sd", tmp_path, device_map="balanced", max_memory={"cpu": "1GB"})
    assert pipe.hf_device_map == {"vae": "cpu", "text_encoder": "cpu", "unet": "cpu"}
    assert torch.equal(tiny.run("sd", pipe), wanted)
    pipe.reset_device_map()
    assert pipe.hf_device_map is None
    pipe = tiny.load("sd", tmp_path, device_map={"unet": "disk", "vae": "cpu", "text_encoder": "cpu"})
    assert pipe.hf_device_map["unet"] == "disk"
    assert torch.equal(tiny.run("sd", pipe), wanted)
    pipe.enable_sequential_cpu_offload(device="cpu")
    assert torch.equal(tiny.run("sd", pipe), wanted)
    with pytest.raises(ValueError, match="fits on no device"):
        tiny.load("sd", tmp_path, device_map="balanced", max_memory={"cpu": 10})


# -- the machine -----------------------------------------------------------------------------------------------


def test_limits_of_control_groups(tmp_path: Path) -> None:
    """Version 1 beside version 2, a limit on the parent, file cache that can be dropped."""
    proc = tmp_path / "cgroup"
    proc.write_text("4:memory:/box/inner\n0::/slice/me\n")
    for folder, files in {
        "memory/box": {"memory.limit_in_bytes": "1000", "memory.usage_in_bytes": "700"},
        "memory/box/inner": {"memory.limit_in_bytes": str((1 << 63) - 4096), "memory.usage_in_bytes": "10"},
        "slice": {"memory.max": "5000", "memory.current": "4000", "memory.stat": "anon 7\ninactive_file 1500\n"},
        "slice/me": {"memory.max": "max", "memory.current": "10"},
    }.items():
        (tmp_path / folder).mkdir(parents=True)
        for name, text in files.items():
            (tmp_path / folder / name).write_text(text)
    found = machine.control_groups(proc, tmp_path)
    assert sorted(found) == [(1000, 700), (5000, 2500)]
    assert machine.control_groups(tmp_path / "none", tmp_path) == []
    assert machine.available_ram() > 0 and machine.device_memory(torch.device("cpu")) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without an accelerator")
def test_devices_that_are_not_there() -> None:
    assert machine.default_device() == torch.device("cpu")
    with pytest.raises(ValueError, match="no accelerator"):
        machine.default_device(gpu_id=1)
    with pytest.raises(ValueError, match="it has cpu"):
        machine.check_device("cuda")
    with pytest.raises(ValueError, match="different devices"):
        machine.default_device(0, "cuda:1")
    module = toys.Net()
    for device in ("cuda", "cuda:3", "nonsense", 0):
        with pytest.raises(ValueError, match="no device|is no device"):
            policies.apply_group_offloading(module, device)
    assert engine_of(module) is None
