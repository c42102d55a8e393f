"""The safetensors reader against the reference implementation, and against files that lie."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effusion.core.errors import CheckpointError
from effusion.weights.safetensors_file import DTYPES, MAX_HEADER, SafetensorsFile, write


def every_dtype() -> dict[str, torch.Tensor]:
    raw = torch.arange(48, dtype=torch.uint8)  # a new tensor each: the reference refuses shared memory
    tensors = {f"t.{name}": (raw % 2 if name == "BOOL" else raw + 1).view(dtype) for name, dtype in DTYPES.items()}
    return {**tensors, "empty": torch.zeros(0, 3), "scalar": torch.tensor(2.5), "matrix": torch.randn(3, 5, 7).half()}


def pack(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(begin: int, end: int, shape: object = None, dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


def test_written_bytes_are_those_of_the_reference(tmp_path: Path) -> None:
    tensors = every_dtype()
    write(tmp_path / "ours", tensors, {"format": "é"})
    assert (tmp_path / "ours").read_bytes() == safetensors.torch.save(tensors, {"format": "é"})


@pytest.mark.parametrize("mapped", [True, False])
def test_reads_what_the_reference_writes(tmp_path: Path, mapped: bool) -> None:
    tensors = every_dtype()
    safetensors.torch.save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    file = SafetensorsFile(tmp_path / "theirs")
    assert file.metadata == {"format": "pt"}
    for name, tensor in tensors.items():
        found = file.tensor(name, mapped)
        assert found.dtype == tensor.dtype
        assert found.shape == tensor.shape
        assert torch.equal(found.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_slices_are_where_the_bytes_are(tmp_path: Path) -> None:
    tensor = torch.randn(4, 6)
    write(tmp_path / "f", {"x": tensor, "y": torch.ones(3)})
    part = SafetensorsFile(tmp_path / "f").slices["x"]
    raw = (tmp_path / "f").read_bytes()[part.offset : part.offset + part.nbytes]
    assert raw == tensor.numpy().tobytes()
    assert part.shape == (4, 6)
    assert part.dtype == torch.float32
    assert torch.equal(part.read(), tensor)


def test_misaligned_data_is_read(tmp_path: Path) -> None:
    header = json.dumps({"x": entry(0, 8)}).encode()
    header += b" " * ((1 - 8 - len(header)) % 4)  # data begins one past a multiple of four
    (tmp_path / "f").write_bytes(pack(header, struct.pack("<2f", 1.5, -2.0)))
    assert SafetensorsFile(tmp_path / "f").slices["x"].offset % 4 == 1
    assert SafetensorsFile(tmp_path / "f").tensor("x").tolist() == [1.5, -2.0]


def test_writing_to_a_mapped_tensor_never_reaches_the_file(tmp_path: Path) -> None:
    write(tmp_path / "f", {"x": torch.ones(2000)})
    before = (tmp_path / "f").read_bytes()
    tensor = SafetensorsFile(tmp_path / "f").tensor("x")
    tensor.zero_()
    assert (tmp_path / "f").read_bytes() == before
    assert tensor.sum() == 0
    assert SafetensorsFile(tmp_path / "f").tensor("x").sum() == 2000


def test_a_replaced_file_leaves_old_mappings_alone(tmp_path: Path) -> None:
    write(tmp_path / "f", {"x": torch.ones(2000)})
    tensor = SafetensorsFile(tmp_path / "f").tensor("x")
    write(tmp_path / "f", {"x": torch.zeros(3)})
    assert tensor.sum() == 2000


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    write(tmp_path / "f", {"x": torch.ones(2)})
    before = (tmp_path / "f").read_bytes()
    with pytest.raises(ValueError, match=r"y: .*meta"):
        write(tmp_path / "f", {"x": torch.ones(2), "y": torch.ones(2, device="meta")})
    assert (tmp_path / "f").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


GOOD = {"x": entry(0, 8), "y": entry(8, 16)}
BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty"),
    "short": (b"\x01\x02", "no safetensors file"),
    "header past the end": (struct.pack("<Q", 1000) + b"{}", "truncated"),
    "huge header": (struct.pack("<Q", 2**63) + b"{}", "claims"),
    "header beyond the bound": (struct.pack("<Q", MAX_HEADER + 1) + b"{}", "claims"),
    "a pickle": (b"\x80\x04\x95" + b"x" * 40, "safetensors"),
    "not json": (pack(b"{nonsense"), "header"),
    "not utf-8": (pack(b'{"\xff": 1}'), "header"),
    "a list": (pack(b"[1, 2]"), "starts with"),
    "deep": (pack(b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "header"),
    "twice": (pack(b'{"x":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"x":1}'), "twice"),
    "entry is a number": (pack({"x": 3}), "'x'"),
    "entry lacks a field": (pack({"x": {"dtype": "F32", "shape": [1]}}), "'x'"),
    "unknown dtype": (pack({"x": entry(0, 8, dtype="F33")}, bytes(8)), "F33"),
    "dtype is a list": (pack({"x": entry(0, 8, dtype=["F32"])}, bytes(8)), "dtype"),
    "wrong dtype": (pack({"x": entry(0, 8, [2], "F64")}, bytes(8)), "16 bytes"),
    "negative size": (pack({"x": entry(0, 8, [-2])}, bytes(8)), "shape"),
    "size is a float": (pack({"x": entry(0, 8, [2.0])}, bytes(8)), "shape"),
    "size is true": (pack({"x": entry(0, 4, [True])}, bytes(4)), "shape"),
    "shape overflow": (pack({"x": entry(0, 8, [2**62 - 1, 2**62 - 1, 16])}, bytes(8)), "bytes"),
    "many dimensions": (pack({"x": entry(0, 4, [1] * 100)}, bytes(4)), "shape"),
    "negative offset": (pack({"x": entry(-8, 0, [2])}, bytes(8)), "data_offsets"),
    "offsets reversed": (pack({"x": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}, bytes(8)), "data_offsets"),
    "offset beyond": (pack({"x": entry(0, 1 << 40)}, bytes(8)), "truncated"),
    "truncated": (pack(GOOD, bytes(15)), "truncated"),
    "trailing": (pack(GOOD, bytes(17)), "followed"),
    "overlap": (pack({"x": entry(0, 8), "y": entry(4, 12)}, bytes(12)), "overlaps"),
    "gap": (pack({"x": entry(0, 8), "y": entry(12, 16)}, bytes(16)), "gap"),
    "metadata of numbers": (pack({"__metadata__": {"a": 1}}), "__metadata__"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_refused_by_name(tmp_path: Path, case: str) -> None:
    data, says = BAD[case]
    (tmp_path / "bad.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=says) as caught:
        SafetensorsFile(tmp_path / "bad.safetensors")
    assert "bad.safetensors" in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        SafetensorsFile(tmp_path / "nothing")


def test_many_entries_stay_quick(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(pack({f"t{i}": entry(0, 0, [0]) for i in range(100_000)}))
    assert len(SafetensorsFile(tmp_path / "f").slices) == 100_000


def test_a_sparse_file_of_24_gigabytes_is_opened_at_once(tmp_path: Path) -> None:
    size = 24 << 30
    with (tmp_path / "f").open("wb") as file:
        file.write(pack({"x": entry(0, size)}))
        file.truncate(file.tell() + size)
    assert SafetensorsFile(tmp_path / "f").tensor("x")[-4:].tolist() == [0.0] * 4


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32), hits=st.integers(1, 8))
def test_mutated_headers_are_read_or_refused_never_worse(
    seed: int, hits: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rng = random.Random(seed)
    data = bytearray(safetensors.torch.save({"a": torch.ones(3), "b.c": torch.zeros(2, 2).half()}))
    for _ in range(hits):
        data[rng.randrange(len(data))] = rng.choice(b'0123456789{}[]",:-.eE \x00\xff')
    if rng.random() < 0.3:
        data = data[: rng.randrange(len(data))]
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    path.write_bytes(bytes(data))
    try:
        file = SafetensorsFile(path)
    except CheckpointError:
        return
    for name, part in file.slices.items():
        assert part.offset >= 0
        assert part.offset + part.nbytes <= len(data)
        assert file.tensor(name).nbytes == part.nbytes
