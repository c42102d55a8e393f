"""`effusion plan` answers from headers and configurations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.hub_server import HubServer
from tests.placement import tiny_pipelines as tiny

from effusion.cli.main import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("sd", tmp_path_factory.mktemp("plan"))


def test_the_plan_is_printed_and_no_weights_are_read(folder: Path, capsys: Any, monkeypatch: Any) -> None:
    from effusion.weights import assign

    monkeypatch.setattr(assign, "assign", lambda *a, **k: pytest.fail("weights were read"))
    assert main(["plan", str(folder), "--memory", "1GB", "--size", "32"]) == 0
    out = capsys.readouterr().out
    assert "unet" in out and "exact" in out


def test_json_is_the_plan(folder: Path, capsys: Any) -> None:
    assert main(["plan", str(folder), "--memory", "1GB", "--size", "48x32", "--num-images", "2", "--json"]) == 0
    body = json.loads(capsys.readouterr().out)
    assert body["budget"] == 10**9
    assert (body["call"]["width"], body["call"]["height"], body["call"]["batch_size"]) == (48, 32, 2)


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--memory", "1KB"], 1, "The least for this call is"),
        (["--memory", "six"], 1, "is no size"),
        (["--size", "33"], 1, "33"),
    ],
)
def test_what_cant_be_is_one_line(folder: Path, capsys: Any, arguments: list[str], status: int, said: str) -> None:
    assert main(["plan", str(folder), *arguments]) == status
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


def test_a_repository_is_planned_from_headers_and_configurations(
    folder: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    server = HubServer()
    try:
        server.add("someone/tiny", folder)
        with server.in_process(tmp_path / "cache"):
            assert main(["plan", "someone/tiny", "--memory", "1GB", "--size", "32"]) == 0
        assert "unet" in capsys.readouterr().out
        whole = [
            path for method, path, part in server.requests if method == "GET" and "safetensors" in path and not part
        ]
        assert not [path for path in whole if "/resolve/" in path], "weights were fetched"
    finally:
        server.close()


def test_generate_keeps_a_budget(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "a.png"
    arguments = ["generate", "a small red circle", "--steps", "2", "--seed", "1", "--out"]
    assert main([*arguments, str(out), "--memory", "2GB"]) == 0
    assert "peak" in capsys.readouterr().err
    assert main([*arguments, str(tmp_path / "b.png")]) == 0
    from PIL import Image, ImageChops

    with Image.open(out) as a, Image.open(tmp_path / "b.png") as b:
        assert ImageChops.difference(a, b).getbbox() is None


def test_rates_are_shown(capsys: Any, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setenv("EFFUSION_CACHE", str(tmp_path))
    assert main(["env", "--rates"]) == 0
    out = capsys.readouterr().out
    assert "cpu computes" in out and "GB/s" in out and "disk" in out
