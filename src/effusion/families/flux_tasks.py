"""Tasks that FLUX.1 has beyond the standard ones: Fill, Kontext, Control."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..blocks import inpaint, latents
from ..blocks.latents import dtype_of, encode_pixels, match_batch, pack
from ..core import log
from ..core.random import Generators
from ..core.types import Cond
from .base import read_image
from .control import control_latents, control_pixels
from .flux_controlnet import read_controlnet

logger = log.get_logger(__name__)

# (width, height) that Kontext was trained at
KONTEXT_SIZES = (
    (672, 1568), (688, 1504), (720, 1456), (752, 1392), (800, 1328), (832, 1248), (880, 1184), (944, 1104),
    (1024, 1024), (1104, 944), (1184, 880), (1248, 832), (1328, 800), (1392, 752), (1456, 720), (1504, 688),
    (1568, 672),
)  # fmt: skip

PREFERRED_KONTEXT_RESOLUTIONS = list(KONTEXT_SIZES)  # under the ecosystem's name


def token_ids(rows: int, columns: int, device: torch.device, dtype: torch.dtype, group: int = 0) -> Tensor:
    """(group, row, column) of each picture token; (rows * columns, 3)."""
    ids = torch.zeros(rows, columns, 3)
    ids[..., 0] = group
    ids[..., 1] = torch.arange(rows)[:, None]
    ids[..., 2] = torch.arange(columns)[None, :]
    return ids.reshape(rows * columns, 3).to(device=device, dtype=dtype)


def mask_channels(
    family: Any,
    components: Mapping[str, Any],
    device: torch.device,
    batch: int,
    image: Tensor,
    mask_pixels: Tensor,
    latents: Tensor,
    masked_image_latents: Tensor | None = None,
    generator: Generators = None,
) -> dict[str, Any]:
    """Fill: the masked picture and, at full resolution, the mask, as extra channels of each token.

    A caller's ``masked_image_latents`` stand for both, packed: (B, L, 64 + 256).
    """
    dtype, f = latents.dtype, family.latent_format(components)
    if masked_image_latents is not None:
        return {"channels": masked_image_latents.to(device=device, dtype=dtype)}
    masked = (image * (1 - mask_pixels)).to(device=device, dtype=dtype)
    z = match_batch(encode_pixels(family, components["vae"], masked, generator), batch, "images")
    mask = match_batch(mask_pixels[:, :1].to(device=device, dtype=dtype), batch, "masks")
    mask = torch.nn.functional.pixel_unshuffle(mask, f.downscale)
    return {"channels": torch.cat([pack(z, family.packing), pack(mask, family.packing)], dim=-1)}


def read_control(
    family: Any,
    components: Mapping[str, Any],
    device: torch.device,
    batch: int,
    height: int,
    width: int,
    image_processor: Any,
    control_image: Any,
    conds: dict[str, Cond],
    generator: Generators = None,
) -> dict[str, Any]:
    """Control: the latents of an edge or depth picture as extra channels of each token."""
    if control_image is None:
        raise ValueError("`control_image` is missing: an edge or depth picture, a tensor of one, or a list of them")
    transformer, f = components[family.denoiser], family.latent_format(components)
    has, needs = transformer.config.in_channels, 2 * f.channels * family.packing**2
    if has != needs:
        raise ValueError(
            f"this transformer takes {has} channels, a Control one takes {needs}; load a Control checkpoint"
        )
    dtype = dtype_of(conds, transformer)
    pixels = control_pixels(control_image, image_processor, height, width, batch, device, dtype)
    if pixels.ndim != 4:
        return {"channels": pixels}  # packed latents
    return {"channels": pack(control_latents(family, components["vae"], pixels, generator), family.packing)}


def read_reference(
    family: Any,
    components: Mapping[str, Any],
    device: torch.device,
    batch: int,
    image_processor: Any,
    conds: dict[str, Cond],
    image: Any = None,
    generator: Generators = None,
    _auto_resize: bool = True,
) -> dict[str, Any]:
    """Kontext: the latents of a reference picture as extra tokens of their own group."""
    if image is None:
        return {}
    f, dtype = family.latent_format(components), dtype_of(conds, components[family.denoiser])
    if not (torch.is_tensor(image) and image.shape[1] == f.channels):
        first = image[0] if isinstance(image, list) else image
        height, width = image_processor.get_default_height_width(first)
        if _auto_resize:
            width, height = min(KONTEXT_SIZES, key=lambda size: (abs(width / height - size[0] / size[1]), size))
        multiple = f.downscale * family.packing
        height, width = height // multiple * multiple, width // multiple * multiple
        image = image_processor.preprocess(image_processor.resize(image, height, width), height, width)
        image = encode_pixels(family, components["vae"], image.to(device=device, dtype=dtype), generator, "argmax")
    z = match_batch(image.to(device=device, dtype=dtype), batch, "images")
    rows, columns = z.shape[-2] // family.packing, z.shape[-1] // family.packing
    ids = token_ids(rows, columns, device, dtype, group=1)
    return {"tokens": pack(z, family.packing), "reference_ids": ids}


def fit_area(
    family: Any, components: Mapping[str, Any], height: int, width: int, max_area: int = 1024**2
) -> dict[str, Any]:
    """Kontext: the size nearest to ``max_area`` pixels with the aspect that was asked for."""
    f = family.latent_format(components)
    multiple, aspect = f.downscale * family.packing, width / height
    fitted = (round((max_area / aspect) ** 0.5), round((max_area * aspect) ** 0.5))
    fitted = (fitted[0] // multiple * multiple, fitted[1] // multiple * multiple)
    if fitted != (height, width):
        logger.warning("`height` and `width` were made %d and %d to fit the model's area", *fitted)
    return {"height": fitted[0], "width": fitted[1]}


def _rows(*names: str) -> Any:
    table = {
        "fit_area": fit_area,
        "read_image": read_image,
        "read_image_and_mask": inpaint.read_image_and_mask,
        "read_reference": read_reference,
        "read_control": read_control,
        "start_noise": latents.start_from_noise,
        "start_image": latents.start_from_image,
        "start_masked": inpaint.start_inside_mask,
        "skip_mask_noise": inpaint.skip_mask_noise,
        "apply_mask": inpaint.apply_mask,
        "mask_channels": mask_channels,
        "read_controlnet": read_controlnet,
    }
    return lambda family: [(n, family.schedule if n == "set_timesteps" else table[n]) for n in names]


FLUX_STARTS = {
    "fill": _rows("read_image_and_mask", "set_timesteps", "start_image", "mask_channels"),
    "kontext": _rows("fit_area", "set_timesteps", "read_reference", "start_noise"),
    "control": _rows("read_control", "set_timesteps", "start_noise"),
    "control_image2image": _rows("read_image", "read_control", "set_timesteps", "start_image"),
    "control_inpaint": _rows(
        "read_image_and_mask", "skip_mask_noise", "read_control", "set_timesteps", "start_masked", "apply_mask"
    ),
    "controlnet": _rows("read_controlnet", "set_timesteps", "start_noise"),
    "controlnet_image2image": _rows("read_image", "read_controlnet", "set_timesteps", "start_image"),
    "controlnet_inpaint": _rows(
        "read_image_and_mask", "read_controlnet", "set_timesteps", "start_masked", "skip_mask_noise", "apply_mask"
    ),
}
