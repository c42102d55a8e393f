"""Rates are measured on the way that weights go, and a machine on which they can't be is no obstacle."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from effusion.placement import lane, rates
from effusion.placement.pipeline_choices import Choices

from .parts import part

KNOWN = rates.Rates("cuda:0", {"float32": 1e12}, 1e12, 2e10, 1e9, 3e10)


@pytest.mark.parametrize("error", [FileNotFoundError("no usable temporary directory"), OSError(28, "No space left")])
def test_no_folder_for_measuring_the_disk(error: OSError, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> Any:
        raise error

    monkeypatch.setattr(tempfile, "TemporaryFile", fails)
    assert rates._file_rates() == (rates.UNKNOWN_DISK, rates.UNKNOWN_MAPPING, rates.UNKNOWN_MAPPING)


def test_rates_that_can_not_be_read_are_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    measured: list[int] = []
    monkeypatch.setenv("EFFUSION_CACHE", str(tmp_path))
    monkeypatch.setattr(rates, "_measure", lambda device: measured.append(1) or KNOWN)
    assert rates.rates("cpu") == KNOWN == rates.rates("cpu") and len(measured) == 1
    (file,) = tmp_path.iterdir()
    file.unlink()
    file.mkdir()  # reading it is an OSError, whoever asks
    assert rates.rates("cpu") == KNOWN and len(measured) == 2
    (tmp_path / "no folder").touch()
    monkeypatch.setenv("EFFUSION_CACHE", str(tmp_path / "no folder"))
    assert rates.rates("cpu") == KNOWN


def test_nobody_needs_a_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_home(*_: Any) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setattr(Path, "expanduser", no_home)
    monkeypatch.setattr(rates, "_measure", lambda device: KNOWN)
    monkeypatch.setenv("EFFUSION_CACHE", str(tmp_path))
    assert rates.cache_folder() == tmp_path
    monkeypatch.delenv("EFFUSION_CACHE")
    assert rates.rates("cpu") == KNOWN


def test_weights_are_fetched_as_in_a_run_to_measure_it() -> None:
    before = lane.lane_to(torch.device("cpu")).transferred
    assert rates._host_rate(torch.device("cpu"), 1 << 20) > 0
    assert lane.lane_to(torch.device("cpu")).transferred == before, "it has a lane of its own"


@pytest.mark.parametrize(("ram", "stream"), [(100_000, 2e10), (7999, 1e9)])
def test_weights_that_rest_on_disk_come_no_faster_than_the_disk_reads(
    ram: int, stream: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("effusion.placement.pipeline_choices.rates_of", lambda device: KNOWN)
    pipe = type("Pipe", (), {})()
    choices = Choices(pipe, {}, {}, torch.device("cuda:0"))
    assert choices.speed([part()], 10**9, ram).stream == stream
