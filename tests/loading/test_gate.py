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
import transformers
from tests.bounds import bounded
from tests.hub_server import HubServer
from tests.pipelines import tiny

import effusion
from effusion.core import config as config_module
from effusion.core import remote
from effusion.core.errors import CheckpointError, UntrustedCode
from effusion.models import foreign
from effusion.pipelines import planning
from effusion.pipelines.planning import skeleton

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
    "a class of no library": {"vae": [None, "AutoencoderKL"]},
    "a library without a class": {"vae": ["diffusers", None]},
    "a pipeline in a pipeline": {"vae": ["diffusers", "DiffusionPipeline"]},
    "what finds out classes": {"vae": ["diffusers", "AutoModel"]},
    "a model that transformers would load its way": {"text_encoder": ["transformers", "AutoModel"]},
    "a base class": {"unet": ["diffusers", "ModelMixin"]},
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


def by_config(folder: Path) -> Any:
    return effusion.AutoModel.from_config(json.loads((folder / "text_encoder" / "config.json").read_text()))


# every way to a network of transformers
WAYS: dict[str, Callable[[Path], Any]] = {
    "a pipeline": effusion.DiffusionPipeline.from_pretrained,
    "a network": lambda folder: effusion.AutoModel.from_pretrained(folder / "text_encoder"),
    "a part": lambda folder: effusion.AutoModel.from_pretrained(folder, subfolder="text_encoder"),
    "quantised": lambda folder: effusion.AutoModel.from_pretrained(
        folder / "text_encoder", quantization_config=object()
    ),
    "spread": lambda folder: effusion.AutoModel.from_pretrained(folder / "text_encoder", device_map={"": "cpu"}),
    "a plan": skeleton,
    "a configuration": by_config,
}
FETCHED: tuple[dict[str, Any], ...] = (
    {"attn_implementation": "evil/kernel"}, {"_attn_implementation": "evil/kernel"},
    {"text_config": {"attn_implementation": "evil/kernel"}}, {"experts_implementation": {"": "evil/kernel"}},
    {"experts_implementation": {"": ["evil/kernel"]}}, {"vision_config": {"auto_map": {"AutoModel": "evil/r--evil.Evil"}}},
    {"parts": [[{"auto_map": AUTO}]]}, {"configuration_files": ["config.4.0.0.json"]},
    {"audio_tokenizer": {"audio_tokenizer_class": "DacModel", "audio_tokenizer_name_or_path": "evil/r"}},
    {"backbone": "evil/r", "use_timm_backbone": False},
)  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("entries", FETCHED, ids=str)
def test_code_from_elsewhere(way: str, entries: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EFFUSION_NATIVE_TEXT", "0")
    plain = json.loads((folder / "text_encoder" / "config.json").read_text())
    (folder / "text_encoder" / "config.4.0.0.json").write_text(json.dumps({**plain, "attn_implementation": "evil/k"}))
    change(folder / "text_encoder" / "config.json", **entries)
    with pytest.raises(UntrustedCode, match="code from elsewhere"):
        WAYS[way](folder)


@pytest.mark.parametrize("way", WAYS)
def test_what_is_checked_is_what_is_used(way: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A configuration that becomes another after it was read."""
    monkeypatch.setenv("EFFUSION_NATIVE_TEXT", "0")
    path, read = folder / "text_encoder" / "config.json", config_module.read_json

    def read_then_change(file: Path, *args: Any, **kwargs: Any) -> Any:
        found = read(file, *args, **kwargs)
        if file.parent.name == "text_encoder" and file.name == "config.json":
            path.write_text(json.dumps({**found, "attn_implementation": "evil/kernel", "num_hidden_layers": 1}))
        return found

    monkeypatch.setattr(foreign, "read_json", read_then_change)
    monkeypatch.setattr(planning, "read_json", read_then_change)
    if way == "quantised":
        monkeypatch.setitem(WAYS, way, lambda f: foreign.load_foreign(
            transformers.CLIPTextModel, f / "text_encoder", quantization_config=None, device_map={"": "cpu"}
        ))  # fmt: skip
    loaded = WAYS[way](folder)
    network = getattr(loaded, "text_encoder", loaded)
    assert network.config._attn_implementation != "evil/kernel"
    assert network.config.num_hidden_layers == 3


def test_an_auto_map_beside_an_installed_class_means_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EFFUSION_NATIVE_TEXT", "0")
    change(folder / "text_encoder" / "config.json", auto_map=AUTO)
    for way in ("a pipeline", "a network", "spread", "a plan", "a configuration"):
        loaded = WAYS[way](folder)
        assert type(getattr(loaded, "text_encoder", loaded)).__name__ == "CLIPTextModel"


@pytest.mark.parametrize("name", ["processor_config.json", "audio_tokenizer_config.json"])
def test_a_processor_fetches_nothing(name: str, folder: Path, hub: HubServer) -> None:
    """Its configuration may name the repository of another network, which transformers would load."""
    inside = folder / "processor"
    shutil.copytree(folder / "tokenizer", inside)
    named = {"audio_tokenizer_class": "AutoModel", "audio_tokenizer_name_or_path": "evil/r"}
    (inside / name).write_text(json.dumps({"audio_tokenizer": named} if name.startswith("p") else named))
    for loaded in (transformers.ClapProcessor, transformers.AutoProcessor, transformers.AutoTokenizer):
        with pytest.raises(UntrustedCode, match="audio_tokenizer"):
            foreign.small_component(loaded, inside)
        with pytest.raises(UntrustedCode, match="audio_tokenizer"):
            foreign.load_foreign(loaded, folder, subfolder="processor")
    hub.add("us/pipe", folder)
    with pytest.raises(UntrustedCode, match="audio_tokenizer"):
        foreign.load_foreign(transformers.ClapProcessor, "us/pipe", subfolder="processor")
    assert not [path for _, path, _ in hub.requests if "evil" in path]


def test_configurations_are_built_within_bounds(folder: Path) -> None:
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    for entries in ({"num_hidden_layers": 10**7}, {"hidden_size": "many"}):
        with pytest.raises(CheckpointError, match="the configuration"):
            bounded(lambda entries=entries: effusion.AutoModel.from_config({**config, **entries}))  # type: ignore[misc]
    with pytest.raises(CheckpointError, match="the configuration"):
        bounded(
            lambda: effusion.AutoModel.from_config({"_class_name": "PixArtTransformer2DModel", "num_layers": 10**7})
        )


@pytest.mark.parametrize(
    "name", ["AutoModel", "load", "ModelMixin", "DiffusionPipeline", "UNet2DConditionOutput", "by_name"]
)
def test_a_configuration_names_networks_only(name: str, folder: Path) -> None:
    change(folder / "unet" / "config.json", _class_name=name)
    for load in (effusion.AutoModel.from_pretrained, effusion.load):
        with pytest.raises(CheckpointError, match=name):
            load(folder / "unet")
    change(folder / "scheduler" / "scheduler_config.json", _class_name=name)
    with pytest.raises(CheckpointError, match=name):
        effusion.load(folder / "scheduler")
    change(folder / "model_index.json", scheduler=["diffusers", name])
    with pytest.raises(CheckpointError, match=name):
        effusion.DiffusionPipeline.from_pretrained(folder)


@pytest.mark.parametrize("entries", [
    {"_class_name": None}, {"_class_name": "load"}, {"_class_name": "UNet2DConditionModel"}, {"beta_start": "low"},
    {"num_train_timesteps": 2_000_000_000},
])  # fmt: skip
def test_a_scheduler_beside_a_single_file(entries: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    effusion.DiffusionPipeline.from_pretrained(folder).save_single_file(tmp_path / "all.safetensors")
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    config = {k: v for k, v in {**config, **entries}.items() if v is not None}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError):
        bounded(lambda: effusion.StableDiffusionPipeline.from_single_file(tmp_path / "all.safetensors", config=folder))


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
    "model: {params: {unet_config: {params: {num_head_channels: 8, model_channels: 32, channel_mult: [a]}}}}",
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
