"""Loading and saving pipelines: both directions with the peer, what is fetched, and what is refused before work."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from tests.hub_server import HubServer
from tests.pipelines import tiny

import effusion
from effusion.core.errors import CheckpointError, MissingFile, UntrustedCode
from effusion.pipelines import planning

INDEX = "model_index.json"


def states(pipe: Any) -> dict[str, torch.Tensor]:
    networks = {n: c for n, c in pipe.components.items() if isinstance(c, torch.nn.Module)}
    return {f"{n}.{k}": v for n, c in networks.items() for k, v in c.state_dict().items()}


def assert_same(a: Any, b: Any) -> None:
    x, y = states(a), states(b)
    assert x.keys() == y.keys()
    for name in x:
        assert torch.equal(x[name], y[name]), name


def change(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def test_both_directions_with_the_peer(folder: Path, tmp_path: Path) -> None:
    theirs = diffusers.DiffusionPipeline.from_pretrained(folder, safety_checker=None)
    ours = effusion.DiffusionPipeline.from_pretrained(folder)
    assert type(ours) is effusion.StableDiffusionPipeline
    assert repr(ours.scheduler) == repr(theirs.scheduler)
    assert repr(ours) == repr(theirs)
    assert ours.safety_checker is None
    assert ours.config.requires_safety_checker is False
    assert_same(ours, theirs)
    assert type(ours.tokenizer) is type(theirs.tokenizer)
    ours.save_pretrained(tmp_path / "ours", max_shard_size="30KB")
    assert_same(diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "ours", safety_checker=None), theirs)
    a, b = (json.loads((tmp_path / n / INDEX).read_text()) for n in ("ours", "sd"))
    assert {k: v for k, v in a.items() if k != "_name_or_path"} == {k: v for k, v in b.items() if k != "_name_or_path"}


@pytest.mark.parametrize("xl", [False, True])
def test_resaving_is_stable(tmp_path: Path, folder: Path, xl: bool) -> None:
    if xl:
        components = tiny.stable_diffusion_xl(tmp_path / "t")
        diffusers.StableDiffusionXLPipeline(**components).save_pretrained(tmp_path / "xl")
        folder = tmp_path / "xl"
    first = effusion.DiffusionPipeline.from_pretrained(folder)
    first.save_pretrained(folder)  # over the files that it is mapped from
    assert_same(effusion.DiffusionPipeline.from_pretrained(folder), first)
    assert not [p for p in folder.rglob("*") if p.name.startswith(".")]


def test_dtype_for_each_component(folder: Path) -> None:
    wanted = {"vae": torch.float32, "unet": "bfloat16", "default": torch.float16}
    pipe = effusion.DiffusionPipeline.from_pretrained(folder, torch_dtype=wanted)
    assert pipe.vae.dtype == torch.float32
    assert pipe.unet.dtype == torch.bfloat16
    assert pipe.text_encoder.dtype == torch.float16
    assert effusion.DiffusionPipeline.from_pretrained(folder).unet.dtype == torch.float32
    with pytest.raises(ValueError, match="torch_dtype names \\['unte'\\]"):
        effusion.DiffusionPipeline.from_pretrained(folder, dtype={"unte": torch.float16})


def test_a_variant_where_there_is_one(folder: Path) -> None:
    (folder / "vae" / "diffusion_pytorch_model.fp16.safetensors").unlink()
    pipe = effusion.DiffusionPipeline.from_pretrained(folder, variant="fp16", torch_dtype="auto")
    assert pipe.unet.dtype == torch.float16
    assert pipe.text_encoder.dtype == torch.float16
    assert pipe.vae.dtype == torch.float32
    with pytest.raises(CheckpointError, match="no component has weights of the variant 'fp8'"):
        effusion.DiffusionPipeline.from_pretrained(folder, variant="fp8")


def test_saving_a_variant(folder: Path, tmp_path: Path) -> None:
    pipe = effusion.DiffusionPipeline.from_pretrained(folder)
    pipe.save_pretrained(tmp_path / "v", variant="ema")
    assert (tmp_path / "v" / "unet" / "diffusion_pytorch_model.ema.safetensors").is_file()
    assert_same(effusion.DiffusionPipeline.from_pretrained(tmp_path / "v", variant="ema"), pipe)


def test_passed_components_replace_those_of_the_folder(folder: Path) -> None:
    vae = effusion.AutoencoderKL.from_pretrained(folder, subfolder="vae")
    shutil.rmtree(folder / "vae")
    shutil.rmtree(folder / "text_encoder")
    pipe = effusion.StableDiffusionPipeline.from_pretrained(folder, vae=vae, text_encoder=None)
    assert pipe.vae is vae
    assert pipe.text_encoder is None


def test_legacy_library_names_and_classes(folder: Path, tmp_path: Path) -> None:
    parts = tiny.safety(tmp_path)
    parts["safety_checker"].save_pretrained(folder / "safety_checker")
    parts["feature_extractor"].save_pretrained(folder / "feature_extractor")
    change(
        folder / INDEX,
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPFeatureExtractor"],
    )
    pipe = effusion.DiffusionPipeline.from_pretrained(folder)
    assert type(pipe.safety_checker).__name__ == "StableDiffusionSafetyChecker"
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    assert type(pipe.feature_extractor) is type(theirs.feature_extractor)
    assert_same(pipe, theirs)
    pipe.save_pretrained(tmp_path / "again")
    entry = json.loads((tmp_path / "again" / INDEX).read_text())["safety_checker"]
    assert entry == ["stable_diffusion", "StableDiffusionSafetyChecker"]


# -- refused before work -------------------------------------------------------------------------


@pytest.fixture
def no_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test if any network is given its weights."""

    def build(self: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("effusion.weights.prepare.Prepared.build", build)
    monkeypatch.setattr("effusion.models.foreign.ForeignPrepared.build", build)
    monkeypatch.setattr("effusion.models.foreign.Fallback.build", build)


def truncate(folder: Path) -> None:
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def misshape(folder: Path) -> None:
    change(folder / "vae" / "config.json", latent_channels=5)


def drop_config(folder: Path) -> None:
    (folder / "text_encoder" / "config.json").unlink()


def drop_component(folder: Path) -> None:
    shutil.rmtree(folder / "unet")


def link_component(folder: Path) -> None:
    os.rename(folder / "unet", folder.parent / "elsewhere")
    (folder / "unet").symlink_to(folder.parent / "elsewhere")


def index(**entries: Any) -> Any:
    return lambda folder: change(folder / INDEX, **entries)


REFUSED: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "no index": (lambda f: (f / INDEX).unlink(), {}, MissingFile, "has no model_index.json"),
    "broken index": (lambda f: (f / INDEX).write_text("{"), {}, CheckpointError, "not valid JSON"),
    "index is a list": (lambda f: (f / INDEX).write_text("[]"), {}, CheckpointError, "JSON object"),
    "truncated": (truncate, {}, CheckpointError, "unet/diffusion_pytorch_model.safetensors.*truncated"),
    "misshaped": (misshape, {}, CheckpointError, "(?s)vae.*of another shape"),
    "no config": (drop_config, {}, CheckpointError, "text_encoder has no file config.json"),
    "no component": (drop_component, {}, MissingFile, "component 'unet'"),
    "linked component": (link_component, {}, CheckpointError, "is a link"),
    "unknown pipeline": (index(_class_name="NoPipeline"), {}, CheckpointError, "NoPipeline"),
    "no pipeline": (index(_class_name="AutoencoderKL"), {}, CheckpointError, "no pipeline class"),
    "nameless": (index(_class_name=None), {}, CheckpointError, "names no `_class_name`"),
    "own code": (index(_class_name=["my_pipeline", "Mine"]), {}, UntrustedCode, "trust_remote_code"),
    "unknown scheduler": (index(scheduler=["diffusers", "NoScheduler"]), {}, CheckpointError, "'scheduler'.*NoSched"),
    "unknown library": (index(unet=["os", "system"]), {}, CheckpointError, "'unet'.*os.system"),
    "private class": (index(unet=["transformers", "_x"]), {}, CheckpointError, "'unet'"),
    "function of transformers": (index(unet=["transformers", "pipeline"]), {}, CheckpointError, "'unet'"),
    "entry of numbers": (index(unet=[1, 2]), {}, CheckpointError, "'unet' must be"),
    "name that leaves": (index(**{"../x": ["diffusers", "UNet2DConditionModel"]}), {}, CheckpointError, r"\.\./x"),
    "unknown argument": (lambda f: None, {"scheduller": 3}, ValueError, r"no \['scheduller'\]; its components are"),
    "custom pipeline": (lambda f: None, {"custom_pipeline": "x/y"}, UntrustedCode, "trust_remote_code"),
    "odd dtype": (lambda f: None, {"torch_dtype": torch.int8}, ValueError, "floating-point"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.usefixtures("no_reading")
def test_refused_before_any_weights_are_read(folder: Path, case: str) -> None:
    spoil, options, error, says = REFUSED[case]
    spoil(folder)
    with pytest.raises(error, match=says):
        effusion.DiffusionPipeline.from_pretrained(folder, **options)


@pytest.mark.usefixtures("no_reading")
def test_a_class_that_needs_more_than_there_is(folder: Path) -> None:
    entries = json.loads((folder / INDEX).read_text())
    entries.pop("vae")
    (folder / INDEX).write_text(json.dumps(entries))
    with pytest.raises(ValueError, match=r"has no \['vae'\]: pass them"):
        effusion.StableDiffusionPipeline.from_pretrained(folder)


def test_harmless_arguments_are_ignored_with_a_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    effusion.StableDiffusionPipeline.from_pretrained(folder, add_watermarker=False, low_cpu_mem_usage=True)
    assert "add_watermarker" in caplog.text


def test_an_interrupted_save_leaves_the_old_pipeline(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = effusion.DiffusionPipeline.from_pretrained(folder)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    torch.nn.init.zeros_(pipe.unet.conv_in.weight)
    monkeypatch.setattr(type(pipe.scheduler), "save_pretrained", lambda *a, **k: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        pipe.save_pretrained(folder)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


# -- from the hub --------------------------------------------------------------------------------


def test_only_what_is_needed_is_fetched(hub: HubServer, folder: Path) -> None:
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"x" * 5000)
    (folder / "unet" / "diffusion_pytorch_model.onnx").write_bytes(b"x" * 5000)
    (folder / "unet" / "evil.py").write_text("raise SystemExit")
    (folder / "v1-5-pruned.ckpt").write_bytes(b"x" * 5000)
    (folder / "README.md").write_text("read me")
    hub.add("us/sd", folder)
    pipe = effusion.DiffusionPipeline.from_pretrained("us/sd", variant="fp16", text_encoder=None, torch_dtype="auto")
    assert pipe.unet.dtype == torch.float16
    fetched = set(hub.fetched())
    assert {f for f in fetched if f.endswith("safetensors")} == {
        f"{n}/diffusion_pytorch_model.fp16.safetensors" for n in ("unet", "vae")
    }
    assert not [f for f in fetched if f.endswith((".py", ".bin", ".onnx", ".ckpt", ".md")) or "text_encoder" in f]
    hub.requests.clear()
    again = effusion.DiffusionPipeline.from_pretrained(
        "us/sd", variant="fp16", text_encoder=None, local_files_only=True
    )
    assert not hub.requests
    assert again.unet.config.sample_size == pipe.unet.config.sample_size


def test_download_gives_a_folder(hub: HubServer, folder: Path) -> None:
    hub.add("us/sd", folder)
    where = Path(effusion.DiffusionPipeline.download("us/sd"))
    assert_same(effusion.DiffusionPipeline.from_pretrained(where), effusion.DiffusionPipeline.from_pretrained(folder))
    hub.add("us/empty", {"README.md": b""})
    with pytest.raises(MissingFile, match=r"us/empty has no file model_index\.json"):
        effusion.DiffusionPipeline.from_pretrained("us/empty")
    with pytest.raises(CheckpointError, match="neither a folder"):
        effusion.DiffusionPipeline.from_pretrained("no/such/folder")


@pytest.mark.parametrize("how", ["told", "stopped", "slow"])
def test_offline_the_cache_is_enough(hub: HubServer, folder: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("us/sd", folder)
    online = effusion.DiffusionPipeline.from_pretrained("us/sd")
    if how == "told":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    elif how == "stopped":
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
        template = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    else:
        monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *a, **k: (_ for _ in ()).throw(TimeoutError()))
    hub.requests.clear()
    assert_same(effusion.DiffusionPipeline.from_pretrained("us/sd"), online)
    assert_same(effusion.load("us/sd"), online)
    assert type(planning.skeleton("us/sd")) is type(online)
    assert how == "slow" or not hub.requests
    with pytest.raises(CheckpointError if how == "slow" else MissingFile, match="us/other"):
        effusion.DiffusionPipeline.from_pretrained("us/other")


def test_code_in_a_repository_is_not_fetched(hub: HubServer, folder: Path) -> None:
    change(folder / INDEX, _class_name=["pipeline", "Mine"])
    (folder / "pipeline.py").write_text("raise SystemExit")
    hub.add("us/sd", folder)
    with pytest.raises(UntrustedCode):
        effusion.DiffusionPipeline.from_pretrained("us/sd")
    assert hub.fetched() == [INDEX]
