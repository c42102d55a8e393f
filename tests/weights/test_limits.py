"""What a file or configuration can make a reader do: many names, long tables, and the process that opens pickles."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from tests.bounds import bounded

import effusion
from effusion.core.errors import CheckpointError, MissingExtra
from effusion.core.files import DAY, abandoned, replacing
from effusion.weights import torch_child, torch_file
from effusion.weights.checkpoint import from_dict, open_file
from effusion.weights.layouts.table import Row, Table, to_ours, translate
from effusion.weights.prepare import building
from effusion.weights.recognise import recognise
from effusion.weights.skeleton import Skeleton

# -- many names ----------------------------------------------------------------------------------

N = 30_000
UNET = ("input_blocks.0.0.weight", "input_blocks.1.0.out_layers.3.weight", "input_blocks.1.1.norm.weight")
VAE = ("encoder.conv_in.weight", "decoder.conv_in.weight", "decoder.conv_out.weight", "decoder.up.0.x")
FLUX = ("double_blocks.0.img_attn.qkv.weight", "double_blocks.0.img_attn.norm.query_norm.scale", "img_in.weight",
        "final_layer.linear.weight", "txt_in.weight", "vector_in.in_layer.weight")  # fmt: skip
MANY: dict[str, tuple[tuple[str, ...], str]] = {
    "blocks of a unet": (UNET, "input_blocks.{}.0.out_layers.3.weight"),
    "attention in blocks of a unet": (UNET, "input_blocks.{}.1.norm.weight"),
    "layers in a block of a unet": (UNET, "input_blocks.1.1.transformer_blocks.{}.norm1.weight"),
    "layers in many blocks": (UNET, "input_blocks.{half}.1.transformer_blocks.{rest}.norm1.weight"),
    "levels of an autoencoder": (VAE, "encoder.down.{}.block.0.conv2.weight"),
    "names in many levels": (VAE, "decoder.up.{half}.block.{rest}.x"),
    "blocks of a transformer": (FLUX, "double_blocks.{}.img_mod.lin.weight"),
    "names in many blocks": (FLUX, "double_blocks.{half}.x{rest}.weight"),
    "layers of a text encoder": (("text_model.encoder.layers.0.self_attn.q_proj.weight",
                                  "text_model.embeddings.token_embedding.weight"), "text_model.encoder.layers.{}.x"),
}  # fmt: skip


@pytest.mark.parametrize("case", MANY)
def test_many_names_of_a_known_network(case: str, tmp_path: Path) -> None:
    first, pattern = MANY[case]
    names = [pattern.format(i, half=i % 500, rest=i // 500) for i in range(N)]
    names += [f"encoder.down.{i}.block.0.conv2.weight" for i in range(500)] if "many levels" in case else []
    names = list(dict.fromkeys((*first, *names)))
    entries = {n: {"dtype": "U8", "shape": [1, 1, 1, 1], "data_offsets": [i, i + 1]} for i, n in enumerate(names)}
    for name in first[-4:] if first is FLUX else ():
        entries[name]["shape"] = [1, 1]
    text = json.dumps(entries).encode()
    (tmp_path / "f.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(len(names)))
    with pytest.raises(CheckpointError, match=r"f\.safetensors"):
        bounded(lambda: effusion.load(tmp_path / "f.safetensors"))


def test_many_rows_cost_no_more_than_few() -> None:
    table = Table(Row(f"up.{i}.block.{{}}.", f"ups.{5000 - i}.resnets.{{}}.") for i in range(5000))
    state = from_dict({f"up.{i % 5000}.block.{i}.w": torch.empty(0) for i in range(N)})
    found = bounded(lambda: to_ours(state, table))
    assert len(found) == N
    assert "ups.5000.resnets.25000.w" in found


def test_the_first_row_that_fits_wins() -> None:
    inner = (Row("a.", "x."), Row("b.weight", ("y.q", "y.k")))
    table = (
        Row("m.7.a.", "special."),
        Row("m.{}.", "n.{}.", inner),
        Row("m.{}.c.{}.d", "c.{}.{}"),
        Row("left.", "", ()),
    )
    cases = {
        "m.7.a.w": ("special.w",), "m.8.a.w": ("n.8.x.w",), "m.7.b.weight": ("n.7.y.q", "n.7.y.k"),
        "m.3.c.4.d": ("c.3.4",), "m.{}.a.w": None, "m.x.a.w": None, "m.8": None, "m.3.c.4.d.e": None, "left.w": None,
        "m.8.b.weight.x": None, "": None, "m..a.w": None,
    }  # fmt: skip
    for name, wanted in cases.items():
        hit = translate(table, name)
        assert (hit.names if hit else None) == wanted, name
    back = translate(table, "n.7.y.q", reverse=True)
    assert back is not None
    assert (back.names, back.fused) == (("m.7.b.weight",), ("n.7.y.q", "n.7.y.k"))


@pytest.mark.parametrize("shape", [(), (0, 4), (2, 4), (3,)])
def test_tensors_of_another_shape_than_the_layout_has(shape: tuple[int, ...]) -> None:
    table = (Row("qkv.weight", ("q.weight", "k.weight", "v.weight")), Row("p.weight", "p.weight", op="transpose"),
             Row("mod.weight", "mod.weight", op="swap halves"))  # fmt: skip
    for name in ("qkv.weight", "p.weight", "mod.weight"):
        wrong = {"qkv.weight": shape != (3,), "p.weight": False, "mod.weight": shape == ()}
        if not wrong[name]:
            continue
        with pytest.raises(CheckpointError, match=rf"the state dictionary: {name}.*shape"):
            to_ours(from_dict({name: torch.empty(shape)}), table)
    with pytest.raises(CheckpointError, match=r"p\.weight"):
        to_ours(from_dict({"p.weight": torch.empty(1, 1, 1)}), table)
    found = to_ours(from_dict({"q.weight": torch.empty(2, 2, 3, 3)}), (Row("q.weight", "q.weight", op="pixel"),))
    assert found["q.weight"].shape == (2, 2, 3, 3)  # which the network then refuses, naming both shapes


# -- long tables ---------------------------------------------------------------------------------

TABLES = {
    "ones": lambda: torch.ones(1 << 28),
    "zeros": lambda: torch.zeros(1 << 14, 1 << 14),
    "full": lambda: torch.full((1 << 28,), 1.0),
    "linspace": lambda: torch.linspace(0, 1, 1 << 28),
    "arange": lambda: torch.arange(1 << 28),
    "an outer product": lambda: torch.outer(torch.ones(1 << 15), torch.ones(1 << 15)),
    "a broadcast": lambda: torch.ones(1 << 15, 1) * torch.ones(1 << 15),
    "what is joined": lambda: torch.cat([torch.ones(1 << 25)] * 8),
    "what is repeated": lambda: torch.ones(1 << 10).repeat(1 << 20),
    "many of them": lambda: [torch.ones(1 << 20) for _ in range(1000)],
    "many parameters": lambda: [torch.nn.Parameter(torch.ones(1 << 20)) for _ in range(1000)],
}


@pytest.mark.parametrize("case", TABLES)
def test_tables_that_would_cost_the_world(case: str) -> None:
    def build() -> None:
        with building(torch.nn.Module, "f"):
            TABLES[case]()

    with pytest.raises(CheckpointError, match="f: its configuration describes tables of more than 400 MB"):
        bounded(build)


def test_tables_that_are_gone_or_views_do_not_count() -> None:
    with Skeleton(room=64 << 20):
        for _ in range(100):
            torch.ones(1 << 20).double().mul_(2)
        held = torch.ones(1, 1 << 20).expand(1000, -1)
        held = held[10:].unsqueeze(0).transpose(0, 1)
        assert torch.arange(3)[1].item() == 1
    assert held.shape == (990, 1, 1 << 20)


def test_a_norm_without_bounds(tmp_path: Path) -> None:
    config = {"_class_name": "AutoencoderKLQwenImage", "base_dim": 1 << 26}
    (tmp_path / "config.json").write_text(json.dumps(config))
    safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(CheckpointError, match="does not fit AutoencoderKLQwenImage"):
        bounded(lambda: effusion.AutoencoderKLQwenImage.from_pretrained(tmp_path))


@pytest.mark.parametrize("error", [ValueError, AssertionError, MemoryError, RecursionError])
def test_what_constructors_raise_names_the_file(error: type[Exception]) -> None:
    with (
        pytest.raises(CheckpointError, match="f: its configuration does not build a Module"),
        building(torch.nn.Module, "f"),
    ):
        raise error("odd")


def test_gguf_fields_that_are_bounded_only_one_by_one(tmp_path: Path) -> None:
    def field(name: bytes, kind: int, value: bytes) -> bytes:
        return struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + value

    numbers = struct.pack("<IQ", 0, 1 << 20) + bytes(1 << 20)
    text = struct.pack("<Q", 1 << 20) + b"x" * (1 << 20)
    for kind, value, count in ((9, numbers, 200), (8, text, 80)):
        fields = b"".join(field(b"f%d" % i, kind, value) for i in range(count))
        (tmp_path / "f.gguf").write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, count) + fields)
        with pytest.raises(CheckpointError, match=r"f\.gguf.*all together at most"):
            bounded(lambda: open_file(tmp_path / "f.gguf"))


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', '{"a": NaN}', '{"a": ' + "9" * 5000 + "}", "[" * 100_000])
def test_json_that_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        effusion.AutoencoderKL.from_pretrained(tmp_path)


# -- files in one step ---------------------------------------------------------------------------


def test_a_part_is_no_name_that_somebody_could_foresee(tmp_path: Path) -> None:
    names = set()
    for _ in range(2):
        with replacing(tmp_path / "f") as file:
            names |= {p.name for p in tmp_path.glob(".f.*")}
            file.write(b"new")
    assert len(names) == 2
    with pytest.raises(RuntimeError), replacing(tmp_path / "f") as file:
        file.write(b"half")
        raise RuntimeError
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"f": b"new"}


def test_abandoned_is_old_and_without_a_process(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert not abandoned(tmp_path, gone.pid)
    os.utime(tmp_path, (time.time() - 2 * DAY,) * 2)
    assert abandoned(tmp_path, gone.pid)
    assert not abandoned(tmp_path, os.getpid())
    assert not abandoned(tmp_path / "nothing", gone.pid)


# -- the child that opens pickles ------------------------------------------------------------------


def test_torch_that_is_not_installed_beside_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with PYTHONPATH or a user's folder: the child is told where this process has it from."""
    torch.save({"a": torch.ones(2)}, tmp_path / "f.bin")
    bare = [sys.executable, "-S", "-I"]
    run = subprocess.run

    def without_site(command: list[str], **options: Any) -> Any:
        return run([*bare, *command[2:]], **options)

    monkeypatch.setattr(torch_file.subprocess, "run", without_site)
    assert torch.equal(open_file(tmp_path / "f.bin").tensor("a"), torch.ones(2))
    (tmp_path / "f.bin").write_bytes((tmp_path / "f.bin").read_bytes() + b"")
    os.utime(tmp_path / "f.bin", (1, 1))
    monkeypatch.setattr(torch_file, "_torch_folders", list)
    with pytest.raises(MissingExtra, match=r"f\.bin: .*can't be imported.*No module named"):
        open_file(tmp_path / "f.bin")


def test_limits_are_set_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    done: dict[int, int] = {}

    def refuse_one(what: int, limits: tuple[int, int]) -> None:
        if what == resource.RLIMIT_CORE:
            raise ValueError("not allowed to raise maximum limit")
        done[what] = limits[0]

    hard = {resource.RLIMIT_AS: 1 << 20, resource.RLIMIT_CPU: resource.RLIM_INFINITY}
    monkeypatch.setattr(resource, "setrlimit", refuse_one)
    monkeypatch.setattr(resource, "getrlimit", lambda what: (0, hard.get(what, resource.RLIM_INFINITY)))
    torch_child._limit(1 << 30, 1000, 60)
    assert done == {resource.RLIMIT_AS: 1 << 20, resource.RLIMIT_CPU: 60, resource.RLIMIT_FSIZE: 1000}
    done.clear()
    monkeypatch.setattr(Path, "read_text", lambda *a, **k: (_ for _ in ()).throw(FileNotFoundError("no /proc")))
    torch_child._limit(1 << 30, 1000, 60)
    assert done == {resource.RLIMIT_CPU: 60, resource.RLIMIT_FSIZE: 1000}


def test_an_archive_with_many_entries_is_read_by_the_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "f.bin", "w") as archive:
        for i in range(300_000):
            entry = zipfile.ZipInfo(f"{i}")
            entry.CRC = entry.compress_size = entry.header_offset = 0
            archive.filelist.append(entry)
        archive._didModify = True
    assert (tmp_path / "f.bin").read_bytes()[:2] == b"PK"
    (tmp_path / "g.bin").write_bytes(b"PK\x03\x04" + (tmp_path / "f.bin").read_bytes())

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("parsed in this process")

    monkeypatch.setattr(zipfile, "ZipFile", refuse)
    with pytest.raises(CheckpointError, match=r"g\.bin"):
        bounded(lambda: open_file(tmp_path / "g.bin"))


def test_where_no_cache_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One folder for each process, gone with it; what killed ones left goes after a day."""
    (tmp_path / "file").write_text("")
    (tmp_path / "tmp").mkdir()
    torch.save({"a": torch.ones(2)}, tmp_path / "f.bin")
    left = tmp_path / "tmp" / "effusion-converted-999999999-x"
    left.mkdir()
    os.utime(left, (1, 1))
    code = f"""
from pathlib import Path
from effusion.weights.checkpoint import open_file
import torch
for i in range(2):
    open_file(Path({str(tmp_path / "f.bin")!r}))
    torch.save({{"a": torch.ones(i + 3)}}, {str(tmp_path / "g.bin")!r})
    open_file(Path({str(tmp_path / "g.bin")!r}))
found = [len(list(p.iterdir())) for p in Path({str(tmp_path / "tmp")!r}).glob("effusion-converted-*")]
assert len(found) == 1 and found[0] == 3, found
"""
    env = {**os.environ, "EFFUSION_CACHE": str(tmp_path / "file" / "x"), "TMPDIR": str(tmp_path / "tmp")}
    subprocess.run([sys.executable, "-c", code], env=env, check=True, timeout=200)
    assert not list((tmp_path / "tmp").glob("effusion-converted-*"))


def test_what_killed_children_left_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EFFUSION_CACHE", str(tmp_path))
    folder = tmp_path / "converted"
    folder.mkdir()
    (folder / ".f-1.safetensors.999999999-ab.part").write_bytes(b"old")
    os.utime(folder / ".f-1.safetensors.999999999-ab.part", (1, 1))
    (folder / ".f-2.safetensors.999999999-ab.part").write_bytes(b"new")
    torch.save({"a": torch.ones(2)}, tmp_path / "f.bin")
    open_file(tmp_path / "f.bin")
    assert [p.name for p in folder.glob(".*")] == [".f-2.safetensors.999999999-ab.part"]
    before = torch_file._place(tmp_path / "f.bin")
    monkeypatch.setattr(torch_file, "_FORMAT", torch_file._FORMAT + 1)
    assert torch_file._place(tmp_path / "f.bin") != before


def test_recognising_reads_parts_as_well() -> None:
    """A fused tensor without rows and a scalar modulation, under names of FLUX.1."""
    shapes = {"double_blocks.0.img_attn.qkv.weight": (3, 1), "double_blocks.0.img_attn.norm.query_norm.scale": (1,),
              "img_in.weight": (1, 1), "final_layer.linear.weight": (1, 1), "txt_in.weight": (1, 1),
              "vector_in.in_layer.weight": (1, 1)}  # fmt: skip
    for name, shape in {
        "double_blocks.0.txt_attn.qkv.weight": (0, 4),
        "final_layer.adaLN_modulation.1.weight": (),
    }.items():
        state = from_dict({n: torch.empty(s, device="meta") for n, s in {**shapes, name: shape}.items()})
        with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
            recognise(state).parts["transformer"].read(state)
