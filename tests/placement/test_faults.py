"""Files that change, disks that are full, devices that are not there, memory that ends: named errors, nothing lost."""

from __future__ import annotations

import errno
import gc
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from effusion.core.errors import BudgetError, CheckpointError, PlanConflict
from effusion.placement import arena, homes, lane, offload_files, policies, sources
from effusion.placement.engine import engine_of
from effusion.placement.patches import add_patch
from effusion.placement.units import by_block
from effusion.weights.safetensors_file import SafetensorsFile, write

from . import tiny_pipelines as tiny
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
        monkeypatch.setattr(offload_files.os, "statvfs", lambda path: small)
    with pytest.raises(CheckpointError, match="can't be offloaded to"):
        policies.apply_group_offloading(module, "cpu", offload_to_disk_path=folder)
    assert {n: p.data_ptr() for n, p in module.named_parameters()} == before
    assert engine_of(module) is None or not engine_of(module).units  # type: ignore[union-attr]
    with torch.no_grad():
        assert torch.equal(module(x), wanted)


def test_what_killed_processes_left_is_swept_up(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    left = [f"effusion-{gone.pid}-0a-unet-down.safetensors", f".effusion-{gone.pid}-0a-unet-up.part"]
    kept = [
        f"effusion-{os.getppid()}-0a-unet-down.safetensors",
        f".effusion-{os.getpid()}-0a-x.part",
        "effusion-x-y.safetensors",
    ]
    for name in (*left, *kept):
        (tmp_path / name).touch()
    offload_files.check_folder(tmp_path, 0)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(kept), "nor does trying the folder leave anything"


def test_trying_a_folder_leaves_nothing_to_a_process_that_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    real = offload_files.tempfile.TemporaryFile

    def trying(**where: Any) -> Any:
        file = real(**where)
        seen.extend(p.name for p in Path(where["dir"]).iterdir())
        return file

    monkeypatch.setattr(offload_files.tempfile, "TemporaryFile", trying)
    offload_files.check_folder(tmp_path, 0)
    assert not seen, "the file has no name"


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
    assert len(count) == 3
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


# -- the pipeline afterwards ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipelines")
    tiny.save("sd", folder)
    return folder


def weights(pipe: Any) -> dict[str, torch.Tensor]:
    return {f"{n}.{k}": v for n, m in pipe.modules.items() for k, v in m.state_dict().items()}


def no_such_device(pipe: Any, folder: Path, patch: pytest.MonkeyPatch) -> None:
    pipe.enable_group_offload("cuda:9")


def no_such_device_to(pipe: Any, folder: Path, patch: pytest.MonkeyPatch) -> None:
    pipe.to("cuda:9")


def not_writable(pipe: Any, folder: Path, patch: pytest.MonkeyPatch) -> None:
    pipe.enable_layerwise_casting(torch.float16)  # weights of no file
    pipe.enable_group_offload("cpu", offload_to_disk_path="/proc/nowhere")


def full(pipe: Any, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """No room at the third write of a file; the check before had seen enough."""
    pipe.enable_layerwise_casting(torch.float16)
    real, count = os.replace, [0]

    def replace(source: Any, target: Any) -> None:
        count[0] += 1
        if count[0] == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(source, target)

    patch.setattr(offload_files.os, "replace", replace)
    pipe.enable_group_offload("cpu", offload_to_disk_path=folder)


def two_policies(pipe: Any, folder: Path, patch: pytest.MonkeyPatch) -> None:
    policies.cpu_offload(pipe.unet.mid_block, "cpu")
    try:
        pipe.enable_sequential_cpu_offload(device="cpu")
    finally:
        policies.remove(pipe.unet.mid_block)


def moved_to_meta(pipe: Any, folder: Path, patch: pytest.MonkeyPatch) -> None:
    pipe.enable_group_offload("cpu", offload_to_disk_path=folder)
    kept = {n: p.data for n, p in pipe.unet.mid_block.named_parameters()}
    nn.Module.to(pipe.unet.mid_block, "meta")
    try:
        tiny.run("sd", pipe)
    finally:
        pipe.unet.mid_block.load_state_dict(kept, assign=True)


def all_moved_to_meta(pipe: Any, folder: Path, patch: pytest.MonkeyPatch) -> None:
    pipe.enable_group_offload("cpu", offload_to_disk_path=folder)
    kept = {n: p.data for n, p in pipe.unet.named_parameters()}
    nn.Module.to(pipe.unet, "meta")
    try:
        tiny.run("sd", pipe)
    finally:
        pipe.unet.load_state_dict(kept, assign=True)


def memory_ends_in_a_step(pipe: Any, folder: Path, patch: pytest.MonkeyPatch) -> None:
    pipe.enable_group_offload("cpu", use_stream=True, offload_to_disk_path=folder)

    def stop(*_: Any) -> None:
        raise torch.OutOfMemoryError("no room for activations")

    handle = pipe.unet.mid_block.register_forward_pre_hook(stop)
    try:
        tiny.run("sd", pipe)
    finally:
        handle.remove()


def memory_ends_while_lending(pipe: Any, folder: Path, patch: pytest.MonkeyPatch) -> None:
    pipe.enable_group_offload("cpu", use_stream=True, offload_to_disk_path=folder)

    def no_room(*args: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("no room")

    patch.setattr(lane, "allocate", no_room)
    patch.setattr(arena, "allocate", no_room)
    tiny.run("sd", pipe)


@pytest.mark.parametrize(
    ("happens", "error", "message"),
    [
        (no_such_device, ValueError, "no device"),
        (no_such_device_to, ValueError, "no device"),
        (not_writable, CheckpointError, "can't be offloaded to /proc/nowhere"),
        (full, CheckpointError, "No space left"),
        (two_policies, PlanConflict, "a part of it"),
        (moved_to_meta, PlanConflict, "meta device"),
        (all_moved_to_meta, PlanConflict, "meta device"),
        (memory_ends_in_a_step, torch.OutOfMemoryError, "activations"),
        (memory_ends_while_lending, BudgetError, "don't fit"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_pipeline_after_a_fault(
    happens: Any, error: type[Exception], message: str, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = tiny.load("sd", saved)
    if happens in (not_writable, full):
        pipe.enable_layerwise_casting(torch.float16)
    before, wanted = weights(pipe), tiny.run("sd", pipe)
    with monkeypatch.context() as patch, pytest.raises(error, match=message):
        happens(pipe, tmp_path, patch)
    assert torch.equal(tiny.run("sd", pipe), wanted), "the pipeline as it is after the error"
    pipe.enable_group_offload("cpu", use_stream=True, offload_to_disk_path=tmp_path)
    assert torch.equal(tiny.run("sd", pipe), wanted), "with a policy set anew"
    pipe.remove_all_hooks()
    after = weights(pipe)
    assert after.keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in after.items())
    assert not list(tmp_path.iterdir())


def test_nothing_grows_over_fifty_calls(saved: Path, tmp_path: Path) -> None:
    """Resident memory and open files of a whole pipeline that is cast, patched and read from disk."""
    pipe = tiny.load("sd", saved)
    pipe.enable_layerwise_casting(torch.float8_e4m3fn)
    add_patch(pipe.unet, "style", {"conv_in.weight": torch.ones_like(pipe.unet.conv_in.weight).float()})
    pipe.enable_group_offload("cpu", offload_type="leaf_level", use_stream=True, offload_to_disk_path=tmp_path)

    def held() -> tuple[int, int]:
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/fd"))

    def fifty() -> None:
        for _ in range(50):
            tiny.run("sd", pipe, num_inference_steps=1, height=8, width=24, guidance_scale=1.0)

    fifty()
    memory, files = held()
    fifty()
    assert held()[1] == files
    assert held()[0] - memory < 2 << 20
    pipe.remove_all_hooks()


def test_mapped_weights_are_no_second_copy(tmp_path: Path) -> None:
    """64 MiB of weights in a file, streamed: hardly anything of them is this process's own memory."""
    module = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(16)))
    write(tmp_path / "weights.safetensors", dict(module.state_dict()))
    file = SafetensorsFile(tmp_path / "weights.safetensors")
    for name, parameter in module.named_parameters():
        parameter.data = file.tensor(name)
    gc.collect()

    def own() -> int:
        fields = dict(line.split(":") for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
        return 1024 * sum(int(fields[k].split()[0]) for k in ("Private_Clean", "Private_Dirty"))

    policies.apply_group_offloading(module, "cpu", use_stream=True, offload_to_disk_path=tmp_path / "off")
    x = torch.randn(1, 1024)
    with torch.no_grad():
        before = own()
        for _ in range(3):
            module(x)
        assert own() - before < 16 << 20, "more than the ring, two layers, was taken"
    policies.remove(module)


def test_pinned_buffers_have_the_exact_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted where memory is pinned: torch's own allocator would round each up to a power of two."""
    taken: list[int] = []
    real = homes.pinned_bytes

    def counted(nbytes: int) -> torch.Tensor:
        taken.append(nbytes)
        return real(nbytes)

    monkeypatch.setattr(homes, "pinned_bytes", counted)
    module = nn.ModuleList(nn.Linear(100, 77) for _ in range(3))
    groups = by_block(module)
    total = homes.to_pinned(groups)
    weights = sum(p.nbytes for p in module.parameters())
    assert total == sum(taken)
    assert weights <= total <= weights + 512 * 2 * 3, "each tensor starts at a multiple of 512 bytes, nothing else"
