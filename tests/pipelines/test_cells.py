"""Every family x task: run here or in the parity tests, or refused with the one clear error; the page says which."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from effusion import ModularPipeline, UnsupportedTask
from effusion.families import FAMILIES, family
from effusion.families.base import TASKS

from .conftest import Pipes
from .inputs import generator, mask, picture

ROOT = Path(__file__).parents[2]
ALL = sorted({task for name in FAMILIES for task in family(name).tasks})
# cells without a class of their own: (face whose components are used, checkpoint, task, what the call needs)
PIXART = {"prompt": "a cat", "use_resolution_binning": False, "height": 32, "width": 32}
MODULAR = [
    ("PixArtAlphaPipeline", "pixart-alpha", "image2image", PIXART),
    ("PixArtAlphaPipeline", "pixart-alpha", "inpaint", PIXART),
    ("DiTPipeline", "dit", "image2image", {"class_labels": [3], "height": 32, "width": 32}),
    ("DiTPipeline", "dit", "inpaint", {"class_labels": [3], "height": 32, "width": 32}),
    ("LatentConsistencyModelPipeline", "lcm", "inpaint", {"prompt": "a cat", "height": 32, "width": 32}),
    ("DDPMPipeline", "ddpm", "image2image", {}),
    ("DDPMPipeline", "ddpm", "inpaint", {}),
]


@pytest.mark.parametrize(("face", "name", "task", "call"), MODULAR, ids=lambda v: v if isinstance(v, str) else "")
def test_cells_without_a_class_run(face: str, name: str, task: str, call: dict[str, object], ours: Pipes) -> None:
    modular = ModularPipeline.from_pipeline(ours(face, name), task)
    modular.set_progress_bar_config(disable=True)
    side = modular.components[modular.family.denoiser].config.sample_size * modular.vae_scale_factor
    given = {"image": picture(side), **({"mask_image": mask(side)} if task == "inpaint" else {}), **call}
    images = modular(**given, num_inference_steps=4, output_type="np", generator=generator(), output="images")
    assert images.shape[0] == 1
    assert np.isfinite(images).all()
    again = modular(**given, num_inference_steps=4, output_type="np", generator=generator(), output="images")
    assert np.array_equal(images, again)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("task", ALL)
def test_a_cell_has_blocks_or_is_refused(name: str, task: str) -> None:
    record = family(name)
    if task in record.tasks:
        assert "denoise" in record.blocks(task)
    else:
        with pytest.raises(UnsupportedTask, match=f"can't do {task}; it can do .*text2image"):
            record.blocks(task)


def test_every_family_has_the_standard_tasks() -> None:
    assert all(set(TASKS) <= set(family(name).tasks) for name in FAMILIES)


def test_the_page_is_what_the_records_say() -> None:
    sys.path.insert(0, str(ROOT))
    try:
        from docs import families
    finally:
        sys.path.remove(str(ROOT))
    assert families.PAGE.read_text(encoding="utf-8") == families.page(), "run `python -m docs.families --write`"
