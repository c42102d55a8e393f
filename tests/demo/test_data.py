"""The dataset: deterministic, what it says is what it paints, and the test set stays out of training."""

from __future__ import annotations

import pytest
import torch

from effusion.demo import data

GENERATOR = data.generator


def drawn(split: str, n: int = 512, seed: int = 0) -> data.Scenes:
    return data.sample(n, GENERATOR(seed), split)


def pairs(scenes: data.Scenes) -> set[tuple[str, str]]:
    colours = list(data.COLOURS)
    return {
        (colours[scenes.colour[i, j]], data.SHAPES[scenes.shape[i, j]])
        for i in range(len(scenes))
        for j in range(int(scenes.count[i]))
    }


def test_the_same_seed_gives_the_same_pictures_and_captions() -> None:
    def make(seed: int) -> tuple[torch.Tensor, list[str]]:
        g = GENERATOR(seed, 3)
        scenes = data.sample(16, g)
        return data.render(scenes, g), data.captions(scenes, data.wording(16, g))

    one, two, other = make(1), make(1), make(2)
    assert torch.equal(one[0], two[0]) and one[1] == two[1]
    assert not torch.equal(one[0], other[0]) and one[1] != other[1]


def test_pictures_are_in_range_and_antialiased() -> None:
    g = GENERATOR(0)
    pictures = data.render(data.sample(32, g), g)
    assert pictures.shape == (32, 3, 64, 64) and pictures.dtype == torch.float32
    assert pictures.min() >= -1 and pictures.max() <= 1
    colours = pictures.permute(0, 2, 3, 1).reshape(-1, 3).unique(dim=0)
    assert len(colours) > 12 + 20  # more than the palette: edges are mixed


def test_held_out_pairs_are_never_trained_on() -> None:
    assert len(data.HELD_OUT_PAIRS) >= 4
    seen = pairs(drawn("train", 8192))
    assert not seen & set(data.HELD_OUT_PAIRS)
    assert len(seen) == len(data.COLOURS) * len(data.SHAPES) - len(data.HELD_OUT_PAIRS)


def test_no_caption_is_in_two_splits() -> None:
    captions = {split: set(data.captions(drawn(split, 4096))) for split in ("train", "test", "pairs")}
    assert not captions["train"] & captions["test"]
    assert not captions["train"] & captions["pairs"]
    assert not captions["test"] & captions["pairs"]


def test_every_caption_of_the_pairs_split_has_a_held_out_pair_and_of_the_test_split_none() -> None:
    assert drawn("pairs").has_held_out_pair().all()
    assert not drawn("test").has_held_out_pair().any()
    assert pairs(drawn("pairs", 2048)) >= set(data.HELD_OUT_PAIRS)


def test_scenes_that_differ_have_different_numbers() -> None:
    scenes = drawn("train", 4096)
    by_caption = dict(zip(data.captions(scenes), scenes.number().tolist(), strict=True))
    assert len(set(by_caption.values())) == len(by_caption)


def test_wording_leaves_out_words_but_says_nothing_wrong() -> None:
    g = GENERATOR(0)
    scenes = data.sample(512, g)
    full, free = data.captions(scenes), data.captions(scenes, data.wording(512, g))
    assert full != free
    for a, b in zip(full, free, strict=True):
        assert set(b.split()) <= {*a.split(), "to", "the", "an"}
    assert any("to the left of" in text for text in free) and any("left of" in text for text in full)


def test_shapes_keep_clear_of_each_other_and_of_the_border() -> None:
    g = GENERATOR(5)
    scenes = data.sample(2048, g, single=0.3)
    centre, radius = data.place(scenes, g)
    two = scenes.count == 2
    first_clear = ((centre[:, 0] - radius[:, :1] >= 1.9) & (centre[:, 0] + radius[:, :1] <= 62.1)).all()
    assert first_clear
    gap = (centre[:, 0] - centre[:, 1]).abs().max(dim=1).values - radius.sum(dim=1)
    assert (gap[two] >= 3.9).all()


def test_unknown_split() -> None:
    with pytest.raises(ValueError, match="split 'all'"):
        data.sample(1, GENERATOR(0), "all")


def test_a_picture_said_from_the_other_shape_is_the_same_picture_and_never_a_test_caption() -> None:
    scenes = drawn("train", 4096)
    turned = scenes.seen_from_the_other(scenes.relation % 2 == 1)
    assert not turned.is_for_testing().any()
    before, after = data.captions(scenes), data.captions(turned)
    changed = [i for i in range(len(before)) if before[i] != after[i]]
    assert len(changed) > 1000
    opposite = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}
    for i in changed[:200]:
        scene, ground = before[i].split(" on a ")
        link = next(f" {name} " for name in data.RELATIONS if f" {name} " in scene)
        first, second = scene.split(link)
        assert after[i] == f"{second} {opposite[link.strip()]} {first} on a {ground}"
    upright = (turned.relation[turned.count == 2] % 2 == 0).float().mean()
    assert upright > 0.9  # all but those whose other way is set apart for testing
    assert data.captions(scenes.seen_from_the_other(torch.zeros(len(scenes), dtype=torch.bool))) == before
