"""What Stable Diffusion's first programs say in YAML, and the arguments of older scripts, beside the peer's answers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import yaml
from tests.pipelines import tiny

import effusion
from effusion.core.errors import CheckpointError

UNET = {"model_channels": 32, "channel_mult": [1, 2], "num_res_blocks": 1, "attention_resolutions": [2], "num_heads": 2,
        "in_channels": 4, "out_channels": 4, "context_dim": 32, "transformer_depth": 1, "image_size": 16}  # fmt: skip
VAE = {"double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 2],
       "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0}  # fmt: skip
ORIGINAL: dict[str, Any] = {
    "model": {
        "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
        "params": {
            "linear_start": 0.001, "linear_end": 0.01, "timesteps": 1000, "scale_factor": 0.2,
            "unet_config": {"target": "x", "params": UNET},
            "first_stage_config": {"target": "x", "params": {"embed_dim": 4, "ddconfig": VAE}},
            "cond_stage_config": {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder"},
        },
    }
}  # fmt: skip


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A file as those programs wrote it, the configuration beside it, and what neither of them has."""
    folder = tmp_path_factory.mktemp("original")
    torch.manual_seed(0)
    parts = tiny.stable_diffusion(folder / "t")
    size = {"block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 32}
    parts["unet"] = diffusers.UNet2DConditionModel(
        **size, cross_attention_dim=32, attention_head_dim=2, sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    parts["vae"] = diffusers.AutoencoderKL(
        **size, down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2
    )
    diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False).save_pretrained(folder / "sd")
    effusion.DiffusionPipeline.from_pretrained(folder / "sd").save_single_file(folder / "f.safetensors")
    (folder / "o.yaml").write_text(yaml.dump(ORIGINAL))
    rest = {n: parts[n] for n in ("tokenizer", "text_encoder")} | {"safety_checker": None, "feature_extractor": None}
    return {"file": str(folder / "f.safetensors"), "yaml": str(folder / "o.yaml"), "sd": folder / "sd", "rest": rest}


def load(library: Any, given: dict[str, Any], **kwargs: Any) -> Any:
    rest = {**given["rest"], **kwargs}
    return library.StableDiffusionPipeline.from_single_file(given["file"], local_files_only=True, **rest)


def test_networks_and_scheduler_follow_it(given: dict[str, Any]) -> None:
    theirs, ours = (load(lib, given, original_config=given["yaml"]) for lib in (diffusers, effusion))
    assert ours.unet.config.attention_head_dim == theirs.unet.config.attention_head_dim == 2
    assert ours.vae.config.scaling_factor == theirs.vae.config.scaling_factor == 0.2
    assert type(ours.scheduler).__name__ == type(theirs.scheduler).__name__ == "DDIMScheduler"
    for key, value in ours.scheduler.config.items():
        if not key.startswith("_"):
            assert theirs.scheduler.config[key] == value, key
    x, t, c = torch.randn(1, 4, 8, 8), torch.tensor(3), torch.randn(1, 5, 32)
    with torch.no_grad():
        assert torch.allclose(ours.unet(x, t, c).sample, theirs.unet(x, t, c).sample, atol=1e-5)


@pytest.mark.parametrize("network", ["UNet2DConditionModel", "AutoencoderKL"])
def test_networks_alone(given: dict[str, Any], network: str) -> None:
    found = [
        getattr(lib, network).from_single_file(given["file"], original_config=given["yaml"])
        for lib in (diffusers, effusion)
    ]
    for key in ("attention_head_dim", "scaling_factor", "block_out_channels"):
        theirs, ours = (network.config.get(key) for network in found)
        assert ours == theirs or list(ours) == list(theirs), key


def test_what_it_says_beyond_the_peer(given: dict[str, Any]) -> None:
    original = copy.deepcopy(ORIGINAL)
    original["model"]["params"] |= {"parameterization": "v", "timesteps": 900}
    original["model"]["params"]["unet_config"]["params"] |= {"num_head_channels": 16}
    pipe = load(effusion, given, original_config=original)
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    assert pipe.scheduler.config.num_train_timesteps == 900
    assert pipe.unet.config.attention_head_dim == [2, 4]


@pytest.mark.parametrize("kind", ["pndm", "lms", "heun", "euler", "euler-ancestral", "dpm", "ddim"])
def test_older_names_of_schedulers(given: dict[str, Any], kind: str) -> None:
    config = {"original_config": given["yaml"], "scheduler_type": kind}
    theirs, ours = (load(lib, given, **config).scheduler for lib in (diffusers, effusion))
    assert type(ours).__name__ == type(theirs).__name__
    for key in ("beta_start", "beta_end", "beta_schedule", "steps_offset", "timestep_spacing", "prediction_type"):
        assert ours.config.get(key) == theirs.config.get(key), key


def test_older_arguments_change_the_folders_scheduler(given: dict[str, Any]) -> None:
    pipe = load(effusion, given, config=given["sd"], scheduler_type="euler", prediction_type="v_prediction")
    assert isinstance(pipe.scheduler, effusion.EulerDiscreteScheduler)
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    with pytest.raises(ValueError, match="scheduler_type='eulr': allowed are pndm, "):
        load(effusion, given, config=given["sd"], scheduler_type="eulr")


def test_the_next_sampler_does_not_clip_latents(given: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    """Published configurations say so to every sampler, and it goes on from one to the next."""
    first = load(effusion, given).scheduler
    assert type(first) is effusion.PNDMScheduler
    second = effusion.DDIMScheduler.from_config(first.config)
    assert second.config.clip_sample is False
    assert second.config.set_alpha_to_one is False
    assert "unknown configuration entries" not in caplog.text


@pytest.mark.parametrize("original", [{"model": {}}, {}, "no-such.yaml", "{unclosed", {"model": {"params": 3}}])
def test_what_is_none(given: dict[str, Any], tmp_path: Path, original: Any) -> None:
    if isinstance(original, str) and original.startswith("{"):
        (tmp_path / "o.yaml").write_text(original)
        original = str(tmp_path / "o.yaml")
    with pytest.raises(CheckpointError, match="original_config"):
        load(effusion, given, original_config=original)
    (tmp_path / "evil.yaml").write_text("!!python/object/apply:os.mkdir [canary]")
    with pytest.raises(CheckpointError, match="can't be read"):
        load(effusion, given, original_config=str(tmp_path / "evil.yaml"))
    assert not Path("canary").exists()


def test_a_link_is_not_followed_where_nothing_may_be_fetched(
    given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("fetched")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    for cls in (effusion.StableDiffusionPipeline, effusion.UNet2DConditionModel):
        with pytest.raises(CheckpointError, match="local_files_only=True"):
            cls.from_single_file(given["file"], local_files_only=True, original_config="https://127.0.0.1:9/o.yaml")
