"""The steps of Stable Diffusion 3 for masks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core.random import Generators
from ...families.control import control_pixels
from ...families.stable_diffusion_3_control import masked_picture
from .control import CountsPictures
from .unet import InsideMask, MaskMethods


class InsideMask3(InsideMask):
    """Pipelines that paint inside a mask."""

    def prepare_mask_latents(  # type: ignore[override]
        self,
        mask: Tensor,
        masked_image: Tensor,
        batch_size: int,
        num_images_per_prompt: int,
        height: int,
        width: int,
        dtype: Any,
        device: Any,
        generator: Generators,
        do_classifier_free_guidance: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """As :meth:`MaskMethods.prepare_mask_latents`, for ``batch_size * num_images_per_prompt`` images."""
        return MaskMethods.prepare_mask_latents(
            self, mask, masked_image, batch_size * num_images_per_prompt, height, width, dtype, device, generator,
            do_classifier_free_guidance,
        )  # fmt: skip


class PreparesImageAndMask(CountsPictures):
    """The control network that paints inside a mask."""

    def prepare_image_with_mask(
        self,
        image: Any,
        mask: Any,
        width: int,
        height: int,
        batch_size: int,
        num_images_per_prompt: int,
        device: Any,
        dtype: Any,
        do_classifier_free_guidance: bool = False,
        guess_mode: bool = False,
    ) -> Tensor:
        """Latents of the picture without what the mask covers, and the mask as one more channel; (B, 17, h, w)."""
        where = (height, width, batch_size, torch.device(device), dtype)
        pixels = control_pixels(image, self.image_processor, *where)
        holes = control_pixels(mask, self.mask_processor, *where)
        z = masked_picture(self.vae, self.controlnet.config, pixels, holes)
        return torch.cat([z] * 2) if do_classifier_free_guidance and not guess_mode else z
