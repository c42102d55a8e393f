"""A small pipeline on disk, as the peer saves it."""

from __future__ import annotations

import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from tests.pipelines import tiny


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion saved by the peer, with half-precision variants of its networks."""
    folder = tmp_path_factory.mktemp("source")
    pipe = diffusers.StableDiffusionPipeline(**tiny.stable_diffusion(folder / "t"), requires_safety_checker=False)
    pipe.save_pretrained(folder / "sd")
    pipe.to(torch.float16).save_pretrained(folder / "half")
    for name in ("unet", "vae", "text_encoder"):
        for path in (folder / "half" / name).glob("*.safetensors"):
            shutil.copy(path, folder / "sd" / name / path.name.replace(".safetensors", ".fp16.safetensors"))
    return folder / "sd"


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "sd"))
