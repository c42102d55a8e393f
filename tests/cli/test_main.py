"""The command line: exit statuses, one-line errors, an instant start."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import effusion
from effusion.cli import generate
from effusion.cli.main import main


def status_of(*arguments: str) -> int:
    """The exit status, whether `main` returns it or argparse exits."""
    try:
        return main(list(arguments))
    except SystemExit as error:
        return int(error.code or 0)


def test_help_and_version(capsys) -> None:
    assert status_of("--help") == 0
    text = capsys.readouterr().out
    assert all(verb in text for verb in ("generate", "inspect", "samplers", "env"))
    assert status_of("--version") == 0
    assert capsys.readouterr().out.split() == ["effusion", effusion.__version__]
    assert status_of("generate", "--help") == 0
    options = capsys.readouterr().out
    wanted = ("model", "seed", "steps", "guidance", "negative", "size", "num-images", "scheduler", "image", "mask")
    for option in (*wanted, "strength", "dtype", "device", "out"):
        assert f"--{option}" in options


def test_the_parser_starts_without_torch() -> None:
    code = "import sys; from effusion.cli.main import parser; parser(); print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "VERB"),
        (("paint",), "invalid choice"),
        (("generate",), "prompt"),
        (("generate", " "), "the prompt is empty"),
        (("generate", "x", "--steps", "0"), "at least 1"),
        (("generate", "x", "--steps", "many"), "not a whole number"),
        (("generate", "x", "--seed", "-1"), "at least 0"),
        (("generate", "x", "--guidance", "nan"), "out of range"),
        (("generate", "x", "--size", "big"), "no size"),
        (("generate", "x", "--size", "0x8"), "no size"),
        (("generate", "x", "--size", "1x2x3"), "no size"),
        (("generate", "x", "--dtype", "int8"), "invalid choice"),
        (("generate", "x", "--strength", "0.5"), "--image"),
        (("generate", "x", "--mask", "m.png"), "--image"),
        (("generate", "x", "--image", "i.png", "--strength", "1.5"), "at most 1"),
        (("generate", "x", "--out", "nowhere/x.png"), "no folder nowhere"),
        (("generate", "x", "--out", "x.jpg"), "name it x.png"),
        (("generate", "x", "--scheduler", "eulr"), "Euler"),
    ],
)
def test_wrong_arguments_are_status_2(arguments, said, capsys, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        generate, "_load", lambda *a: pytest.fail("a model was loaded before the arguments were checked")
    )
    assert status_of(*arguments) == 2
    errors = capsys.readouterr().err
    assert said in errors
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--model", "no/such/model/anywhere"), "no/such/model/anywhere"),
        (("--model", "{tmp}"), "model_index.json"),
        (("--image", "nothing.png"), "nothing.png"),
        (("--device", "warp"), "warp"),
    ],
)
def test_what_fails_is_status_1_and_one_line(arguments, said, capsys, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    assert status_of("generate", "x", *(a.format(tmp=tmp_path) for a in arguments)) == 1
    errors = capsys.readouterr().err
    assert said in errors
    assert re.fullmatch(r"effusion: [^\n]+\n", errors)
    assert list(tmp_path.iterdir()) == []


def test_env_says_what_is_here(capsys) -> None:
    assert status_of("env") == 0
    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert lines["effusion"].startswith(effusion.__version__)
    assert {"python", "torch", "cpu", "memory", "peft", "xformers"} <= set(lines)


def test_a_picture_is_replaced_in_one_step(tmp_path, monkeypatch) -> None:
    path = tmp_path / "x.png"
    generate.write_png(Image.new("RGB", (8, 8), "red"), path, {"prompt": "röd ✓"})
    before = path.read_bytes()
    assert Image.open(path).text == {"prompt": "röd ✓"}

    def broken(*args: object, **kwargs: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", broken)
    with pytest.raises(OSError, match="disk full"):
        generate.write_png(Image.new("RGB", (8, 8), "blue"), path, {})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x.png"]


FAST = ("--steps", "2", "--device", "cpu")
PROMPT = "a small red circle above a large blue square on a white background"


def paint(tmp_path, *arguments: str) -> Image.Image:
    out = tmp_path / "x.png"
    assert status_of("generate", PROMPT, *FAST, "--out", str(out), *arguments) == 0
    return Image.open(out)


def test_the_picture_says_how_it_was_made(tmp_path, capsys) -> None:
    picture = paint(tmp_path, "--seed", "7", "--negative", "a green star", "--scheduler", "ddim", "--guidance", "4")
    text = picture.text
    assert text["prompt"] == PROMPT
    assert (text["seed"], text["model"], text["scheduler"]) == ("7", "demo", "DDIMScheduler")
    assert (text["negative_prompt"], text["steps"], text["guidance"]) == ("a green star", "2", "4.0")
    assert text["Software"] == f"Effusion {effusion.__version__}"
    said = capsys.readouterr()
    assert str(tmp_path / "x.png") in said.out
    assert "2/2" in said.err, "the progress bar"


def test_the_same_seed_gives_the_same_picture(tmp_path) -> None:
    first, again, other = (np.asarray(paint(tmp_path, "--seed", seed)) for seed in ("7", "7", "8"))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_several_pictures_count_their_seeds(tmp_path) -> None:
    arguments = ("generate", PROMPT, "a red star", *FAST, "--seed", "7", "--num-images", "2")
    assert status_of(*arguments, "--out", str(tmp_path / "x.png")) == 0
    names = [f"x-{i}.png" for i in range(1, 5)]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    pictures = [Image.open(tmp_path / name) for name in names]
    assert [p.text["seed"] for p in pictures] == ["7", "8", "9", "10"]
    assert [p.text["prompt"] for p in pictures] == [PROMPT] * 2 + ["a red star"] * 2
    alone = np.asarray(paint(tmp_path, "--seed", "8")).astype(int)
    assert np.abs(alone - np.asarray(pictures[1])).max() <= 1, "seed 8 alone is the second picture of seed 7"


def test_from_a_picture_and_into_a_mask(tmp_path) -> None:
    source = Image.new("RGB", (70, 64), "green")
    source.save(tmp_path / "in.png")
    mask = Image.new("L", (70, 64))
    mask.paste(255, (0, 0, 35, 64))
    mask.save(tmp_path / "mask.png")
    image = ("--image", str(tmp_path / "in.png"), "--strength", "0.5", "--seed", "1")
    assert paint(tmp_path, *image).size == (64, 64)
    assert paint(tmp_path, *image, "--size", "48x64").size == (48, 64)
    kept = paint(tmp_path, *image, "--mask", str(tmp_path / "mask.png"))
    assert kept.size == (64, 64)
    assert "mask.png" in kept.text["mask"]


def test_a_size_that_the_model_can_not_make_is_one_line(tmp_path, capsys) -> None:
    assert status_of("generate", "x", "--size", "63", "--out", str(tmp_path / "x.png")) == 1
    assert "divisible" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_inspect_knows_the_demo_model(capsys) -> None:
    assert status_of("inspect", "demo", "--json") == 0
    parts = {c["name"]: c for c in json.loads(capsys.readouterr().out)}
    assert {"unet", "vae", "text_encoder"} <= set(parts)
    assert sum(c["nbytes"] for c in parts.values()) <= 20e6
