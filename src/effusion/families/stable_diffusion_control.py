"""Stable Diffusion 1.x, 2.x and XL with control networks (ControlNet, Zhang et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..blocks import decode, inpaint, latents
from ..blocks.engine import BlockList
from ..blocks.images import VaeImageProcessor, is_valid_image
from ..core import log
from ..core.types import State
from .base import read_image
from .control import control_of, pictures_by_network
from .unet_control import Ask

logger = log.get_logger(__name__)
SIZE_MULTIPLE = 8
_TASKS = ("controlnet", "controlnet_image2image", "controlnet_inpaint")


def control_name(task: str) -> str:
    """What the face of ``task`` calls the control picture: without another picture, it is the ``image``."""
    return "image" if task == "controlnet" else "control_image"


def control_processor(family: Any, components: Mapping[str, Any]) -> VaeImageProcessor:
    """Prepares control pictures: sizes as for the VAE, values in [0, 1]."""
    factor = family.latent_format(components).downscale
    return VaeImageProcessor(vae_scale_factor=factor, do_convert_rgb=True, do_normalize=False)


def find_size(
    family: Any,
    components: Mapping[str, Any],
    task: str,
    controlnet: Any,
    image: Any = None,
    control_image: Any = None,
    height: int | None = None,
    width: int | None = None,
    padding_mask_crop: int | None = None,
) -> dict[str, Any]:
    """The size of the run: the caller's, else that of the pictures, rounded down to what the networks can do.

    Raises:
        ValueError: a picture is missing, or the pictures have different sizes and the call has none.
    """
    name = control_name(task)
    control = pictures_by_network(controlnet, image if name == "image" else control_image, name)
    sources = [(name, picture) for picture in control]
    if name != "image":
        if image is None:
            raise ValueError("`image` is missing: a picture, a tensor, or a list of them; `control_image` is another")
        sources = [("image", image), *([] if padding_mask_crop is not None else sources)]
    given = (height, width)
    sizes = [_size_of(family, components, what, picture, *given) for what, picture in sources]
    if len(set(sizes)) > 1:
        seen = ", ".join(f"`{what}` {w}x{h}" for (what, _), (h, w) in zip(sources, sizes, strict=True))
        raise ValueError(f"the pictures have different sizes ({seen}): give `height` and `width`, or make them equal")
    if any(wish not in (None, found) for wish, found in zip(given, sizes[0], strict=True)):
        logger.warning("`height` and `width` were made %d and %d, to be divisible by %d", *sizes[0], SIZE_MULTIPLE)
    found = {"height": sizes[0][0], "width": sizes[0][1]}
    return found if name != "image" else {**found, "control_image": image, "image": None}


def _size_of(
    family: Any, components: Mapping[str, Any], name: str, picture: Any, height: int | None, width: int | None
) -> tuple[int, int]:
    """``(height, width)`` of a run on ``picture`` (the first of several), where the call leaves them open."""
    while isinstance(picture, (list, tuple)) and len(picture):
        picture = picture[0]
    if not (is_valid_image(picture) or getattr(picture, "ndim", 0) == 4):
        raise ValueError(
            f"`{name}` has to be a PIL image, numpy array, torch tensor or a list of one of them, "
            f"got {type(picture).__name__}"
        )
    f = family.latent_format(components)
    multiple = max(SIZE_MULTIPLE, f.downscale)
    if isinstance(picture, (np.ndarray, Tensor)) and picture.ndim < 4:
        picture = picture[None] if picture.ndim == 3 else picture[None, ..., None]
    if name == "image" and torch.is_tensor(picture) and picture.shape[1] == f.channels:
        own = (picture.shape[2] * f.downscale, picture.shape[3] * f.downscale)
        found = (height or own[0], width or own[1])
        return found[0] - found[0] % multiple, found[1] - found[1] % multiple
    return VaeImageProcessor(vae_scale_factor=multiple).get_default_height_width(picture, height, width)


def read_image_at_size(family: Any, image: Any, image_processor: Any, height: int, width: int) -> dict[str, Any]:
    """The caller's picture as pixels in [-1, 1] at the size of the run; (B, 3, H, W)."""
    return read_image(replace(family, resizes_image=True), image, image_processor, height, width)


def read_controlnet(
    state: State,
    family: Any,
    components: Mapping[str, Any],
    task: str,
    device: torch.device,
    batch: int,
    height: int,
    width: int,
    guide: bool,
    controlnet: Any,
    control_image: Any,
    num_images_per_prompt: int = 1,
    guess_mode: bool = False,
    controlnet_conditioning_scale: float | list[float] = 1.0,
    control_guidance_start: float | list[float] = 0.0,
    control_guidance_end: float | list[float] = 1.0,
    crops_coords: tuple[int, int, int, int] | None = None,
) -> dict[str, Any]:
    """Prepare the control pictures, and what asks the control network(s) at each step.

    In guess mode, and for networks that add means over the picture only, the negative branch is not controlled.
    """
    name, several = control_name(task), hasattr(controlnet, "nets")
    pictures = pictures_by_network(controlnet, control_image, name)
    first = controlnet.nets[0] if several else controlnet
    guess = bool(guess_mode or first.config.global_pool_conditions)
    ask = Ask(controlnet, state, name, several, guess, batch)
    values = (controlnet_conditioning_scale, control_guidance_start, control_guidance_end)
    control = control_of(controlnet, ask, len(pictures), *values)
    processor = control_processor(family, components)
    mode = "default" if crops_coords is None else "fill"
    ready = []
    for picture in pictures:
        pixels = processor.preprocess(picture, height, width, mode, crops_coords)
        rows = _rows(pixels, batch, num_images_per_prompt or 1, name).to(device=device, dtype=controlnet.dtype)
        ready.append(torch.cat([rows] * 2) if guide and not guess else rows)
    return {"control": control, name: ready if several else ready[0]}


def _rows(pixels: Tensor, batch: int, per_prompt: int, name: str) -> Tensor:
    """One picture for all images, or one for each prompt, as a row for each image.

    Raises:
        ValueError: another number of pictures.
    """
    count, prompts = pixels.shape[0], batch // per_prompt
    if count not in (1, prompts):
        raise ValueError(f"`{name}` has {count} pictures for {prompts} prompts: give one, or one for each")
    return pixels.repeat_interleave(batch if count == 1 else per_prompt, dim=0)


CONTROL_STARTS = {
    "controlnet": lambda family: [("set_timesteps", family.schedule), ("start", latents.start_from_noise)],
    "controlnet_image2image": lambda family: [
        ("read_image", read_image_at_size),
        ("set_timesteps", family.schedule),
        ("start", latents.start_from_image),
    ],
    "controlnet_inpaint": lambda family: [
        ("set_timesteps", family.schedule),
        ("start", inpaint.start_inside_mask),
        ("skip_mask_noise", inpaint.skip_mask_noise),
        ("apply_mask", inpaint.apply_mask),
    ],
}


def edit(blocks: BlockList, task: str) -> None:
    """Look at all pictures before any network runs; a crop around the mask is a crop of the control picture too."""
    if task not in _TASKS:
        return
    blocks.insert_before("check", "find_size", find_size)
    blocks.insert_after("check", "read_controlnet", read_controlnet)
    if task == "controlnet_inpaint":
        blocks.insert_before("read_controlnet", "read_image", inpaint.read_image_and_mask)
        blocks.append(decode.paste_back)
