"""Loading from the hub, against a hub on the loopback that can also misbehave."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.hub_server import HubServer

import effusion
from effusion.core import hub as hub_module
from effusion.core.errors import CheckpointError, MissingFile

CONFIG = {"block_out_channels": (8,), "norm_num_groups": 4, "latent_channels": 2, "layers_per_block": 1}
NAME = "diffusion_pytorch_model"


def publish(hub: HubServer, folder: Path, seed: int = 0, subfolder: str = "", **save: object) -> effusion.AutoencoderKL:
    torch.manual_seed(seed)
    model = effusion.AutoencoderKL(**CONFIG)
    model.save_pretrained(folder / subfolder, **save)
    hub.add("us/vae", folder)
    return model


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("save", [{}, {"max_shard_size": "10KB"}, {"variant": "fp16"}, {"safe_serialization": False}])
def test_every_form_is_fetched_once(hub: HubServer, tmp_path: Path, save: dict[str, object]) -> None:
    model = publish(hub, tmp_path / "m", subfolder="sub", **save)
    where = {"subfolder": "sub", "variant": save.get("variant")}
    assert same(effusion.AutoencoderKL.from_pretrained("us/vae", **where), model)
    fetched = hub.fetched()
    assert len(set(fetched)) == len(list((tmp_path / "m" / "sub").iterdir()))
    hub.requests.clear()
    assert same(effusion.AutoencoderKL.from_pretrained("us/vae", **where), model)
    assert not [r for r in hub.requests if r[0] == "GET" and "/cdn/" in r[1]]
    hub.requests.clear()
    assert same(effusion.AutoencoderKL.from_pretrained("us/vae", local_files_only=True, **where), model)
    assert not hub.requests


def test_revisions_and_a_revision_that_moves_while_loading(hub: HubServer, tmp_path: Path) -> None:
    first = publish(hub, tmp_path / "m", seed=0)
    commit = hub.repos["us/vae"].refs["main"]
    second = publish(hub, tmp_path / "m", seed=1)
    assert same(effusion.AutoencoderKL.from_pretrained("us/vae", revision=commit), first)
    assert same(effusion.AutoencoderKL.from_pretrained("us/vae"), second)
    with pytest.raises(CheckpointError, match="no revision 'nothing'"):
        effusion.AutoencoderKL.from_pretrained("us/vae", revision="nothing")

    answer = hub_module.resolve_file

    def then_move(*args: object, **kwargs: object) -> Path:
        path = answer(*args, **kwargs)  # type: ignore[arg-type]
        if path.name == "config.json":
            publish(hub, tmp_path / "m", seed=2)
        return path

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub_module, "resolve_file", then_move)
        loaded = effusion.AutoencoderKL.from_pretrained("us/vae")
    assert same(loaded, second), "configuration and weights must be of one commit"


@pytest.mark.parametrize("fault", ["cut", "500"])
def test_an_interrupted_download_is_resumed_or_refused(hub: HubServer, tmp_path: Path, fault: str) -> None:
    model = publish(hub, tmp_path / "m")
    hub.faults[f"{NAME}.safetensors"] = fault
    try:
        loaded = effusion.AutoencoderKL.from_pretrained("us/vae")
    except CheckpointError:
        assert not list((tmp_path / "hub-cache").rglob("*.safetensors")), "a part of a file must not be taken for it"
        loaded = effusion.AutoencoderKL.from_pretrained("us/vae")
    assert same(loaded, model)


def test_a_hub_that_answers_garbage(hub: HubServer, tmp_path: Path) -> None:
    publish(hub, tmp_path / "m")
    hub.faults[f"{NAME}.safetensors"] = "garbage"
    with pytest.raises(CheckpointError, match=NAME):
        effusion.AutoencoderKL.from_pretrained("us/vae")


def test_gated_private_and_unknown_repositories(hub: HubServer, tmp_path: Path) -> None:
    model = publish(hub, tmp_path / "m")
    hub.repos["us/vae"].gated = True
    with pytest.raises(CheckpointError, match="gated"):
        effusion.AutoencoderKL.from_pretrained("us/vae")
    assert same(effusion.AutoencoderKL.from_pretrained("us/vae", token=hub.token), model)
    hub.repos["us/vae"].gated, hub.repos["us/vae"].private = False, True
    with pytest.raises(CheckpointError, match="no repository on the hub"):
        effusion.AutoencoderKL.from_pretrained("us/vae", force_download=True)
    with pytest.raises(CheckpointError, match="no repository on the hub"):
        effusion.AutoencoderKL.from_pretrained("us/unheard-of")


def test_offline_without_a_cache(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(hub, tmp_path / "m")
    with pytest.raises(MissingFile, match="not in the cache"):
        effusion.AutoencoderKL.from_pretrained("us/vae", local_files_only=True)
    assert not hub.requests
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(MissingFile, match="not in the cache"):
        effusion.AutoencoderKL.from_pretrained("us/vae")
    assert not hub.requests


@pytest.mark.parametrize("name", ["*", "?*", "[a-z]*", "**/*"])
def test_a_shard_is_a_name_and_no_pattern(hub: HubServer, tmp_path: Path, name: str) -> None:
    publish(hub, tmp_path / "m", max_shard_size="10KB")
    files = hub.repos["us/vae"].commits[hub.repos["us/vae"].refs["main"]]
    index = f"{NAME}.safetensors.index.json"
    large = {f"large/{i}.bin": b"x" * 5000 for i in range(3)}
    hub.add("us/vae", {**files, **large, index: json.dumps({"weight_map": {"a": name}}).encode()})
    with pytest.raises(CheckpointError):
        effusion.AutoencoderKL.from_pretrained("us/vae")
    assert {f for f in hub.fetched() if f.endswith((".bin", ".safetensors"))} == set()


def test_the_cache_is_told_by_its_folders_names(hub: HubServer, tmp_path: Path) -> None:
    """And not by `snapshots` somewhere in the path, which may be a disk of that name."""
    root = tmp_path / "snapshots" / "hf"
    model = publish(hub, tmp_path / "m")
    commit = hub.repos["us/vae"].refs["main"]
    assert same(effusion.AutoencoderKL.from_pretrained("us/vae", cache_dir=root), model)
    path = hub_module.resolve_file("us/vae", "config.json", cache_dir=root)
    assert hub_module.commit_of(path) == commit
    assert hub_module.commit_of(tmp_path / "m" / "snapshots" / "x" / "config.json") is None
    hub_module.check_inside(path, path.parent)
    plain = tmp_path / "snapshots" / "data" / "model"
    plain.mkdir(parents=True)
    (tmp_path / "snapshots" / "secret.json").write_text("{}")
    (tmp_path / "secret.json").write_text("{}")
    for target in ("../../secret.json", "../../../secret.json"):
        (plain / "config.json").unlink(missing_ok=True)
        (plain / "config.json").symlink_to(target)
        with pytest.raises(CheckpointError, match="is a link to"):
            hub_module.resolve_file(plain, "config.json")


def test_missing_files_name_what_was_looked_for(hub: HubServer, tmp_path: Path) -> None:
    publish(hub, tmp_path / "m")
    with pytest.raises(MissingFile, match=rf"us/vae has none of {NAME}\.fp16\.safetensors"):
        effusion.AutoencoderKL.from_pretrained("us/vae", variant="fp16")
    hub.add("us/empty", {"README.md": b"nothing"})
    with pytest.raises(MissingFile, match=r"us/empty has no file config\.json"):
        effusion.AutoencoderKL.from_pretrained("us/empty")


def test_an_index_on_the_hub_can_not_leave_its_folder(hub: HubServer, tmp_path: Path) -> None:
    publish(hub, tmp_path / "m", max_shard_size="10KB")
    files = hub.repos["us/vae"].commits[hub.repos["us/vae"].refs["main"]]
    index = f"{NAME}.safetensors.index.json"
    hub.add("us/vae", {**files, index: b'{"weight_map": {"a": "../../../../../../etc/passwd"}}'})
    with pytest.raises(CheckpointError, match="outside of its folder"):
        effusion.AutoencoderKL.from_pretrained("us/vae")
    shard = next(name for name in files if "-00002-of-" in name)
    del files[shard]
    hub.add("us/vae", files)
    with pytest.raises(MissingFile, match=shard):
        effusion.AutoencoderKL.from_pretrained("us/vae")
