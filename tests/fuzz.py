"""Fuzzing the readers: bytes are read, or refused with a CheckpointError; anything else is a find.

python -m tests.fuzz                       # with atheris (coverage-guided), a minute for each target
python -m tests.fuzz --seconds 10 gguf     # one of them, shorter
python -m tests.fuzz --blind               # mutations without coverage, where atheris is not installed
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import safetensors.torch
import torch

atheris = sys.modules.get("atheris")  # imported before by the processes that `guided` starts
with atheris.instrument_imports(include=["effusion.weights", "effusion.quant"]) if atheris else nullcontext():
    from effusion.core.errors import CheckpointError
    from effusion.weights import gguf_writing
    from effusion.weights.checkpoint import from_dict, open_file, read_index
    from effusion.weights.gguf_file import GGUFFile
    from effusion.weights.recognise import recognise
    from effusion.weights.safetensors_file import SafetensorsFile

Target = Callable[[bytes, Path], None]
DATA = 4096  # bytes of an input at most


def _file(data: bytes, folder: Path, name: str) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def safetensors_target(data: bytes, folder: Path) -> None:
    """A file: every slice has to lie inside of it."""
    file = SafetensorsFile(_file(data, folder, "f.safetensors"))
    for part in file.slices.values():
        assert 0 <= part.offset <= part.offset + part.nbytes <= len(data)
        assert file.read(part).nbytes == part.nbytes


def gguf_target(data: bytes, folder: Path) -> None:
    """A file: every slice has to lie inside of it, and what is packed is unpacked."""
    path = _file(data, folder, "f.gguf")
    file = GGUFFile(path)
    for part in file.slices.values():
        assert 0 <= part.offset <= part.offset + part.nbytes <= len(data)
    checkpoint = open_file(path) if data.startswith(b"GGUF") else from_dict({})
    for name, entry in checkpoint.items():
        assert tuple(checkpoint.tensor(name).shape) == tuple(entry.shape)


def index_target(data: bytes, folder: Path) -> None:
    """An index: its names stay in its folder."""
    for name in read_index(_file(data, folder, "index.json")).values():
        assert (folder / name).resolve().is_relative_to(folder.resolve())


def recognise_target(data: bytes, folder: Path) -> None:
    """Names and sizes out of the bytes, as meta tensors: told what they are and read as that, or refused."""
    lines = data.decode("utf-8", "replace").split("\n")
    state = {}
    for line in lines[:200]:
        name, *sizes = line.split(" ")
        shape = [int(s) % 4096 for s in sizes[:5] if s.isascii() and s.isdigit() and len(s) < 9]
        state[name] = torch.empty(shape, device="meta")
    checkpoint = from_dict(state)
    for part in recognise(checkpoint).parts.values():
        assert all(entry.nbytes >= 0 for entry in part.read(checkpoint).values())


TARGETS: dict[str, Target] = {
    "safetensors": safetensors_target,
    "gguf": gguf_target,
    "index": index_target,
    "recognise": recognise_target,
}


def seeds(target: Target) -> list[bytes]:
    """Good inputs to begin with."""
    small = {"a.weight": torch.ones(2, 32), "b": torch.ones(3).half(), "v_pred": torch.ones(0)}
    if target is safetensors_target:
        return [safetensors.torch.save(small), safetensors.torch.save({}, {"format": "pt"})]
    if target is gguf_target:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "f"
            found = []
            for packing in ("Q8_0", "Q4_0", None):
                gguf_writing.write(path, small, "flux", packing)
                found.append(path.read_bytes())
            return found
    if target is index_target:
        return [json.dumps({"weight_map": {"a": "x-00001-of-00002.safetensors", "b": "y/z.bin"}}).encode()]
    flux = (
        "double_blocks.0.img_attn.qkv.weight 9 3\nimg_in.weight 3 4\ndouble_blocks.0.img_attn.norm.query_norm.scale 3\n"
        "final_layer.linear.weight 4 3\ntxt_in.weight 3 4\nvector_in.in_layer.weight 3 4"
    )
    marks = (
        flux,
        f"{flux}\ndouble_blocks.0.txt_attn.qkv.weight 9 3\nfinal_layer.adaLN_modulation.1.weight 6 3",
        "joint_blocks.0.x_block.attn.qkv.weight 3 1\nx_embedder.proj.weight 1 1 2 2\npos_embed 1 16 1",
        "input_blocks.0.0.weight 8 4 3 3\ninput_blocks.1.0.out_layers.3.weight 8 8 3 3\ninput_blocks.1.1.norm.weight 8",
        "decoder.conv_in.weight 1 1\ndecoder.up.0.x 1\nencoder.down.0.block.0.conv2.weight 8 8",
        "encoder.downsamples.0.residual.2.weight 8 8\ndecoder.head.2.weight 3 8\nconv2.weight 4 4",
        "shared.weight 9 8\nencoder.block.0.layer.0.SelfAttention.q.weight 8 8",
        "y_embedder.y_proj.fc1.weight 8 8\nx_embedder.proj.weight 8 4 2 2\nlora_A.weight 4 768",
    )
    return [mark.encode() for mark in marks]


def once(target: Target, data: bytes, folder: Path) -> str:
    """``"read"`` or ``"refused"``; anything else that ``target`` raises is a find."""
    try:
        target(data[:DATA], folder)
    except CheckpointError:
        return "refused"
    return "read"


def mutated(data: bytes, rng: random.Random) -> bytes:
    """``data`` with some bytes changed, cut out, doubled, or numbers made large."""
    out = bytearray(data)
    for _ in range(rng.randrange(1, 8)):
        at, kind = rng.randrange(len(out) + 1), rng.randrange(5)
        if kind == 0 and at < len(out):
            out[at] = rng.randrange(256)
        elif kind == 1:
            del out[at : at + rng.randrange(1, 9)]
        elif kind == 2:
            out[at:at] = out[at : at + rng.randrange(1, 33)]
        elif kind == 3:
            out[at : at + 8] = rng.choice((b"\xff" * 8, bytes(8), b"99999999", b"\0\0\0\0\0\0\0\x80"))
        else:
            out[at:at] = rng.choice((b"[", b"{", b'"', b"../", b" 0", b"-1", b"1e99", b"\n"))
    return bytes(out)


def run(target: Target, folder: Path, examples: int = 0, seconds: float = 0.0, seed: int = 0) -> Counter[str]:
    """Try mutations of the seeds, so many of them or so long; returns how many were read and refused."""
    rng, good, counts = random.Random(seed), seeds(target), Counter[str]()
    end = time.monotonic() + seconds
    while counts.total() < examples or time.monotonic() < end:
        counts[once(target, mutated(rng.choice(good), rng), folder)] += 1
    return counts


def guided(name: str, seconds: int) -> None:
    """Fuzz one target with atheris in this process, which it ends."""
    assert atheris is not None
    target, counts = TARGETS[name], Counter[str]()
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        (folder / "corpus").mkdir()
        for i, data in enumerate(seeds(target)):
            (folder / "corpus" / str(i)).write_bytes(data)

        end = time.monotonic() + seconds

        def test(data: bytes) -> None:
            counts[once(target, data, folder)] += 1
            if time.monotonic() > end:  # libFuzzer would end the process without a word
                report(name, counts)
                shutil.rmtree(folder)
                os._exit(0)

        Path("out").mkdir(exist_ok=True)  # for what failed or was slow
        options = [f"-max_len={DATA}", "-rss_limit_mb=4096", "-verbosity=0", "-artifact_prefix=out/"]
        atheris.Setup([sys.argv[0], *options, str(folder / "corpus")], test)
        atheris.Fuzz()


def report(name: str, counts: Counter[str]) -> None:
    print(
        f"{name}: {counts.total()} inputs, {counts['read']} read, {counts['refused']} refused, nothing else", flush=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="fuzz the readers of files")
    parser.add_argument("targets", nargs="*", help=f"of {', '.join(TARGETS)}; all if none is named")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--blind", action="store_true", help="mutations without coverage")
    args = parser.parse_args()
    for name in args.targets or TARGETS:
        if args.blind:
            with tempfile.TemporaryDirectory() as folder:
                counts = run(TARGETS[name], Path(folder), seconds=args.seconds)
            report(name, counts)
        else:  # in a process of its own, because libFuzzer ends it
            start = f"import atheris; from tests import fuzz; fuzz.guided({name!r}, {args.seconds})"
            subprocess.run([sys.executable, "-c", start], check=True)


if __name__ == "__main__":
    main()
