"""Files that change, disks that are full, devices that are not there, memory that ends: named errors, nothing lost."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest
import torch

from effusion.core.errors import CheckpointError, PlanConflict
from effusion.placement import homes, policies, sources
from effusion.placement.engine import engine_of
from effusion.weights.safetensors_file import SafetensorsFile, write

from . import toys
from .conftest import POLICIES


def mapped(folder: Path) -> tuple[toys.Fails, Path]:
    """A network whose weights are slices of a file."""
    module, path = toys.Fails(), folder / "weights.safetensors"
    write(path, dict(module.state_dict()))
    file = SafetensorsFile(path)
    for name, parameter in module.named_parameters():
        parameter.data = file.tensor(name)
    return module, path


def test_weights_of_a_file_are_read_from_it(tmp_path: Path) -> None:
    module, path = mapped(tmp_path)
    policies.apply_group_offloading(module, "cpu", offload_to_disk_path=tmp_path / "off", use_stream=True)
    assert not (tmp_path / "off").exists(), "nothing is written for weights that are in a file"
    x = torch.randn(2, 8)
    with torch.no_grad():
        wanted = module(x)
        path.unlink()  # the name is gone, the file is not
        assert torch.equal(module(x), wanted)
        shutil.copy(__file__, path)
        assert torch.equal(module(x), wanted)
    policies.remove(module)


def test_a_file_that_is_written_into_is_noticed(tmp_path: Path) -> None:
    module, path = mapped(tmp_path)
    x = torch.randn(2, 8)
    original = path.read_bytes()
    policies.apply_group_offloading(module, "cpu", offload_to_disk_path=tmp_path / "off", use_stream=True)
    with torch.no_grad():
        wanted = module(x)
        time.sleep(0.02)
        with path.open("r+b") as file:
            file.seek(-4, os.SEEK_END)
            file.write(b"\1\2\3\4")
        for _ in range(2):
            with pytest.raises(CheckpointError, match=r"weights\.safetensors was changed while weights are lent"):
                module(x), policies.free(module), module(x)
        path.write_bytes(original)
        sources._open_files.clear()
        policies.remove(module)
        assert torch.equal(module(x), wanted)


def test_a_file_that_is_cut_is_noticed_when_read(tmp_path: Path) -> None:
    file = tmp_path / "short"
    file.write_bytes(b"x" * 100)
    opened = sources.open_file(file)
    assert opened is not None
    with pytest.raises(CheckpointError, match="ends at byte 100"):
        opened.read(memoryview(bytearray(50)), 80)


@pytest.mark.parametrize("kind", ["file", "readonly", "full"])
def test_folders_that_cant_be_used(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = toys.Fails(), torch.randn(2, 8)
    with torch.no_grad():
        wanted = module(x)
    before = {n: p.data_ptr() for n, p in module.named_parameters()}
    folder = tmp_path / "off"
    if kind == "file":
        folder.write_text("I am a file")
    if kind == "readonly":
        folder = Path("/proc/nowhere")
    if kind == "full":
        small = os.statvfs_result((4096, 4096, 10, 0, 0, 10, 10, 10, 0, 255))
        monkeypatch.setattr(sources.os, "statvfs", lambda path: small)
    with pytest.raises(CheckpointError, match="can't be offloaded to"):
        policies.apply_group_offloading(module, "cpu", offload_to_disk_path=folder)
    assert {n: p.data_ptr() for n, p in module.named_parameters()} == before
    assert engine_of(module) is None or not engine_of(module).units  # type: ignore[union-attr]
    with torch.no_grad():
        assert torch.equal(module(x), wanted)


def test_a_disk_that_fills_up_while_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = toys.Fails(), torch.randn(2, 8)
    with torch.no_grad():
        wanted = module(x)
    real, count = homes.write_offload_file, []

    def fills(path: Path, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        count.append(path)
        if len(count) == 3:
            raise CheckpointError(f"offloading weights to {path} failed: No space left on device")
        return real(path, tensors)

    monkeypatch.setattr(homes, "write_offload_file", fills)
    with pytest.raises(CheckpointError, match="No space left"):
        policies.apply_group_offloading(module, "cpu", offload_to_disk_path=tmp_path)
    assert not list(tmp_path.iterdir()), "half an offload is left on the disk"
    with torch.no_grad():
        assert torch.equal(module(x), wanted)
        POLICIES["disk-leaf"](module, tmp_path) if len(count) > 3 else None
    monkeypatch.setattr(homes, "write_offload_file", real)
    POLICIES["disk-leaf"](module, tmp_path)
    with torch.no_grad():
        assert torch.equal(module(x), wanted)
    policies.remove(module)


def test_placed_by_accelerate_is_named() -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    module = toys.Fails()
    add_hook_to_module(module.blocks[0], ModelHook())
    with pytest.raises(PlanConflict, match="accelerate"):
        policies.cpu_offload(module, "cpu")
    remove_hook_from_module(module.blocks[0])
    policies.cpu_offload(module, "cpu")
    policies.remove(module)
