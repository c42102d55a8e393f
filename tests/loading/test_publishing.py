"""Publishing: what is pushed to the hub can be loaded from it, by the same arguments as the peer's."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.utils import PushToHubMixin as Theirs
from tests.hub_server import HubServer
from tests.pipelines import tiny

import effusion
from effusion.core.errors import CheckpointError
from effusion.utils import PushToHubMixin


@pytest.fixture
def pipe(tmp_path: Path) -> Any:
    made = diffusers.StableDiffusionPipeline(**tiny.stable_diffusion(tmp_path / "t"), requires_safety_checker=False)
    made.save_pretrained(tmp_path / "sd")
    return effusion.StableDiffusionPipeline.from_pretrained(tmp_path / "sd")


def test_everything_that_is_saved_can_be_pushed() -> None:
    for cls in (effusion.DiffusionPipeline, effusion.SchedulerMixin, effusion.ModelMixin):
        assert issubclass(cls, PushToHubMixin)
        ours, theirs = (inspect.signature(c.push_to_hub).parameters.values() for c in (cls, Theirs))
        assert [(p.name, p.default) for p in ours] == [(p.name, p.default) for p in theirs]


def test_a_pushed_pipeline_is_loaded_again(hub: HubServer, pipe: Any, tmp_path: Path) -> None:
    url = pipe.push_to_hub("us/mine", token=hub.token, private=True, variant="fp16", commit_message="Mine")
    repo = hub.repos["us/mine"]
    assert url == f"{hub.url}/us/mine/commit/{repo.refs['main']}"
    assert repo.private
    assert repo.messages[repo.refs["main"]] == "Mine"
    files = repo.commits[repo.refs["main"]]
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in files
    assert b"library_name: diffusers" in files["README.md"]
    back = effusion.DiffusionPipeline.from_pretrained("us/mine", token=hub.token, variant="fp16")
    assert type(back) is effusion.StableDiffusionPipeline
    assert all(torch.equal(a, b) for a, b in zip(back.unet.parameters(), pipe.unet.parameters(), strict=True))


def test_networks_and_schedulers_go_into_folders(hub: HubServer, pipe: Any) -> None:
    pipe.unet.push_to_hub("us/parts", token=hub.token, subfolder="unet", safe_serialization=False)
    pipe.scheduler.push_to_hub("us/parts", token=hub.token, subfolder="scheduler")
    repo = hub.repos["us/parts"]
    assert list(repo.messages.values()) == ["Upload model", "Upload scheduler"]
    assert sorted(repo.commits[repo.refs["main"]]) == [
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.bin",
    ]
    back = effusion.DDIMScheduler.from_pretrained("us/parts", subfolder="scheduler")
    assert back.config.num_train_timesteps == pipe.scheduler.config.num_train_timesteps


def test_a_proposal_leaves_the_branch_alone_and_a_card_stays(hub: HubServer, pipe: Any) -> None:
    hub.add("us/theirs", {"README.md": b"written by hand"})
    before = hub.repos["us/theirs"].refs["main"]
    pipe.scheduler.push_to_hub("us/theirs", token=hub.token, create_pr=True)
    repo = hub.repos["us/theirs"]
    assert repo.refs["main"] == before
    assert repo.commits[repo.refs["refs/pr/1"]]["README.md"] == b"written by hand"


def test_saving_with_push_to_hub(hub: HubServer, pipe: Any, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "named", push_to_hub=True, token=hub.token)
    pipe.vae.save_pretrained(tmp_path / "vae", push_to_hub=True, repo_id="us/vae", token=hub.token)
    pipe.scheduler.save_pretrained(tmp_path / "plan", push_to_hub=True, repo_id="us/plan", token=hub.token)
    assert set(hub.repos) == {"me/named", "us/vae", "us/plan"}
    named = hub.repos["me/named"]
    assert list(named.messages.values()) == ["Upload StableDiffusionPipeline"]
    assert "model_index.json" in named.commits[named.refs["main"]]


def test_a_refusal_is_explained(hub: HubServer, pipe: Any) -> None:
    with pytest.raises(CheckpointError):
        pipe.scheduler.push_to_hub("us/mine", token="hf_wrong")
    assert hub.repos == {}
