"""The walk-through of CONTRIBUTING.md: a family in one file has every task on its first day."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from examples import toy_family

from effusion import DPMSolverMultistepScheduler, EulerDiscreteScheduler, ModularPipeline, UnsupportedTask

COLOURS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1)}


@pytest.fixture
def pipe() -> toy_family.ToyPipeline:
    made = toy_family.make()
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize("scheduler", [None, EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_text2image_gives_the_colour_that_was_asked_for(pipe: toy_family.ToyPipeline, scheduler: type | None) -> None:
    if scheduler is not None:
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)  # type: ignore[attr-defined]
    images = pipe(list(COLOURS), generator=torch.Generator().manual_seed(0), output_type="np").images
    for image, colour in zip(images, COLOURS.values(), strict=True):
        assert np.abs(image - np.array(colour)).max() < 0.02


def test_image2image_goes_towards_the_colour(pipe: toy_family.ToyPipeline) -> None:
    modular = ModularPipeline.from_pipeline(pipe, "image2image")
    gray = PIL.Image.new("RGB", (16, 16), (128, 128, 128))
    images = modular(prompt="blue", image=gray, strength=0.9, num_inference_steps=10, output_type="np", output="images")
    assert images[0, ..., 2].mean() > 0.9 > 0.1 > images[0, ..., 0].mean()


def test_inpainting_keeps_what_is_outside_of_the_mask(pipe: toy_family.ToyPipeline) -> None:
    modular = ModularPipeline.from_pipeline(pipe, "inpaint")
    red, mask = PIL.Image.new("RGB", (16, 16), (255, 0, 0)), np.zeros((16, 16), np.uint8)
    mask[:, 8:] = 255
    image = modular(
        prompt="green", image=red, mask_image=PIL.Image.fromarray(mask), num_inference_steps=10,
        output_type="np", output="images",
    )[0]  # fmt: skip
    assert np.abs(image[:, :8] - np.array((1, 0, 0))).max() < 0.02
    assert np.abs(image[:, 8:] - np.array((0, 1, 0))).max() < 0.02


def test_it_saves_and_loads_and_offloads(pipe: toy_family.ToyPipeline, tmp_path: Path) -> None:
    expected = pipe("red", generator=torch.Generator().manual_seed(1), output_type="np").images
    pipe.save_pretrained(tmp_path)
    again = toy_family.ToyPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    again.enable_sequential_cpu_offload(device="cpu")
    found = again("red", generator=torch.Generator().manual_seed(1), output_type="np").images
    assert np.array_equal(found, expected)


def test_mistakes_are_named(pipe: toy_family.ToyPipeline) -> None:
    with pytest.raises(ValueError, match="has to be one of.*got \\['mauve'\\]"):
        pipe("mauve")
    with pytest.raises(UnsupportedTask, match="Toy can't do kontext"):
        toy_family.TOY.blocks("kontext")
