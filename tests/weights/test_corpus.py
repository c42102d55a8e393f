"""The corpus of bad input: each is refused with file and key, soon, in little memory; nothing runs, nothing is touched.

The canary of each test is a folder outside of the loader's root that a pickle, a name or a link tries to reach.
"""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from tests.bounds import bounded

import effusion
from effusion.core.errors import CheckpointError, UntrustedCode
from effusion.weights import gguf_writing
from effusion.weights.checkpoint import open_checkpoint, open_file
from effusion.weights.recognise import recognise


class Runs:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.path / "ran"),))


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """A folder outside of the root with a secret in it; looked at after the test."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.safetensors").write_bytes(safetensors.torch.save({"a": torch.ones(2)}))
    before = {p.name: p.stat().st_mtime_ns for p in outside.iterdir()}
    yield outside
    assert {p.name: p.stat().st_mtime_ns for p in outside.iterdir()} == before, "something ran, or wrote outside"


def header(entries: dict[str, Any], data: bytes = b"") -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def many(twice: bool) -> bytes:
    names = ",".join(f'"layer.{i}.weight":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for i in range(100_000))
    text = ("{" + names + (',"layer.7.weight":1' if twice else "") + "}").encode()
    return struct.pack("<Q", len(text)) + text


GOOD = safetensors.torch.save({"a.weight": torch.ones(4, 4), "b": torch.ones(3)})
SAFETENSORS: dict[str, tuple[bytes, str]] = {
    "truncated": (GOOD[:-5], "truncated"),
    "truncated in the header": (GOOD[:40], "truncated"),
    "unknown dtype": (header({"a": entry("F33")}, bytes(8)), "'a'.*F33"),
    "dtype of another width": (header({"a": entry("F64")}, bytes(8)), "'a'.*16 bytes"),
    "overlapping": (header({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)), "'b' overlaps"),
    "negative offsets": (header({"a": entry(offsets=(-8, 0))}, bytes(8)), "'a'.*data_offsets"),
    "shape that overflows": (header({"a": entry(shape=(2**61, 2**61, 16))}, bytes(8)), "'a'"),
    "nothing of too many": (header({"a": entry(shape=(0, 2**40, 2**40), offsets=(0, 0))}, b""), "'a'.*too large"),
    "shape of negatives": (header({"a": entry(shape=(-1, -2))}, bytes(8)), "'a'.*shape"),
    "hundred thousand entries, one twice": (many(True), "layer.7.weight.*twice"),
    "wrong magic": (b"NOPE" + bytes(200), "safetensors"),
    "an old pickle": (b"cos\nsystem\n(S'true'\ntR." + bytes(40), "safetensors"),
}


@pytest.mark.parametrize("case", SAFETENSORS)
def test_safetensors(case: str, tmp_path: Path, canary: Path) -> None:
    data, says = SAFETENSORS[case]
    (tmp_path / "bad.safetensors").write_bytes(data)
    for load in (open_file, effusion.load, effusion.AutoencoderKL.from_single_file):
        with pytest.raises(CheckpointError, match=rf"(?s)bad\.safetensors.*({says})"):
            bounded(lambda load=load: load(tmp_path / "bad.safetensors"))  # type: ignore[misc]


def test_a_hundred_thousand_entries_are_read_soon(tmp_path: Path) -> None:
    (tmp_path / "f.safetensors").write_bytes(many(False))
    verdict = bounded(lambda: recognise(open_file(tmp_path / "f.safetensors")))
    assert verdict.kind == "unknown"


# names of known networks with shapes or numbers that would cost the world, all at the price of a header
HUGE: dict[str, dict[str, tuple[int, ...]]] = {
    "layers without end": {
        "double_blocks.0.img_attn.qkv.weight": (3, 1), "double_blocks.99999999999.img_mod.lin.weight": (1, 1),
        "double_blocks.0.img_attn.norm.query_norm.scale": (1,), "img_in.weight": (1, 1),
        "final_layer.linear.weight": (1, 1), "txt_in.weight": (1, 1), "vector_in.in_layer.weight": (1, 1),
    },
    "a number too long to be one": {
        "double_blocks.0.img_attn.qkv.weight": (3, 1), f"double_blocks.{'9' * 5000}.x": (1, 1),
        "double_blocks.0.img_attn.norm.query_norm.scale": (1,), "img_in.weight": (1, 1),
        "final_layer.linear.weight": (1, 1), "txt_in.weight": (1, 1), "vector_in.in_layer.weight": (1, 1),
    },
    "positions of no numbers": {
        "joint_blocks.0.x_block.attn.qkv.weight": (3, 1), "x_embedder.proj.weight": (1, 1, 2, 2),
        "final_layer.linear.weight": (4, 1), "context_embedder.weight": (1, 1), "y_embedder.mlp.0.weight": (1, 1),
        "pos_embed": (1, 10**12, 0),
    },
    "only the mark of a network": {"y_embedder.y_proj.fc1.weight": (1, 1)},
    "a head of no width": {
        "transformer_blocks.0.img_mod.1.weight": (6, 1), "img_in.weight": (1, 1), "proj_out.weight": (4, 1),
        "transformer_blocks.0.attn.norm_q.weight": (0,), "txt_in.weight": (1, 1),
    },
    "a unet of nothing": {"input_blocks.0.0.weight": (1, 4, 3, 3), "input_blocks.77777777.1.norm.weight": (1,)},
    "an autoencoder of nothing": {"decoder.conv_in.weight": (1, 1), "decoder.up.0.x": (1,)},
}  # fmt: skip


@pytest.mark.parametrize("case", HUGE)
def test_names_and_shapes_that_would_cost_the_world(case: str, tmp_path: Path) -> None:
    entries, at = {}, 0
    for name, shape in HUGE[case].items():
        size = int(torch.Size(shape).numel())
        entries[name] = {"dtype": "U8", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    (tmp_path / "f.safetensors").write_bytes(header(entries, bytes(at)))
    with pytest.raises(CheckpointError, match=r"f\.safetensors"):
        bounded(lambda: effusion.load(tmp_path / "f.safetensors"))


@pytest.mark.parametrize("entries", [{"num_layers": 10**9}, {"sample_size": 10**9}, {"num_layers": -1},
                                     {"patch_size": 0}, {"num_attention_heads": "many"}, {"num_layers": 1e300},
                                     {"sample_size": 1920}, {"sample_size": 1 << 16, "num_attention_heads": 1}])  # fmt: skip
def test_configurations_that_would_cost_the_world(entries: dict[str, Any], tmp_path: Path) -> None:
    config = {"_class_name": "PixArtTransformer2DModel", **entries}
    (tmp_path / "config.json").write_text(json.dumps(config))
    safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        bounded(lambda: effusion.PixArtTransformer2DModel.from_pretrained(tmp_path))


def test_wrong_dtype_and_wrong_class(tmp_path: Path) -> None:
    vae = effusion.AutoencoderKL(block_out_channels=(32,))
    vae.save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    state = safetensors.torch.load_file(path)
    state["encoder.conv_in.weight"] = state["encoder.conv_in.weight"].to(torch.int32)
    safetensors.torch.save_file(state, path)
    with pytest.raises(CheckpointError, match=r"encoder\.conv_in\.weight is torch\.int32, expected floating"):
        effusion.AutoencoderKL.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"config\.json is that of a AutoencoderKL"):
        effusion.UNet2DConditionModel.from_pretrained(tmp_path)


# -- torch files ----------------------------------------------------------------------------------


def archive(path: Path, names: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", method) as target:
        for name, data in names.items():
            target.writestr(name, data)


def pickled_code(path: Path, canary: Path) -> None:
    torch.save({"a": torch.ones(2), "b": Runs(canary)}, path)


def bare_code(path: Path, canary: Path) -> None:
    path.write_bytes(pickle.dumps({"a": Runs(canary)}, protocol=2))


def bomb(path: Path, canary: Path) -> None:
    archive(path, {"archive/data.pkl": b"\0" * (64 << 20)}, zipfile.ZIP_DEFLATED)


def outside_names(path: Path, canary: Path) -> None:
    torch.save({"a": torch.ones(2)}, path)
    with zipfile.ZipFile(path) as source:
        found = {info.filename: source.read(info) for info in source.infolist()}
    archive(path, {**found, f"../../{canary.name}/new": b"x", f"{canary}/new2": b"x"})


def expanded(path: Path, canary: Path) -> None:
    torch.save({"a": torch.zeros(1).expand(1 << 40)}, path)


def damaged_archive(path: Path, canary: Path) -> None:
    torch.save({"a": torch.ones(200)}, path)
    data = bytearray(path.read_bytes())
    data[-60:-30] = bytes(30)
    path.write_bytes(data)


def truncated(path: Path, canary: Path) -> None:
    torch.save({"a": torch.ones(2000)}, path)
    path.write_bytes(path.read_bytes()[:900])


TORCH = {
    "a pickle that runs code": (pickled_code, UntrustedCode),
    "a bare pickle that runs code": (bare_code, UntrustedCode),
    "a zip bomb": (bomb, CheckpointError),
    "a tensor of one number that claims a trillion": (expanded, CheckpointError),
    "a damaged archive": (damaged_archive, CheckpointError),
    "truncated": (truncated, CheckpointError),
}


@pytest.mark.parametrize("case", TORCH)
def test_torch_files(case: str, tmp_path: Path, canary: Path) -> None:
    make, error = TORCH[case]
    make(tmp_path / "bad.ckpt", canary)
    with pytest.raises(error, match=r"bad\.ckpt"):
        bounded(lambda: effusion.load(tmp_path / "bad.ckpt"))


def test_names_in_an_archive_lead_nowhere(tmp_path: Path, canary: Path) -> None:
    outside_names(tmp_path / "f.bin", canary)
    with pytest.raises(CheckpointError, match=r"f\.bin"):
        effusion.load(tmp_path / "f.bin")
    assert not (tmp_path / "new").exists()
    assert not (tmp_path.parent / canary.name / "new").exists()


# -- GGUF -----------------------------------------------------------------------------------------


def test_gguf_with_false_counts_and_shapes(tmp_path: Path) -> None:
    path = tmp_path / "f.gguf"
    gguf_writing.write(path, {"blk.weight": torch.ones(4, 32), "b": torch.ones(3)}, "flux", "Q8_0")
    data = path.read_bytes()
    place = data.index(b"blk.weight") + len("blk.weight")  # axes, sizes, packing, offset
    patches = {
        8: (struct.pack("<Q", 1 << 60), "no real file"), 16: (struct.pack("<Q", 1 << 60), "no real file"),
        24: (struct.pack("<Q", 1 << 60), "at most"), place: (struct.pack("<I", 1 << 31), "'blk.weight'.*axes"),
        place + 4: (struct.pack("<Q", 1 << 62), "'blk.weight'|truncated"), place + 20: (b"\xee", "'blk.weight'.*packing"),
        place + 24: (struct.pack("<Q", 1 << 63), "'blk.weight'"), 4: (b"\x63", "version"),
        place + 5: (b"\0" * 7 + struct.pack("<Q", 1 << 63), "'blk.weight'"),  # nothing, of too many
    }  # fmt: skip
    for at, (patch, says) in patches.items():
        changed = bytearray(data)
        changed[at : at + len(patch)] = patch
        path.write_bytes(changed)
        with pytest.raises(CheckpointError, match=rf"(?s)f\.gguf.*({says})"):
            bounded(lambda: open_file(path))
    path.write_bytes(data[:-30])
    with pytest.raises(CheckpointError, match=r"f\.gguf.*truncated"):
        open_file(path)


# -- names and links ------------------------------------------------------------------------------


def sharded(folder: Path, weight_map: dict[str, str]) -> None:
    folder.mkdir()
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    "name", ["../outside/secret.safetensors", "{}/secret.safetensors", "x/../../outside/s", "a\0b"]
)
def test_an_index_names_files_in_its_folder_only(name: str, tmp_path: Path, canary: Path) -> None:
    sharded(tmp_path / "model", {"a": name.format(canary)})
    with pytest.raises(CheckpointError, match=r"index\.json names .* outside of its folder"):
        open_checkpoint(tmp_path / "model")


@pytest.mark.parametrize("what", ["config.json", "diffusion_pytorch_model.safetensors", "."])
def test_links_out_of_the_folder(what: str, tmp_path: Path, canary: Path) -> None:
    vae = effusion.AutoencoderKL(block_out_channels=(32,))
    vae.save_pretrained(tmp_path / "pipe" / "vae")
    inside = tmp_path / "pipe" / "vae" / what
    (tmp_path / "elsewhere").mkdir()
    target = tmp_path / "elsewhere" / "x"
    os.rename(inside, target)
    (tmp_path / "pipe" / "vae" if what == "." else inside).symlink_to(target)
    root = tmp_path / "pipe"
    with pytest.raises(CheckpointError, match="is a link to"):
        effusion.AutoencoderKL.from_pretrained(root, subfolder="vae")


@pytest.mark.parametrize("subfolder", ["../outside", "/etc", "vae/../../outside"])
def test_a_subfolder_stays_inside(subfolder: str, tmp_path: Path, canary: Path) -> None:
    with pytest.raises(CheckpointError, match="outside of its folder"):
        effusion.AutoencoderKL.from_pretrained(tmp_path, subfolder=subfolder)


# -- fuzzing: the same functions as `make fuzz`, for a moment ------------------------------------------


@pytest.mark.parametrize("target", ["safetensors", "gguf", "index", "recognise"])
def test_fuzz_targets_find_nothing_in_a_moment(target: str, tmp_path: Path) -> None:
    fuzz = pytest.importorskip("tests.fuzz")
    counts = fuzz.run(fuzz.TARGETS[target], tmp_path, examples=150, seed=1)
    assert counts["read"] + counts["refused"] == 150
    assert counts["refused"] > 20
