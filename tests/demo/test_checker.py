"""The checker is checked: right on rendered truth, also blurred and noisy; near chance on shuffled captions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from effusion.demo import checker, data

N = 250


@pytest.fixture(scope="module")
def truth() -> tuple[list[str], torch.Tensor]:
    g = data.generator(11)
    scenes = data.Scenes.cat([data.sample(N // 2, g, "test"), data.sample(N - N // 2, g, "pairs")])
    return data.captions(scenes), data.render(scenes, g)


def pixels(pictures: torch.Tensor) -> np.ndarray:
    return ((pictures.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def shares(captions: list[str], pictures: torch.Tensor) -> dict[str, float]:
    return {k: right / total for k, (right, total) in checker.tally(captions, pixels(pictures)).items()}


def test_reads_rendered_truth(truth: tuple[list[str], torch.Tensor]) -> None:
    assert all(share >= 0.99 for share in shares(*truth).values())


def test_reads_through_blur_noise_and_a_colour_cast(truth: tuple[list[str], torch.Tensor]) -> None:
    captions, pictures = truth
    g = torch.Generator().manual_seed(0)
    soft = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, 1)
    soft = soft + 0.05 * torch.randn(soft.shape, generator=g) + 0.05 * torch.randn(N, 3, 1, 1, generator=g)
    assert all(share >= 0.97 for share in shares(captions, soft).values())


def test_is_near_chance_on_shuffled_captions(truth: tuple[list[str], torch.Tensor]) -> None:
    captions, pictures = truth
    found = shares(captions[1:] + captions[:1], pictures)
    # matching shapes in the best way lifts each share a little above one in 8, 5, 2, 4 and 4
    for name, chance in {
        "colour": 1 / 8,
        "shape": 1 / 5,
        "size": 1 / 2,
        "relation": 1 / 4,
        "background": 1 / 4,
    }.items():
        assert chance - 0.12 <= found[name] <= chance + 0.15, (name, found[name])
    assert found["whole"] <= 0.01


def test_knows_the_palette_and_grammar_of_the_data() -> None:
    assert checker.COLOURS == data.COLOURS and checker.GROUNDS == data.BACKGROUNDS
    g = data.generator(1)
    scenes = data.sample(300, g)
    for text in data.captions(scenes, data.wording(300, g)):
        checker.demand(text)


def test_marks_what_is_wrong() -> None:
    g = data.generator(0)
    one = torch.tensor([[1, 0]])
    scenes = data.Scenes(
        torch.tensor([2]), one, torch.tensor([[0, 5]]), torch.tensor([[0, 1]]), torch.tensor([0]), torch.tensor([0])
    )
    reading = checker.read(pixels(data.render(scenes, g))[0])
    assert data.captions(scenes) == ["a large red circle above a small blue square on a white background"]
    right = checker.judge("a large red circle above a small blue square on a white background", reading)
    assert all(all(marks) for marks in right.values())
    wrong = checker.judge("a small red circle below a small blue star on a black background", reading)
    assert wrong == {
        "colour": [True, True],
        "shape": [True, False],
        "size": [False, True],
        "relation": [False],
        "background": [False],
        "whole": [False],
    }
    alone = checker.judge("a large red circle on a white background", reading)
    assert alone["whole"] == [False] and all(alone["colour"])  # one shape too many
    missing = checker.judge("a large red circle above a small blue square", checker.Reading("white", ()))
    assert missing["colour"] == [False, False] and missing["relation"] == [False]


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="no caption of the demo"):
        checker.demand("a dog")
    with pytest.raises(ValueError, match="height, width, 3"):
        checker.read(np.zeros((8, 8)))
