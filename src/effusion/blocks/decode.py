"""From latents to the result in the form that the caller asked for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .latents import decode_to_pixels, unpack

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def check_output_type(output_type: str) -> None:
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"`output_type` has to be one of {OUTPUT_TYPES}, got {output_type!r}")


def decode(
    family: Any,
    components: Any,
    latents: Tensor,
    image_processor: Any,
    device: torch.device,
    height: int,
    width: int,
    output_type: str = "pil",
    image: Tensor | None = None,
    mask_pixels: Tensor | None = None,
    final_size: tuple[int, int] | None = None,
    watermark: Any = None,
) -> dict[str, Any]:
    """Latents to pictures (PIL, numpy (B, H, W, 3), torch (B, 3, H, W) in 0..1), or latents as they are.

    Args:
        watermark: something with ``apply_watermark``, which is given the pixels.
    """
    if output_type == "latent":
        return {"images": latents, "nsfw_content_detected": None}
    vae, f = components.get("vae"), family.latent_format(components)
    latents = unpack(latents, family.packing, height // f.downscale, width // f.downscale)
    condition = {}
    if mask_pixels is not None and getattr(vae, "takes_mask", False):
        condition = {"image": image.to(device, vae.dtype), "mask": mask_pixels.to(device, vae.dtype)}  # type: ignore[union-attr]
    pixels = decode_to_pixels(family, vae, latents, **condition)
    if final_size is not None:
        pixels = resize_and_crop(pixels, *final_size)
    if watermark is not None:
        pixels = watermark.apply_watermark(pixels)
    pixels, flags = check_safety(components, pixels, image_processor, device, latents.dtype)
    normalized = [True] * pixels.shape[0] if flags is None else [not flag for flag in flags]
    images = image_processor.postprocess(pixels, output_type=output_type, do_denormalize=normalized)
    return {"images": images, "nsfw_content_detected": flags}


def resize_and_crop(pixels: Tensor, height: int, width: int) -> Tensor:
    """Scale (B, C, H, W) to cover ``height`` x ``width`` and cut out the middle."""
    rows, columns = pixels.shape[-2:]
    if (rows, columns) == (height, width):
        return pixels
    ratio = max(height / rows, width / columns)
    size = (int(rows * ratio), int(columns * ratio))
    pixels = torch.nn.functional.interpolate(pixels, size=size, mode="bilinear", align_corners=False)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return pixels[:, :, top : top + height, left : left + width]


def check_safety(
    components: Any, pixels: Tensor, image_processor: Any, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, list[bool] | None]:
    """Let the pipeline's safety checker, if it has one, black out pictures; returns its flags."""
    checker = components.get("safety_checker")
    if checker is None:
        return pixels, None
    tensor = torch.is_tensor(pixels)
    pictures = image_processor.postprocess(pixels, "pil") if tensor else image_processor.numpy_to_pil(pixels)
    seen = components["feature_extractor"](pictures, return_tensors="pt").to(device)
    return checker(images=pixels, clip_input=seen.pixel_values.to(dtype))  # type: ignore[no-any-return]


def paste_back(
    images: Any,
    image_processor: Any,
    mask_image: Any = None,
    original_image: Any = None,
    crops_coords: Any = None,
    output_type: str = "pil",
) -> dict[str, Any]:
    """Put the painted region back into the full picture, when only a crop around the mask was painted."""
    if crops_coords is None or output_type != "pil":
        return {}
    return {"images": [image_processor.apply_overlay(mask_image, original_image, i, crops_coords) for i in images]}
