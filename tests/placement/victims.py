"""A process that imports once and forks children, which stream from disk or save until they are killed.

``python -m tests.placement.victims FOLDER`` reads what the next child shall do from its input and writes the child's
process id, then whatever the child says, then ``gone``.
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path
from typing import Any

import torch

from . import tiny_pipelines as tiny


def say(text: object) -> None:
    os.write(1, f"{text}\n".encode())


def loaded(folder: Path, version: str) -> Any:
    """The saved pipeline; version ``b`` has other weights in its largest network and its autoencoder."""
    pipe = tiny.load("sd", folder)
    if version == "b":
        with torch.no_grad():
            pipe.unet.conv_out.bias.fill_(0.25)
            pipe.vae.decoder.conv_out.bias.fill_(0.5)
    return pipe


def digest(pipe: Any) -> str:
    picture = tiny.run("sd", pipe, num_inference_steps=1, height=8, width=24)
    return hashlib.sha256(picture.numpy().tobytes()).hexdigest()


def stream(folder: Path) -> None:
    """Weights are read from the files that were loaded."""
    pipe = loaded(folder, "a")
    pipe.enable_group_offload("cpu", offload_type="leaf_level", use_stream=True, offload_to_disk_path=folder / "off")
    say("begun")
    while True:
        digest(pipe)


def offload(folder: Path) -> None:
    """Weights of no file are written to the offload folder, read from there, and removed, over and over."""
    pipe = loaded(folder, "a")
    pipe.enable_layerwise_casting(torch.float8_e4m3fn)
    say("begun")
    while True:
        pipe.enable_group_offload("cpu", use_stream=True, offload_to_disk_path=folder / "off")
        digest(pipe)
        pipe.remove_all_hooks()


def save(folder: Path) -> None:
    """Two versions of a pipeline are saved to one place in turn, one of them while it streams from disk."""
    pipes = [loaded(folder, version) for version in "ab"]
    pipes[0].enable_group_offload("cpu", offload_to_disk_path=folder / "off")
    say("begun")
    while True:
        for pipe in pipes:
            pipe.save_pretrained(folder / "saved")


def paint(folder: Path) -> None:
    """One ordinary run from disk, as stored and cast."""
    for cast in (False, True):
        pipe = loaded(folder, "a")
        if cast:
            pipe.enable_layerwise_casting(torch.float8_e4m3fn)
        pipe.enable_group_offload("cpu", use_stream=True, offload_to_disk_path=folder / "off")
        say(digest(pipe))
        pipe.remove_all_hooks()


WORK = {work.__name__: work for work in (stream, offload, save, paint)}


def serve(folder: Path) -> None:
    torch.set_num_threads(1)
    tiny.load("sd", folder)  # imports what children need; no thread is started here
    say("ready")
    for line in sys.stdin:
        child = os.fork()
        if not child:
            WORK[line.strip()](folder)
            os._exit(0)
        say(child)
        os.waitpid(child, 0)
        say("gone")


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
