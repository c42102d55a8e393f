"""Painting inside a mask: blended after each step, or seen by a network with extra input channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..core.random import Generators, randn_tensor
from ..core.types import Cond
from .latents import check_generators, dtype_of, encode_pixels, match_batch, noise_like_run, pack
from .timesteps import first_sigma, noised


def read_image_and_mask(
    image: Any,
    mask_image: Any,
    height: int,
    width: int,
    image_processor: Any,
    mask_processor: Any,
    padding_mask_crop: int | None = None,
    output_type: str = "pil",
) -> dict[str, Any]:
    """Picture and mask as tensors; with ``padding_mask_crop``, the region around the mask only."""
    check_pictures(image, mask_image, padding_mask_crop, output_type)
    crop, mode = None, "default"
    if padding_mask_crop is not None:
        crop = mask_processor.get_crop_region(mask_image, width, height, pad=padding_mask_crop)
        mode = "fill"
    size = {"height": height, "width": width, "crops_coords": crop, "resize_mode": mode}
    pixels = image_processor.preprocess(image, **size).to(dtype=torch.float32)
    mask = mask_processor.preprocess(mask_image, **size)
    return {"image": pixels, "mask_pixels": mask, "original_image": image, "crops_coords": crop}


def check_pictures(image: Any, mask_image: Any, padding_mask_crop: int | None = None, output_type: str = "pil") -> None:
    """A picture and a mask have to be there, and PIL images where a region of them is painted.

    Raises:
        ValueError: they are not.
    """
    for name, given in (("image", image), ("mask_image", mask_image)):
        if given is None:
            raise ValueError(f"`{name}` is missing: inpainting needs a picture and a mask that is white where to paint")
        if padding_mask_crop is not None and not (isinstance(given, Image.Image) and output_type == "pil"):
            raise ValueError(
                f"`padding_mask_crop` needs PIL images and output_type='pil', got {type(given).__name__} as `{name}` "
                f"and {output_type!r}"
            )


def start_inside_mask(
    family: Any,
    components: Any,
    scheduler: Any,
    device: torch.device,
    batch: int,
    height: int,
    width: int,
    image: Tensor,
    timesteps: Tensor,
    strength: float,
    conds: dict[str, Cond] | None = None,
    latents: Tensor | None = None,
    generator: Generators = None,
    denoising_start: float | None = None,
) -> dict[str, Any]:
    """Start latents of inpainting: noise at full strength, else the picture with noise added."""
    dtype = dtype_of(conds, components[family.denoiser])
    check_generators(generator, batch)
    known, side = None, family.packing
    if _needs_image(family, components, latents, strength):
        known = image_latents_of(family, components, image, batch, generator, device, dtype)
        known = pack(known, side)
    given, noise = latents, latents
    if noise is None:
        noise = pack(noise_like_run(family, components, batch, height, width, generator, device, dtype), side)
    noise = noise.to(device)
    if denoising_start is not None:
        assert known is not None
        latents = known
    elif given is not None or strength == 1.0:
        latents = noise * first_sigma(scheduler)
    else:
        assert known is not None
        latents = noised(scheduler, known, noise, timesteps[:1].repeat(batch))
    return {"latents": latents, "noise": noise, "image_latents": known}


def _needs_image(family: Any, components: Any, latents: Tensor | None, strength: float) -> bool:
    return not paints_by_channels(family, components) or (latents is None and strength != 1.0)


def paints_by_channels(family: Any, components: Any) -> bool:
    """Whether the network has input channels for the mask and the masked picture.

    Raises:
        ValueError: it has extra channels, but not as many as those need.
    """
    if not family.masks_by_channels:
        return False
    c = family.latent_format(components).channels
    has = family.model_channels(components) // family.packing**2
    if has == c:
        return False
    if has != c + 1 + c:
        raise ValueError(
            f"inpainting needs a network with {c} input channels (blended after each step) or {2 * c + 1} "
            f"(latents, mask, masked picture); this {family.denoiser} has {has}"
        )
    return True


def image_latents_of(
    family: Any, components: Any, image: Tensor, batch: int, generator: Generators, device: Any, dtype: torch.dtype
) -> Tensor:
    """Latents of the picture (or the picture itself, if it is latents), one per item of the batch."""
    image = image.to(device=device, dtype=dtype)
    vae = components.get("vae")
    if vae is None or image.shape[1] != family.latent_format(components).channels:
        image = encode_pixels(family, vae, image, generator)
    return match_batch(image, batch, "images")


def apply_mask(
    family: Any,
    components: Any,
    scheduler: Any,
    device: torch.device,
    batch: int,
    height: int,
    width: int,
    image: Tensor,
    mask_pixels: Tensor,
    latents: Tensor,
    noise: Tensor,
    image_latents: Tensor | None = None,
    masked_image_latents: Tensor | None = None,
    generator: Generators = None,
) -> dict[str, Any]:
    """The mask at latent size, and how it acts: as input channels or as a blend after each step."""
    dtype, f, side = latents.dtype, family.latent_format(components), family.packing
    size = (height // f.downscale, width // f.downscale)
    mask = torch.nn.functional.interpolate(mask_pixels, size=size).to(device=device, dtype=dtype)
    mask = match_batch(mask, batch, "masks")
    if not paints_by_channels(family, components):
        assert image_latents is not None
        if side > 1:
            mask = pack(mask.repeat(1, f.channels, 1, 1), side)
        return {"mask": mask, "blend": Blend(scheduler, mask, image_latents, noise)}
    if masked_image_latents is None:
        masked = image * (mask_pixels < 0.5)
    else:
        masked = masked_image_latents
    masked = image_latents_of(family, components, masked, batch, generator, device, dtype)
    return {"mask": mask, "masked_image_latents": masked, "channels": torch.cat([mask, masked], dim=1)}


@dataclass
class Blend:
    """Outside of the mask, put the picture back at the noise level of the next step (RePaint, 2022)."""

    scheduler: Any
    mask: Tensor
    known: Tensor
    noise: Tensor

    def __call__(self, latents: Tensor, index: int, timesteps: Tensor) -> Tensor:
        outside = self.known
        if index < len(timesteps) - 1:
            outside = noised(self.scheduler, self.known, self.noise, timesteps[index + 1 : index + 2])
        return (1 - self.mask) * outside + self.mask * latents


def skip_mask_noise(
    family: Any,
    components: Any,
    device: torch.device,
    height: int,
    width: int,
    image: Tensor,
    generator: Generators = None,
) -> None:
    """Draw the noise that encoding the masked picture would draw, so that seeds mean the same as elsewhere.

    The ecosystem encodes the masked picture even when the network has no channels for it; the
    result is unused, but a stochastic scheduler goes on with the generator's next numbers.
    """
    vae, f = components.get("vae"), family.latent_format(components)
    samples = generator is not None and hasattr(vae, "quant_conv") and image.shape[1] != f.channels
    if not samples or paints_by_channels(family, components):
        return
    size = (f.channels, height // f.downscale, width // f.downscale)
    if isinstance(generator, (list, tuple)):
        for g in generator[: image.shape[0]]:
            randn_tensor((1, *size), generator=g, device=device, dtype=vae.dtype)
    else:
        randn_tensor((image.shape[0], *size), generator=generator, device=device, dtype=vae.dtype)
