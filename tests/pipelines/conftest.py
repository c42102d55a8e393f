"""Tiny checkpoints saved once per run, by the peer, and pipelines loaded from them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers

import effusion

from . import tiny, tiny_transformers

diffusers.logging.set_verbosity_error()
transformers.logging.set_verbosity_error()
diffusers.logging.disable_progress_bar()

Checkpoints = Callable[[str], Path]
Pipes = Callable[..., Any]

MAKERS: dict[str, Callable[[Path], Any]] = {
    "sd": lambda f: diffusers.StableDiffusionPipeline(**tiny.stable_diffusion(f)),
    "sd9": lambda f: diffusers.StableDiffusionInpaintPipeline(**tiny.stable_diffusion(f, 9)),
    "sd-v": lambda f: diffusers.StableDiffusionPipeline(
        **tiny.stable_diffusion(f, use_linear_projection=True) | {"scheduler": tiny.v_prediction()}
    ),
    "sd-safe": lambda f: diffusers.StableDiffusionPipeline(**tiny.stable_diffusion(f) | tiny.safety(f)),
    "sd-asymmetric": lambda f: diffusers.StableDiffusionInpaintPipeline(
        **tiny.stable_diffusion(f) | {"vae": tiny.asymmetric_vae()}
    ),
    "sd-taesd": lambda f: diffusers.StableDiffusionPipeline(**tiny.stable_diffusion(f) | {"vae": tiny.tiny_vae()}),
    "xl": lambda f: diffusers.StableDiffusionXLPipeline(**tiny.stable_diffusion_xl(f)),
    "xl9": lambda f: diffusers.StableDiffusionXLInpaintPipeline(**tiny.stable_diffusion_xl(f, 9)),
    "refiner": lambda f: diffusers.StableDiffusionXLImg2ImgPipeline(
        **tiny.stable_diffusion_xl(f, refiner=True), requires_aesthetics_score=True
    ),
    "sd-control": lambda f: diffusers.StableDiffusionControlNetPipeline(
        **tiny.stable_diffusion(f), controlnet=tiny.controlnet()
    ),
    "sd-control-shuffle": lambda f: diffusers.StableDiffusionControlNetPipeline(
        **tiny.stable_diffusion(f), controlnet=tiny.controlnet(global_pool_conditions=True)
    ),
    "sd-controls": lambda f: diffusers.StableDiffusionControlNetPipeline(
        **tiny.stable_diffusion(f), controlnet=[tiny.controlnet(), tiny.controlnet(seed=12)]
    ),
    "sd9-control": lambda f: diffusers.StableDiffusionControlNetInpaintPipeline(
        **tiny.stable_diffusion(f, 9), controlnet=tiny.controlnet()
    ),
    "xl-control": lambda f: diffusers.StableDiffusionXLControlNetPipeline(
        **tiny.stable_diffusion_xl(f), controlnet=tiny.xl_controlnet()
    ),
    "xl-controls": lambda f: diffusers.StableDiffusionXLControlNetPipeline(
        **tiny.stable_diffusion_xl(f), controlnet=[tiny.xl_controlnet(), tiny.xl_controlnet(seed=12)]
    ),
    "refiner-control": lambda f: diffusers.StableDiffusionXLControlNetImg2ImgPipeline(
        **tiny.stable_diffusion_xl(f, refiner=True),
        controlnet=tiny.xl_controlnet(32, 5),
        requires_aesthetics_score=True,
    ),
    "lcm": lambda f: diffusers.LatentConsistencyModelPipeline(
        **tiny.stable_diffusion(f, schedule="LCMScheduler", time_cond_proj_dim=8)
    ),
    "ddpm": lambda f: diffusers.DDPMPipeline(tiny.unconditional_unet(), diffusers.DDPMScheduler()),
    **tiny_transformers.MAKERS,
}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """The folder of a tiny checkpoint, saved by the peer when first asked for."""
    saved: dict[str, Path] = {}

    def find(name: str) -> Path:
        if name not in saved:
            folder = tmp_path_factory.mktemp(name)
            MAKERS[name](folder / "parts").save_pretrained(folder / "pipeline")
            saved[name] = folder / "pipeline"
        return saved[name]

    return find


@pytest.fixture(scope="session")
def loaded(checkpoint: Checkpoints) -> Pipes:
    """``loaded(library, face, name)``: a checkpoint read once by each library, its components in a new pipeline."""
    kept: dict[tuple[str, str, str], Any] = {}

    def load(library: Any, face: str, name: str) -> Any:
        cls, key = getattr(library, face), (library.__name__, face, name)
        if key not in kept:
            kept[key] = cls.from_pretrained(checkpoint(name), **tiny_transformers.ABSENT.get(name, {}))
        pipe = kept[key]
        own = {k: v for k, v in pipe.config.items() if not k.startswith("_") and k not in pipe.components}
        made = cls(**pipe.components, **own)
        if "scheduler" in pipe.components:
            made.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
        made.set_progress_bar_config(disable=True)
        return made

    return load


@pytest.fixture
def ours(loaded: Pipes) -> Pipes:
    """``ours(face, checkpoint)``: a pipeline of ours, quiet."""
    return lambda face, name: loaded(effusion, face, name)


@pytest.fixture
def theirs(loaded: Pipes) -> Pipes:
    """``theirs(face, checkpoint)``: the peer's pipeline on the same files."""
    return lambda face, name: loaded(diffusers, face, name)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
