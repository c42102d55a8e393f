"""The gate for foreign code: closed to everything but the caller's word, and then exactly the bytes that were read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
from tests.hub_server import HubServer
from tests.pipelines import tiny

import effusion
from effusion.core import remote
from effusion.core.errors import CheckpointError, MissingFile, UntrustedCode

CODE = """
from pathlib import Path
from diffusers import StableDiffusionPipeline
from .helper import SIGN
Path({canary!r}).write_text("ran")

class Mine(StableDiffusionPipeline):
    sign = SIGN
"""
NET = """
from pathlib import Path
import diffusers
from diffusers.models.modeling_utils import ModelMixin
from diffusers.configuration_utils import register_to_config
Path({canary!r}).write_text("ran")

class Net(diffusers.AutoencoderKL):
    pass
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("remote")
    pipe = diffusers.StableDiffusionPipeline(**tiny.stable_diffusion(folder / "t"), requires_safety_checker=False)
    pipe.save_pretrained(folder / "sd")
    return folder / "sd"


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "sd"))


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


def change(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def add_pipeline(folder: Path, canary: Path, name: str = "pipeline") -> None:
    (folder / f"{name}.py").write_text(CODE.format(canary=str(canary)))
    (folder / "helper.py").write_text("SIGN = 'first'\n")


def own_class(folder: Path, canary: Path) -> dict[str, Any]:
    add_pipeline(folder, canary, "mine")
    change(folder / "model_index.json", _class_name=["mine", "Mine"])
    return {}


def own_component(folder: Path, canary: Path) -> dict[str, Any]:
    (folder / "vae" / "net.py").write_text(NET.format(canary=str(canary)))
    change(folder / "model_index.json", vae=["net", "Net"])
    return {}


def custom(folder: Path, canary: Path) -> dict[str, Any]:
    add_pipeline(folder.parent, canary)
    return {"custom_pipeline": str(folder.parent)}


def custom_file(folder: Path, canary: Path) -> dict[str, Any]:
    add_pipeline(folder.parent, canary, "some_name")
    return {"custom_pipeline": str(folder.parent / "some_name.py")}


WAYS = {"own class": own_class, "own component": own_component, "folder": custom, "file": custom_file}


@pytest.mark.parametrize("way", WAYS)
def test_closed_without_consent_and_open_with_it(folder: Path, canary: Path, way: str) -> None:
    options = WAYS[way](folder, canary)
    for wish in ({}, {"trust_remote_code": False}, {"trust_remote_code": None}):
        with pytest.raises(UntrustedCode, match="trust_remote_code=True"):
            effusion.DiffusionPipeline.from_pretrained(folder, **options, **wish)
    assert not canary.exists()
    pipe = effusion.DiffusionPipeline.from_pretrained(folder, **options, trust_remote_code=True)
    assert canary.read_text() == "ran"
    assert isinstance(pipe, effusion.StableDiffusionPipeline)
    assert getattr(pipe, "sign", "first") == "first"
    assert isinstance(pipe.vae, effusion.AutoencoderKL)


@pytest.mark.parametrize("place", ["model_index.json", "vae/config.json", "scheduler/scheduler_config.json"])
def test_no_configuration_opens_the_gate(folder: Path, canary: Path, place: str) -> None:
    own_class(folder, canary)
    own_component(folder, canary)
    change(folder / place, trust_remote_code=True, auto_map={"AutoModel": "net.Net"}, custom_pipeline="mine")
    with pytest.raises(UntrustedCode):
        effusion.DiffusionPipeline.from_pretrained(folder)
    change(folder / "vae" / "config.json", _class_name=None, auto_map={"AutoModel": "net.Net"})
    with pytest.raises(UntrustedCode):
        effusion.AutoModel.from_pretrained(folder / "vae")
    assert not canary.exists()
    assert type(effusion.AutoModel.from_pretrained(folder / "vae", trust_remote_code=True)).__name__ == "Net"


def test_from_the_hub_pinned_to_one_commit(hub: HubServer, folder: Path, canary: Path) -> None:
    own_class(folder, canary)
    hub.add("us/mine", folder)
    commit = hub.repos["us/mine"].refs["main"]
    (folder / "helper.py").write_text("SIGN = 'second'\n")
    hub.add("us/mine", folder)
    with pytest.raises(UntrustedCode):
        effusion.DiffusionPipeline.from_pretrained("us/mine")
    assert not [f for f in hub.fetched() if f.endswith(".py")]
    new = effusion.DiffusionPipeline.from_pretrained("us/mine", trust_remote_code=True)
    old = effusion.DiffusionPipeline.from_pretrained("us/mine", trust_remote_code=True, revision=commit)
    assert (new.sign, old.sign) == ("second", "first")
    hub.add("us/code", {"pipeline.py": (folder / "mine.py").read_bytes(), "helper.py": b"SIGN = 'third'"})
    change(folder / "model_index.json", _class_name="StableDiffusionPipeline")
    third = effusion.DiffusionPipeline.from_pretrained(folder, custom_pipeline="us/code", trust_remote_code=True)
    assert third.sign == "third"


def test_sharing_with_a_custom_pipeline(folder: Path, canary: Path) -> None:
    add_pipeline(folder.parent, canary)
    pipe = effusion.StableDiffusionPipeline.from_pretrained(folder)
    place = str(folder.parent)
    for wish in ({}, {"trust_remote_code": False}, {"trust_remote_code": "yes"}):
        with pytest.raises(UntrustedCode, match="trust_remote_code=True"):
            effusion.DiffusionPipeline.from_pipe(pipe, custom_pipeline=place, **wish)
    assert not canary.exists()
    shared = effusion.DiffusionPipeline.from_pipe(
        pipe, custom_pipeline=place, trust_remote_code=True, requires_safety_checker=True
    )
    assert shared.sign == "first"
    assert shared.unet is pipe.unet
    assert shared.config.requires_safety_checker is True
    assert shared.config["_name_or_path"] == str(folder)
    other = effusion.StableDiffusionImg2ImgPipeline.from_pipe(pipe, trust_remote_code=True)
    assert type(other) is effusion.StableDiffusionImg2ImgPipeline


def test_what_is_run_is_what_was_read(folder: Path, canary: Path) -> None:
    add_pipeline(folder, canary)
    code = remote.read_folder(folder)
    (folder / "pipeline.py").write_text("raise SystemExit")
    (folder / "helper.py").write_text("raise SystemExit")
    assert remote.load_class(code, "pipeline", None, True).sign == "first"


def test_bad_code_and_bad_names(folder: Path, tmp_path: Path, canary: Path) -> None:
    load = effusion.DiffusionPipeline.from_pretrained
    for name in (["../mine", "Mine"], ["os", "system"], ["mine", "__import__"]):
        change(folder / "model_index.json", _class_name=name)
        (folder / "mine.py").write_text("")
        with pytest.raises(CheckpointError):
            load(folder, trust_remote_code=True)
    for name in (["mine"], [1, 2], ["mine", "Mine", "x"], {}):
        change(folder / "model_index.json", _class_name=name)
        with pytest.raises(CheckpointError):
            load(folder, trust_remote_code=True)
    (tmp_path / "outside.py").write_text(f"open({str(canary)!r}, 'w')")
    (folder / "mine.py").unlink()
    (folder / "mine.py").symlink_to(tmp_path / "outside.py")
    change(folder / "model_index.json", _class_name=["mine", "Mine"])
    with pytest.raises(CheckpointError, match="is a link"):
        load(folder, trust_remote_code=True)
    with pytest.raises(MissingFile, match=r"has no pipeline\.py"):
        load(folder, custom_pipeline=str(tmp_path / "sd" / "vae"), trust_remote_code=True)
    with pytest.raises(MissingFile, match="give a file"):
        load(folder, custom_pipeline="lpw_stable_diffusion.py", trust_remote_code=True)
    assert not canary.exists()


def test_a_pipeline_of_the_communitys_collection(hub: HubServer, folder: Path, canary: Path) -> None:
    collection = f"datasets/{remote.COMMUNITY}"
    code = CODE.format(canary=str(canary)).replace("from .helper import SIGN", "SIGN = {!r}")
    files = {f"{v}/lpw.py": code.format(v).encode() for v in ("main", "v0.42.1")}
    hub.add(collection, files)
    load = effusion.DiffusionPipeline.from_pretrained
    with pytest.raises(UntrustedCode, match="the custom pipeline 'lpw' is code of its own"):
        load(folder, custom_pipeline="lpw")
    assert not hub.requests
    assert not canary.exists()
    assert load(folder, custom_pipeline="lpw", trust_remote_code=True).sign == "v0.42.1"
    assert canary.exists()
    assert load(folder, custom_pipeline="lpw", custom_revision="main", trust_remote_code=True).sign == "main"
    with pytest.raises(MissingFile, match=r"has no file v0\.42\.1/lpv\.py"):
        load(folder, custom_pipeline="lpv", trust_remote_code=True)
    for place in ("a/b/c", "lpw.py"):
        with pytest.raises(MissingFile, match="give a file, a folder"):
            load(folder, custom_pipeline=place, trust_remote_code=True)
