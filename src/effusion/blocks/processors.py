"""Image processors for one purpose: PixArt's training sizes, inpainting's image and mask together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from ..core.config import ConfigMixin, register_to_config
from .images import Picture, VaeImageProcessor

_NO_CROP: dict[str, Any] = {"crops_coords": None, "original_image": None, "original_mask": None}


class PixArtImageProcessor(VaeImageProcessor):
    """:class:`VaeImageProcessor` that also finds the training size nearest to a wanted one, and crops to a wanted one."""

    @register_to_config
    def __init__(
        self,
        do_resize: bool = True,
        vae_scale_factor: int = 8,
        resample: str = "lanczos",
        do_normalize: bool = True,
        do_binarize: bool = False,
        do_convert_grayscale: bool = False,
    ) -> None:
        super().__init__(
            do_resize=do_resize,
            vae_scale_factor=vae_scale_factor,
            resample=resample,
            do_normalize=do_normalize,
            do_binarize=do_binarize,
            do_convert_grayscale=do_convert_grayscale,
        )

    @staticmethod
    def classify_height_width_bin(height: int, width: int, ratios: Mapping[str, Any]) -> tuple[int, int]:
        """Of ``ratios`` (aspect ratio as text -> height and width), the size whose ratio is nearest."""
        nearest = min(ratios, key=lambda ratio: abs(float(ratio) - height / width))
        return int(ratios[nearest][0]), int(ratios[nearest][1])

    @staticmethod
    def resize_and_crop_tensor(samples: torch.Tensor, new_width: int, new_height: int) -> torch.Tensor:
        """``(B, C, H, W)`` scaled until it covers the new size, and the middle of that."""
        height, width = samples.shape[2:]
        if (height, width) == (new_height, new_width):
            return samples
        ratio = max(new_height / height, new_width / width)
        size = (int(height * ratio), int(width * ratio))
        samples = F.interpolate(samples, size=size, mode="bilinear", align_corners=False)
        top, left = (size[0] - new_height) // 2, (size[1] - new_width) // 2
        return samples[:, :, top : top + new_height, left : left + new_width]


class InpaintProcessor(ConfigMixin):
    """A picture and its mask, prepared together, and the result put back where it was cut out."""

    config_name = "config.json"

    @register_to_config
    def __init__(
        self,
        do_resize: bool = True,
        vae_scale_factor: int = 8,
        vae_latent_channels: int = 4,
        resample: str = "lanczos",
        reducing_gap: int | None = None,
        do_normalize: bool = True,
        do_binarize: bool = False,
        do_convert_grayscale: bool = False,
        mask_do_normalize: bool = False,
        mask_do_binarize: bool = True,
        mask_do_convert_grayscale: bool = True,
    ) -> None:
        common: dict[str, Any] = {
            "do_resize": do_resize,
            "vae_scale_factor": vae_scale_factor,
            "vae_latent_channels": vae_latent_channels,
            "resample": resample,
            "reducing_gap": reducing_gap,
        }
        self._image_processor = VaeImageProcessor(
            do_normalize=do_normalize,
            do_binarize=do_binarize,
            do_convert_grayscale=do_convert_grayscale,
            **common,
        )
        self._mask_processor = VaeImageProcessor(
            do_normalize=mask_do_normalize,
            do_binarize=mask_do_binarize,
            do_convert_grayscale=mask_do_convert_grayscale,
            **common,
        )

    def preprocess(
        self,
        image: Picture,
        mask: Picture | None = None,
        height: int | None = None,
        width: int | None = None,
        padding_mask_crop: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, dict[str, Any]]:
        """Image and mask as tensors, and what :meth:`postprocess` is to be given.

        Args:
            padding_mask_crop: work on the part around the mask only, with so many pixels more on each side.

        Raises:
            ValueError: ``padding_mask_crop`` without a mask to crop to.
        """
        if mask is None and padding_mask_crop is not None:
            raise ValueError("`padding_mask_crop` crops to a mask: give `mask` too")
        if mask is None:
            return self._image_processor.preprocess(image, height=height, width=width), None, dict(_NO_CROP)
        where: dict[str, Any] = {"height": height, "width": width}
        after = dict(_NO_CROP)
        if padding_mask_crop is not None:
            if height is None or width is None:
                height, width = self._image_processor.get_default_height_width(image, height, width)
                where |= {"height": height, "width": width}
            box = self._image_processor.get_crop_region(mask, width, height, pad=padding_mask_crop)
            where |= {"resize_mode": "fill", "crops_coords": box}
            after = {"crops_coords": box, "original_image": image, "original_mask": mask}
        prepared = self._image_processor.preprocess(image, **where)
        return prepared, self._mask_processor.preprocess(mask, **where), after

    def postprocess(
        self,
        image: torch.Tensor,
        output_type: str = "pil",
        original_image: Picture | None = None,
        original_mask: Picture | None = None,
        crops_coords: tuple[int, int, int, int] | None = None,
    ) -> Any:
        """Pictures of a decoded tensor, laid over the original where a part of it was worked on.

        Raises:
            ValueError: a part without what it is a part of, or as something else than PIL.
        """
        if crops_coords is not None and (original_image is None or original_mask is None):
            raise ValueError("`crops_coords` says where a picture goes: give `original_image` and `original_mask` too")
        if crops_coords is not None and output_type != "pil":
            raise ValueError(f"output_type={output_type!r}: what is laid over a picture is one, 'pil'")
        pictures = self._image_processor.postprocess(image, output_type=output_type)
        if crops_coords is None or original_image is None or original_mask is None:
            return pictures
        overlay = self._image_processor.apply_overlay
        return [overlay(original_mask, original_image, picture, crops_coords) for picture in pictures]
