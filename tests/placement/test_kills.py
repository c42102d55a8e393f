"""kill -9 at random moments of streaming from disk and of saving: files intact, the next run identical."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from effusion.core.files import DAY
from effusion.weights.safetensors_file import SafetensorsFile

from . import tiny_pipelines as tiny
from . import victims

KILLS = 51
ROOT = Path(__file__).parents[2]


class Server:
    """The other end of :mod:`.victims`."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-m", "tests.placement.victims", str(folder)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        self.process = subprocess.Popen(command, cwd=ROOT, **pipes)  # type: ignore[call-overload]
        assert self.read() == "ready"

    def read(self) -> str:
        return str(self.process.stdout.readline()).strip()

    def begin(self, work: str) -> int:
        print(work, file=self.process.stdin, flush=True)
        said = [self.read(), self.read()]  # the process id, and what the child says first, in either order
        said.sort(key=str.isdecimal)
        assert said[0] == "begun", said
        return int(said[1])

    def kill(self, child: int) -> None:
        os.kill(child, signal.SIGKILL)
        assert self.read() == "gone", "the child had ended by itself"

    def paint(self) -> list[str]:
        print("paint", file=self.process.stdin, flush=True)
        said = []
        while not said or said[-1] != "gone":
            said.append(self.read())
        return [line for line in said if len(line) == 64]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    tiny.save("sd", tmp_path)
    found = Server(tmp_path)
    yield found
    assert found.process.stdin is not None
    found.process.stdin.close()
    found.process.wait(10)


def contents(folder: Path) -> dict[str, bytes]:
    files = (p for p in folder.rglob("*") if p.is_file() and not p.relative_to(folder).parts[0].startswith("."))
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def test_killed_at_random_moments(server: Server, tmp_path: Path) -> None:
    original = contents(tmp_path / "sd")
    versions = []
    for version in "ab":
        victims.loaded(tmp_path, version).save_pretrained(tmp_path / version)
        versions.append(contents(tmp_path / version))
    assert versions[0] != versions[1]
    wanted = server.paint()
    assert len(set(wanted)) == 2
    rng = random.Random(7)
    in_between = half_saved = 0
    for i in range(KILLS):
        child = server.begin(("stream", "offload", "save")[i % 3])
        time.sleep(rng.random() * 0.12)
        server.kill(child)
        assert contents(tmp_path / "sd") == original, f"kill {i}"
        in_between += any((tmp_path / "off").glob("*")) if (tmp_path / "off").exists() else 0
        half_saved += any((tmp_path / "saved").rglob(".saving-*"))
        saved = contents(tmp_path / "saved") if i > 3 else {}
        for name, data in saved.items():
            assert data in (versions[0].get(name), versions[1].get(name)), f"kill {i}: {name} is torn"
        if i % 5 == 0:
            assert server.paint() == wanted, f"kill {i}"
    assert in_between, "no kill came while offload files were there"
    assert half_saved, "no kill came in the middle of a save"
    assert server.paint() == wanted
    assert not list((tmp_path / "off").iterdir()), "files of killed processes are left"
    again = tmp_path / "saved"
    for file in again.rglob("*.safetensors"):
        SafetensorsFile(file)
    yesterday = time.time() - 2 * DAY
    for left in again.rglob(".saving-*"):
        os.utime(left, (yesterday, yesterday))
    victims.loaded(tmp_path, "a").save_pretrained(again)
    assert contents(again) == versions[0]
    assert not list(again.rglob(".saving-*")), "what a killed save left is swept up a day later"
