"""Attempts to get through the gate by what a folder says: none may run anything, or read outside of the folder."""

from __future__ import annotations

import builtins
import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import safetensors.torch
import torch
from tests.pipelines import tiny

import effusion
from effusion.core import remote
from effusion.core.errors import CheckpointError, UntrustedCode

CODE = "from pathlib import Path\nPath({canary!r}).write_text('ran')\n\nclass Evil:\n    pass\n"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gate")
    pipe = diffusers.StableDiffusionPipeline(**tiny.stable_diffusion(folder / "t"), requires_safety_checker=False)
    pipe.save_pretrained(folder / "sd")
    return folder / "sd"


@pytest.fixture
def folder(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A pipeline's folder full of code that nobody asked for; whoever asks at the terminal gets a yes."""
    root = Path(shutil.copytree(source, tmp_path / "sd"))
    canary = tmp_path / "canary"
    for place in (root, *(p for p in root.iterdir() if p.is_dir())):
        for name in ("evil", "os", "modeling_evil", "tokenization_evil", "pipeline", "torch"):
            (place / f"{name}.py").write_text(CODE.format(canary=str(canary)))
    monkeypatch.setattr(builtins, "input", lambda *a: "y")
    monkeypatch.chdir(root)
    yield root
    assert not canary.exists(), "code ran"


def change(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


_AUTO = ("AutoModel", "AutoConfig", "AutoProcessor", "AutoImageProcessor")
AUTO: dict[str, Any] = {**dict.fromkeys(_AUTO, "evil.Evil"), "AutoTokenizer": ["evil.Evil", "evil.Evil"]}
INDEX: dict[str, dict[str, Any]] = {
    "a class by a dotted path": {"_class_name": "os.system"},
    "a class of builtins": {"_class_name": "__import__"},
    "a class by file": {"_class_name": ["evil", "Evil"]},
    "a class by a path that leaves": {"_class_name": ["../evil", "Evil"]},
    "a module of python": {"vae": ["os", "system"]},
    "a module of python by a path": {"vae": ["os.path", "join"]},
    "a package by name": {"vae": ["subprocess", "Popen"]},
    "a file in the folder": {"vae": ["evil", "Evil"]},
    "a function of ours": {"vae": ["diffusers", "load"]},
    "a private name of transformers": {"tokenizer": ["transformers", "__builtins__"]},
    "a function of transformers": {"tokenizer": ["transformers", "pipeline"]},
    "a class of transformers that is no component": {"tokenizer": ["transformers", "Trainer"]},
    "a dotted name in transformers": {"tokenizer": ["transformers", "utils.os.system"]},
    "a module in transformers": {"tokenizer": ["transformers.utils", "import_utils"]},
    "a name of a component that leaves": {"../vae": ["diffusers", "AutoencoderKL"]},
}


@pytest.mark.parametrize("case", INDEX)
def test_an_index_opens_nothing(case: str, folder: Path) -> None:
    change(folder / "model_index.json", **INDEX[case])
    for options in ({}, {"trust_remote_code": False}, {"trust_remote_code": "false"}, {"trust_remote_code": 0}):
        with pytest.raises((CheckpointError, UntrustedCode)):
            effusion.DiffusionPipeline.from_pretrained(folder, **options)


CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "auto_map of a tokenizer": ("tokenizer/tokenizer_config.json", {"auto_map": AUTO, "trust_remote_code": True}),
    "the class of a tokenizer": ("tokenizer/tokenizer_config.json", {"tokenizer_class": "evil.Evil", "auto_map": AUTO}),
    "auto_map of an encoder": ("text_encoder/config.json", {"auto_map": AUTO, "trust_remote_code": True}),
    "auto_map of a network": ("unet/config.json", {"auto_map": AUTO, "trust_remote_code": True}),
    "auto_map of a scheduler": ("scheduler/scheduler_config.json", {"auto_map": AUTO, "custom_pipeline": "evil"}),
    "everything in the index": (
        "model_index.json",
        {"trust_remote_code": True, "custom_pipeline": "pipeline", "auto_map": AUTO, "_module": "evil"},
    ),
}


@pytest.mark.parametrize("native", ["1", "0"])
@pytest.mark.parametrize("case", CONFIGS)
def test_a_configuration_opens_nothing(case: str, native: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EFFUSION_NATIVE_TEXT", native)
    place, entries = CONFIGS[case]
    change(folder / place, **entries)
    with contextlib.suppress(CheckpointError, UntrustedCode):  # it may be ignored, or refused; it may not run
        effusion.DiffusionPipeline.from_pretrained(folder)


def test_auto_classes_of_transformers_are_told_no(folder: Path) -> None:
    change(folder / "model_index.json", tokenizer=["transformers", "AutoTokenizer"])
    change(folder / "tokenizer" / "tokenizer_config.json", auto_map=AUTO, tokenizer_class="Evil")
    with pytest.raises(CheckpointError, match="tokenizer"):
        effusion.DiffusionPipeline.from_pretrained(folder)


@pytest.mark.parametrize("entries", [
    {"attn_implementation": "evil/kernel"}, {"_attn_implementation": "evil/kernel"},
    {"text_config": {"attn_implementation": "evil/kernel"}}, {"experts_implementation": {"": "evil/kernel"}},
])  # fmt: skip
def test_kernels_from_elsewhere(entries: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EFFUSION_NATIVE_TEXT", "0")
    change(folder / "text_encoder" / "config.json", **entries)
    with pytest.raises(UntrustedCode, match="code from elsewhere"):
        effusion.DiffusionPipeline.from_pretrained(folder)


def test_auto_model_and_load_stay_closed(folder: Path) -> None:
    change(
        folder / "unet" / "config.json", _class_name=None, auto_map={"AutoModel": "evil.Evil"}, trust_remote_code=True
    )
    loads: tuple[Callable[..., Any], ...] = (effusion.AutoModel.from_pretrained, effusion.load)
    for load in loads:
        with pytest.raises(UntrustedCode):
            load(folder / "unet")
    for name in ("os.system", "../evil.Evil", "evil", "evil.Evil.x", ".evil", 7, None):
        change(folder / "unet" / "config.json", auto_map={"AutoModel": name})
        with pytest.raises((CheckpointError, UntrustedCode)):
            effusion.load(folder / "unet")


def test_only_true_is_consent() -> None:
    for word in (None, False, 0, 1, "true", "True", "yes", [True], object()):
        with pytest.raises(UntrustedCode):
            remote.consent("this", word)  # type: ignore[arg-type]
    remote.consent("this", True)


def test_links_inside_of_a_pipeline(folder: Path, tmp_path: Path) -> None:
    shutil.move(folder / "vae", tmp_path / "elsewhere")
    (folder / "vae").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="is a link to"):
        effusion.DiffusionPipeline.from_pretrained(folder)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer_config.json"])
def test_links_of_small_files(name: str, folder: Path, tmp_path: Path) -> None:
    found = folder / "tokenizer" / name
    if not found.exists():
        found = folder / "tokenizer" / "tokenizer.json"
    shutil.move(found, tmp_path / "elsewhere")
    found.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="is a link to"):
        effusion.DiffusionPipeline.from_pretrained(folder)


@pytest.mark.parametrize("text", [
    "!!python/object/apply:os.system ['touch canary']", "model: !!python/name:os.system ''", "a: &a [*a]", "{" * 5000,
    "- 1", "model: 3", "model: {params: {parameterization: [v]}}",
])  # fmt: skip
def test_an_original_configuration_runs_nothing(text: str, folder: Path, tmp_path: Path) -> None:
    pipe = effusion.DiffusionPipeline.from_pretrained(folder)
    pipe.save_single_file(tmp_path / "all.safetensors")
    (tmp_path / "original.yaml").write_text(text)
    load = effusion.StableDiffusionPipeline.from_single_file
    with contextlib.suppress(CheckpointError):
        load(tmp_path / "all.safetensors", config=folder, original_config=str(tmp_path / "original.yaml"))
    assert not (folder / "canary").exists()


def test_weights_that_are_a_pickle_beside_a_foreign_network(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where transformers has to load by itself it gets tensors, and never opens the pickle."""
    monkeypatch.setenv("EFFUSION_NATIVE_TEXT", "0")
    weights = folder / "text_encoder" / "model.safetensors"
    state = {
        f"odd.{n}" if n.endswith("final_layer_norm.bias") else n: t
        for n, t in safetensors.torch.load_file(weights).items()
    }
    weights.unlink()
    torch.save(state, folder / "text_encoder" / "pytorch_model.bin")

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a pickle was opened in this process")

    monkeypatch.setattr(torch, "load", refuse)
    with pytest.raises(CheckpointError, match="final_layer_norm"):
        effusion.DiffusionPipeline.from_pretrained(folder)
