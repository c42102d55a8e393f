"""Unconditional diffusion on pixels: DDPM (Ho et al. 2020) and DDIM (Song et al. 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..blocks.decode import check_output_type
from ..blocks.timesteps import check_strength
from ..core.types import Cond, ModelInput
from .base import Family, predict
from .stable_diffusion import image_size


def check(
    family: Family,
    components: Mapping[str, Any],
    batch_size: int = 1,
    height: int | None = None,
    width: int | None = None,
    strength: float | None = None,
    output_type: str = "pil",
) -> dict[str, Any]:
    """Validate the call; work out the size."""
    check_output_type(output_type if output_type != "numpy" else "np")
    if batch_size < 1:
        raise ValueError(f"`batch_size` has to be at least 1, got {batch_size}")
    if strength is not None:
        check_strength(strength)
    height, width = image_size(family, components, height, width)
    return {"batch": batch_size, "height": height, "width": width, "guide": False}


def encode() -> dict[str, Any]:
    """There is nothing to condition on."""
    return {"conds": {"positive": Cond()}}


def call(unet: Any, inputs: ModelInput) -> Tensor:
    """Predict from the noisy picture and the timestep alone."""
    return predict(unet, inputs.x, inputs.t)


UNCONDITIONAL = Family(
    name="Unconditional",
    denoiser="unet",
    check=check,
    encode=encode,
    call=call,
    defaults={
        "text2image": {"num_inference_steps": 1000},
        "image2image": {"num_inference_steps": 1000, "strength": 0.8},
        "inpaint": {"num_inference_steps": 1000, "strength": 1.0},
    },
)
