"""The parts of the demo model: the tokenizer, the sizes, the objectives and a run of every stage in small."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from effusion.demo import data, model, score, train
from effusion.demo.objectives import CaptionLoss, PictureLoss

TINY_VAE = {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4}
TINY_UNET = {"block_out_channels": (8, 8), "norm_num_groups": 4, "attention_head_dim": 2}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return model.build_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "VAE", {**model.VAE, **TINY_VAE})
    monkeypatch.setattr(model, "UNET", {**model.UNET, **TINY_UNET, "cross_attention_dim": 16})
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    monkeypatch.setattr(model, "TEXT", {**model.TEXT, **small})


def test_every_word_is_one_token_and_captions_come_back(tokenizer: Any) -> None:
    assert all(len(tokenizer.tokenize(word)) == 1 for word in model.words())
    g = data.generator(0)
    scenes = data.sample(64, g)
    for text in data.captions(scenes, data.wording(64, g)):
        ids = tokenizer(text).input_ids
        assert len(ids) == len(text.split()) + 2 <= model.TOKENS
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text


def test_other_text_falls_back_to_bytes_that_are_all_known(tokenizer: Any) -> None:
    text = "naïve 日本 🦊 x1!"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids).replace(" ", "") == text.replace(" ", "")


def test_tokenizer_is_saved_and_read_again(tokenizer: Any, tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    tokenizer.save_pretrained(tmp_path)
    again = CLIPTokenizer.from_pretrained(tmp_path)
    text = "a small red circle to the left of a horse"
    assert again(text).input_ids == tokenizer(text).input_ids
    assert again.model_max_length == model.TOKENS and again.pad_token_id == tokenizer.pad_token_id


def test_the_whole_model_is_small_enough_to_ship(tokenizer: Any) -> None:
    parts = [model.build_vae(), model.build_unet(), model.build_text_encoder(tokenizer)]
    assert 2 * sum(p.numel() for part in parts for p in part.parameters()) < 19.5e6


def test_standardising_latents_leaves_the_pictures_as_they_are(tiny: None) -> None:
    torch.manual_seed(0)
    vae = model.build_vae().eval()
    g = data.generator(0)
    pictures = data.render(data.sample(16, g), g)
    with torch.no_grad():
        before = vae.encode(pictures).latent_dist
        painted = vae.decode(before.mode()).sample
        train.standardise(vae, before.mode())
        after = vae.encode(pictures).latent_dist
        again = vae.decode(after.mode()).sample
    assert after.mode().mean(dim=(0, 2, 3)).abs().max() < 1e-4
    torch.testing.assert_close(after.mode().std(dim=(0, 2, 3)), torch.ones(model.LATENT_CHANNELS))
    torch.testing.assert_close(again, painted, atol=1e-4, rtol=1e-4)
    ratio = before.mode().std(dim=(0, 2, 3), keepdim=True)
    torch.testing.assert_close(after.std * ratio, before.std, atol=1e-5, rtol=1e-4)


def test_objectives_depend_on_the_generator_only(tiny: None, tokenizer: Any) -> None:
    torch.manual_seed(0)
    latents, scenes = torch.randn(20, 8, 8, 8), data.sample(20, data.generator(0))
    captioned = CaptionLoss(
        model.build_unet(), model.build_text_encoder(tokenizer), tokenizer, model.build_scheduler(), latents, scenes, 4
    )
    for objective in (PictureLoss(model.build_vae(), 4), captioned):
        objective.eval()
        losses = [float(objective(torch.Generator().manual_seed(seed))["loss"].detach()) for seed in (1, 1, 2)]
        assert losses[0] == losses[1] != losses[2]


def test_a_tenth_of_the_captions_is_dropped(tokenizer: Any) -> None:
    latents, scenes = torch.zeros(50, 8, 8, 8), data.sample(50, data.generator(0))
    scheduler = model.build_scheduler()
    objective = CaptionLoss(torch.nn.Identity(), torch.nn.Identity(), tokenizer, scheduler, latents, scenes, 2000)
    texts = objective.draw(torch.Generator().manual_seed(0))[1]
    assert 0.07 < texts.count("") / 2000 < 0.13


def test_every_stage_runs_and_the_result_is_a_pipeline(tiny: None, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline as Peer

    from effusion.pipelines.stable_diffusion import StableDiffusionPipeline

    common = ["--out", str(tmp_path), "--log-every", "1", "--precision", "no"]
    train.main(["--stage", "vae", "--steps", "2", "--batch", "4", *common])
    train.main(["--stage", "latents", "--pictures", "1000", *common])
    train.main(["--stage", "diffusion", "--steps", "1", "--batch", "4", *common])
    train.main(["--stage", "diffusion", "--steps", "2", "--batch", "4", "--resume", *common])
    train.main(["--stage", "export", *common])
    lines = [json.loads(line) for line in (tmp_path / "diffusion" / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 2 and {"colour", "whole", "whole_pairs"} <= set(lines[-1])

    ours = StableDiffusionPipeline.from_pretrained(tmp_path / "model", torch_dtype=torch.float32)
    peer = Peer.from_pretrained(tmp_path / "model", torch_dtype=torch.float32)
    images = []
    for pipe in (ours, peer):
        pipe.set_progress_bar_config(disable=True)
        g = torch.Generator().manual_seed(0)
        out = pipe("a small red circle", num_inference_steps=2, generator=g, output_type="np")
        images.append(torch.from_numpy(out.images))
    assert images[0].shape == (1, 64, 64, 3)
    torch.testing.assert_close(images[0], images[1], atol=1e-4, rtol=0)

    found = score.score(ours, n=4, steps=2, guidance=3.0, seed=0)
    assert found["all"]["whole"][1] == 4 and found["test"]["background"][1] == 2
    assert "pairs" in score.table(found)


def test_wilson() -> None:
    low, high = score.wilson(90, 100)
    assert (round(low, 4), round(high, 4)) == (0.8256, 0.9448)
    assert score.wilson(0, 0) == (0.0, 1.0) and score.wilson(0, 10)[0] == 0.0


def test_scored_captions_are_never_trained_on() -> None:
    for split in score.SPLITS:
        assert score.captions(split, 32, 0) == score.captions(split, 32, 0) != score.captions(split, 32, 1)
    assert not set(score.captions("test", 256, 0)) & set(data.captions(data.sample(4096, data.generator(7), "train")))


def test_the_shipped_model_is_an_ordinary_pipeline_and_paints_what_is_asked_for() -> None:
    from diffusers import StableDiffusionPipeline as Peer

    from effusion import demo
    from effusion.demo import checker
    from effusion.pipelines.stable_diffusion import StableDiffusionPipeline

    files = [file for file in demo.path().rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 20e6
    texts = score.captions("test", 4, 5) + score.captions("pairs", 4, 5)
    ours = StableDiffusionPipeline.from_pretrained(demo.path(), torch_dtype=torch.float32)
    ours.set_progress_bar_config(disable=True)
    right, total = checker.tally(texts, score.pictures(ours, texts, 12, 3.0, 0))["whole"]
    assert right >= 6, f"{right} of {total}"

    peer = Peer.from_pretrained(demo.path(), torch_dtype=torch.float32)
    peer.set_progress_bar_config(disable=True)
    latents = [
        pipe(
            texts[:2],
            num_inference_steps=4,
            guidance_scale=3.0,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        ).images
        for pipe in (ours, peer)
    ]
    torch.testing.assert_close(latents[0], latents[1], atol=1e-4, rtol=0)
