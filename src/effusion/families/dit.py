"""DiT (Peebles & Xie 2023): pictures of a class, by a diffusion transformer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..blocks.decode import check_output_type
from ..blocks.timesteps import check_strength
from ..core.types import Cond, ModelInput
from .base import Family, predict, setting
from .stable_diffusion import image_size


def check(
    family: Family,
    components: Mapping[str, Any],
    class_labels: list[int] | int,
    height: int | None = None,
    width: int | None = None,
    strength: float | None = None,
    guidance_scale: float = 4.0,
    output_type: str = "pil",
) -> dict[str, Any]:
    """Validate the call; one picture for each class."""
    check_output_type(output_type)
    if strength is not None:
        check_strength(strength)
    labels = [class_labels] if isinstance(class_labels, int) else list(class_labels)
    classes = setting(components[family.denoiser], "num_embeds_ada_norm", 1000)
    wrong = [label for label in labels if not (isinstance(label, int) and 0 <= label < classes)]
    if wrong or not labels:
        raise ValueError(f"`class_labels` has to be a list of integers in 0..{classes - 1}, got {wrong or labels}")
    height, width = image_size(family, components, height, width)
    batch, guide = len(labels), guidance_scale > 1
    return {"batch": batch, "height": height, "width": width, "guide": guide, "class_labels": labels}


def encode(
    family: Family, components: Mapping[str, Any], device: torch.device, class_labels: list[int], guide: bool = True
) -> dict[str, Any]:
    """The class of each picture, and the null class for guidance."""
    labels = torch.tensor(class_labels, device=device)
    conds = {"positive": Cond(extras={"class_labels": labels})}
    if guide:
        null = setting(components[family.denoiser], "num_embeds_ada_norm", 1000)
        conds = {"negative": Cond(extras={"class_labels": torch.full_like(labels, null)}), **conds}
    return {"conds": conds}


def call(transformer: Any, inputs: ModelInput) -> Tensor:
    """Predict the noise; the learned variance is left out."""
    x = inputs.x
    labels = inputs.cond.extras["class_labels"]
    return predict(transformer, x, timestep=inputs.t.expand(x.shape[0]), class_labels=labels)[:, : x.shape[1]]


DIT = Family(
    name="DiT",
    denoiser="transformer",
    check=check,
    encode=encode,
    call=call,
    resizes_image=True,
    defaults={
        "text2image": {"num_inference_steps": 50, "guidance_scale": 4.0},
        "image2image": {"num_inference_steps": 50, "guidance_scale": 4.0, "strength": 0.6},
        "inpaint": {"num_inference_steps": 50, "guidance_scale": 4.0, "strength": 1.0},
    },
)
