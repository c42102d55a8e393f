"""Finding checkpoints: shards, variants, torch files, and indices that lie."""

from __future__ import annotations

import json
import os
import pickle
import threading
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from effusion.core.errors import CheckpointError, MissingFile, UntrustedCode
from effusion.core.files import DAY
from effusion.weights import assign, names, saving
from effusion.weights.checkpoint import from_dict, open_checkpoint, open_file
from effusion.weights.entries import Checkpoint

STATE = {f"block.{i}.weight": torch.full((4, 4), float(i)) for i in range(6)}


def save(folder: Path, **options: Any) -> list[str]:
    folder.mkdir(exist_ok=True)
    return saving.save_weights(folder, STATE, **options)


def same(checkpoint: Checkpoint) -> bool:
    return set(checkpoint) == set(STATE) and all(torch.equal(checkpoint.tensor(n), t) for n, t in STATE.items())


@pytest.mark.parametrize("size", ["1GB", "150B".replace("150B", "0.15KB")])
@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("safe", [True, False])
def test_every_form_comes_back(tmp_path: Path, size: str, variant: str | None, safe: bool) -> None:
    files = save(tmp_path, max_shard_size=size, variant=variant, safe_serialization=safe)
    assert (len(files) == 1) == (size == "1GB")
    assert same(open_checkpoint(tmp_path, variant=variant))
    assert same(open_checkpoint(tmp_path, variant=variant, use_safetensors=safe))
    with pytest.raises(MissingFile, match="has none of"):
        open_checkpoint(tmp_path, variant=variant, use_safetensors=not safe)
    with pytest.raises(MissingFile, match="variant"):
        open_checkpoint(tmp_path, variant=None if variant else "fp16")


def test_safetensors_win_over_torch_files(tmp_path: Path) -> None:
    save(tmp_path)
    torch.save({"other": torch.ones(1)}, tmp_path / "diffusion_pytorch_model.bin")
    assert same(open_checkpoint(tmp_path))
    assert list(open_checkpoint(tmp_path, use_safetensors=False)) == ["other"]


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5 MB", 1_500_000), ("2KiB", 2048), (77, 77), ("10gb", 10**10)]
)
def test_sizes(text: str | int, size: int) -> None:
    assert saving.parse_size(text) == size


@pytest.mark.parametrize("text", ["5", "", "GB", "-1GB", 0, -5, "0GB", "5 parsecs", None])
def test_sizes_that_are_none(text: Any) -> None:
    with pytest.raises(ValueError, match="5GB"):
        saving.parse_size(text)


def index_of(folder: Path) -> Path:
    save(folder, max_shard_size=150)
    return folder / "diffusion_pytorch_model.safetensors.index.json"


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "a/../../x", "", "C:\\x", "..\\x", "a\0b", "\\\\host\\x"]
)
def test_an_index_can_not_leave_its_folder(tmp_path: Path, name: str) -> None:
    path = index_of(tmp_path)
    index = json.loads(path.read_text())
    index["weight_map"]["block.0.weight"] = name
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="outside of its folder"):
        open_checkpoint(tmp_path)


def test_a_shard_that_is_a_link_out_of_the_folder(tmp_path: Path) -> None:
    path = index_of(tmp_path / "model")
    shard = sorted(json.loads(path.read_text())["weight_map"].values())[0]
    os.rename(path.parent / shard, tmp_path / "elsewhere")
    (path.parent / shard).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="is a link to"):
        open_checkpoint(path.parent)


def test_safetensors_only_means_what_is_inside(tmp_path: Path) -> None:
    folders = [tmp_path / n for n in ("named", "listed")]
    for folder in folders:
        folder.mkdir()
        torch.save(STATE, folder / "x.bin")
        with pytest.raises(CheckpointError, match="x.bin is a torch file inside"):
            open_file(folder / "x.bin", pickles=False)
    (folders[0] / "x.bin").rename(folders[0] / "diffusion_pytorch_model.safetensors")
    index = {"weight_map": dict.fromkeys(STATE, "x.bin")}
    (folders[1] / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    assert same(open_checkpoint(folders[1]))
    for folder in folders:
        with pytest.raises(CheckpointError, match="is a torch file inside"):
            open_checkpoint(folder, use_safetensors=True)


def test_shards_read_at_the_same_time_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    state = {f"{i}.{n}": torch.randn(s).half() for i in range(8) for n, s in (("weight", (32, 32)), ("bias", (32,)))}
    saving.save_weights(tmp_path, state, max_shard_size=5000)
    readers = set()
    fresh = assign._fresh

    def watched(*args: Any) -> torch.Tensor:
        readers.add(threading.get_ident())
        return fresh(*args)

    monkeypatch.setattr(assign, "_fresh", watched)
    found = []
    for cores in (1, 3):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        with torch.device("meta"):
            model = torch.nn.Sequential(*(torch.nn.Linear(32, 32) for _ in range(8)))
        assign.assign(model, open_checkpoint(tmp_path), torch.float32)
        found.append(model.state_dict())
    assert len(readers) > 2
    for name, tensor in state.items():
        assert torch.equal(found[0][name], tensor.float()), name
        assert torch.equal(found[1][name], tensor.float()), name


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("model.safetensors", ("model", "safetensors", None, False)),
        ("model-00001-of-00002.fp16.safetensors", ("model", "safetensors", "fp16", False)),
        ("model.fp16-00001-of-00002.bin", ("model", "bin", "fp16", False)),
        ("model.safetensors.index.fp16.json", ("model", "safetensors", "fp16", True)),
        ("v1-5-pruned.ckpt", ("v1-5-pruned", "ckpt", None, False)),
        ("config.json", None),
        ("model.safetensors.json", None),
    ],
)
def test_names_are_read_as_they_are_made(name: str, says: Any) -> None:
    found = names.parse(name)
    assert (None if found is None else (found.stem, found.extension, found.variant, found.index)) == says
    made = names.WeightNames("model", "safetensors", "fp16")
    for own in (made.single, made.index, made.shard(1, 3)):
        assert names.parse(own) == names.Named("model", "safetensors", "fp16", own == made.index)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    path = index_of(tmp_path)
    shard = sorted(json.loads(path.read_text())["weight_map"].values())[1]
    (tmp_path / shard).unlink()
    with pytest.raises(MissingFile, match=shard):
        open_checkpoint(tmp_path)


def test_an_index_that_lists_what_is_not_there(tmp_path: Path) -> None:
    path = index_of(tmp_path)
    index = json.loads(path.read_text())
    index["weight_map"]["ghost"] = index["weight_map"]["block.0.weight"]
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="'ghost'"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "{" * 10_000]
)
def test_broken_indices(tmp_path: Path, text: str) -> None:
    index_of(tmp_path).write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        open_checkpoint(tmp_path)


def test_an_index_that_lists_a_tensor_twice(tmp_path: Path) -> None:
    index_of(tmp_path).write_text('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}')
    with pytest.raises(CheckpointError, match="'a' is there twice"):
        open_checkpoint(tmp_path)


# -- torch files ---------------------------------------------------------------------------------


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("legacy", [True, False])
def test_a_pickle_that_wants_to_run_code(tmp_path: Path, legacy: bool) -> None:
    canary = tmp_path / "canary"
    value = {"w": torch.ones(2), "x": Canary(canary)}
    torch.save(value, tmp_path / "f.bin", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UntrustedCode, match=r"f\.bin"):
        open_file(tmp_path / "f.bin")
    (tmp_path / "g.bin").write_bytes(pickle.dumps(Canary(canary)))
    with pytest.raises((UntrustedCode, CheckpointError), match=r"g\.bin"):
        open_file(tmp_path / "g.bin")
    assert not canary.exists()


@pytest.mark.parametrize("value", [[torch.ones(2)], torch.ones(2), {"a": 1}, 3])
def test_torch_files_without_a_dictionary_of_tensors(tmp_path: Path, value: Any) -> None:
    torch.save(value, tmp_path / "f.bin")
    with pytest.raises(CheckpointError, match=r"f\.bin"):
        open_file(tmp_path / "f.bin")


def test_a_damaged_torch_file(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "f.bin")
    data = (tmp_path / "f.bin").read_bytes()
    (tmp_path / "f.bin").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=r"f\.bin"):
        open_file(tmp_path / "f.bin")


def test_a_zip_bomb(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "f.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * (64 << 20))
    with pytest.raises(CheckpointError, match="unpacks to"):
        open_file(tmp_path / "f.bin")


def test_lightning_checkpoints_are_unwrapped(tmp_path: Path) -> None:
    torch.save({"state_dict": STATE, "epoch": 3}, tmp_path / "f.ckpt")
    assert same(open_file(tmp_path / "f.ckpt"))


# -- renaming and matching -----------------------------------------------------------------------


def test_renaming_keeps_what_the_network_has() -> None:
    state = {"a.query.weight": torch.ones(1), "a.proj_attn.bias": torch.ones(1), "query": torch.ones(1)}
    wanted = dict.fromkeys(["a.to_q.weight", "a.to_out.0.bias", "query"])
    table = {"query": "to_q", "proj_attn": "to_out.0"}
    assert set(assign.rename(from_dict(state), table, wanted)) == set(wanted)


def test_renaming_into_one_name_is_refused() -> None:
    state = {"a.query": torch.ones(1), "a.to_q": torch.ones(1)}
    with pytest.raises(CheckpointError, match="both an old form"):
        assign.rename(from_dict(state), {"query": "to_q"}, {"a.to_q": None})


# -- staging -------------------------------------------------------------------------------------


def test_a_save_that_fails_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("old")
    with pytest.raises(RuntimeError, match="power cut"), saving.staged(tmp_path) as aside:
        (aside / "a.json").write_text("new")
        raise RuntimeError("power cut")
    assert (tmp_path / "a.json").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(RuntimeError), saving.staged(tmp_path / "new"):
        raise RuntimeError
    assert not (tmp_path / "new").exists()


def test_what_a_dead_process_left_is_swept_up(tmp_path: Path) -> None:
    """Only after a day: on a folder that machines share, a number says nothing about whether its process lives."""
    yesterday = time.time() - 2 * DAY
    names = {
        ".saving-999999999-old": yesterday,
        ".saving-999999999-new": None,
        f".saving-{os.getppid()}-old": yesterday,
    }
    for name, when in names.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "big").write_text("")
        if when is not None:
            os.utime(tmp_path / name, (when, when))
    with saving.staged(tmp_path) as aside:
        (aside / "b").write_text("x")
    assert {p.name for p in tmp_path.iterdir()} == {"b", *names} - {".saving-999999999-old"}


def test_saving_to_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("")
    with pytest.raises(CheckpointError, match="is a file"), saving.staged(tmp_path / "f"):
        pass
