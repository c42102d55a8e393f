"""GGUF files: what the reference writes is read, and what lies is refused."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effusion.core.errors import CheckpointError
from effusion.weights.checkpoint import open_file
from effusion.weights.gguf_file import GGUFFile

KINDS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16", "F16", "F32")
PACKED = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")  # the package unpacks these, but can't pack them


def write(path: Path, kinds: tuple[str, ...] = KINDS) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "flux")
    expected = {}
    for name in kinds:
        kind = gguf.GGMLQuantizationType[name]
        block, size = gguf.constants.GGML_QUANT_SIZES[kind]
        if name in PACKED:
            raw = rng.integers(0, 64, (3, 2 * size), dtype=np.uint8)
            expected[name] = gguf.quants.dequantize(raw, kind)
        else:
            raw = gguf.quants.quantize(rng.standard_normal((3, 2 * max(block, 8)), dtype=np.float32), kind)
            expected[name] = gguf.quants.dequantize(raw, kind)
        writer.add_tensor(name, raw, raw_dtype=kind)
    writer.add_array("some.list", [1, 2, 3])
    writer.add_float32("some.number", 1.5)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def test_every_packing_is_read(tmp_path: Path) -> None:
    expected = write(tmp_path / "f.gguf", (*KINDS, *PACKED))
    checkpoint = open_file(tmp_path / "f.gguf")
    assert checkpoint.metadata["general.architecture"] == "flux"
    assert set(checkpoint) == set(expected)
    for name, values in expected.items():
        assert tuple(checkpoint[name].shape) == values.shape
        assert torch.equal(checkpoint.tensor(name).float().nan_to_num(), torch.from_numpy(values).nan_to_num()), name


BAD = {
    "wrong magic": (0, b"GGUX", "safetensors|GGUF"),
    "false version": (4, struct.pack("<I", 99), "version"),
    "false count of tensors": (8, struct.pack("<Q", 1 << 60), "no real file"),
    "one tensor too many": (8, struct.pack("<Q", 9), "truncated|damaged|unknown|axes|text"),
    "false count of fields": (16, struct.pack("<Q", 1 << 40), "no real file"),
    "a key without end": (24, struct.pack("<Q", 1 << 50), "at most"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files(tmp_path: Path, case: str) -> None:
    at, patch, says = BAD[case]
    path = tmp_path / "f.gguf"
    write(path)
    data = bytearray(path.read_bytes())
    data[at : at + len(patch)] = patch
    path.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match=says):
        open_file(path)


def test_truncated(tmp_path: Path) -> None:
    path = tmp_path / "f.gguf"
    write(path)
    data = path.read_bytes()
    for size in (5, 30, 200, len(data) // 2, len(data) - 40):
        path.write_bytes(data[:size])
        with pytest.raises(CheckpointError, match=r"f\.gguf"):
            open_file(path)


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_mutated_files_are_read_or_refused(seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.gguf"
    if not path.exists():
        write(path)
    rng = random.Random(seed)
    data = bytearray(path.read_bytes())
    for _ in range(rng.randrange(1, 6)):
        data[rng.randrange(900)] = rng.randrange(256)
    target = path.with_name("mutant.gguf")
    target.write_bytes(bytes(data))
    try:
        file = GGUFFile(target)
    except CheckpointError:
        return
    for part in file.slices.values():
        assert part.offset + part.nbytes <= len(data)
