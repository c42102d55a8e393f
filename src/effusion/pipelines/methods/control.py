"""The steps that pipelines with control networks have for their pictures."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...blocks.images import VaeImageProcessor, is_valid_image, is_valid_image_imagelist
from ...blocks.text import check_prompts
from ...families.control import control_pixels
from ...families.stable_diffusion_control import control_processor
from ..base import DiffusionPipeline


class CountsPictures(DiffusionPipeline):
    """Pipelines that take one control picture, or one for each prompt."""

    def check_image(self, image: Any, prompt: Any, prompt_embeds: Tensor | None) -> None:
        """Raise ``ValueError`` unless there is one control picture, or one for each prompt."""
        if not is_valid_image_imagelist(image):
            raise ValueError(
                f"a PIL image, numpy array, torch tensor or a list of one of them, not {type(image).__name__}"
            )
        single = is_valid_image(image)
        count, prompts = 1 if single else len(image), check_prompts(prompt, prompt_embeds if prompt is None else None)
        if count not in (1, prompts):
            raise ValueError(f"{count} control pictures for {prompts} prompts: give one, or one for each")


class ControlPictures(CountsPictures):
    """Pipelines of Stable Diffusion with control networks."""

    @property
    def control_image_processor(self) -> VaeImageProcessor:
        return control_processor(self.family, self.components)

    def _control_rows(
        self, image: Any, size: tuple[int, int], batch_size: int, per_prompt: int, device: Any, dtype: Any, twice: bool,
        crop: Any = None, mode: str = "default",
    ) -> Tensor:  # fmt: skip
        pixels = self.control_image_processor.preprocess(image, *size, mode, crop).to(torch.float32)
        rows = pixels.repeat_interleave(batch_size if pixels.shape[0] == 1 else per_prompt, dim=0)
        rows = rows.to(device=device, dtype=dtype)
        return torch.cat([rows] * 2) if twice else rows


class PreparesImage(ControlPictures):
    """Those whose only picture is the control picture."""

    def prepare_image(
        self,
        image: Any,
        width: int,
        height: int,
        batch_size: int,
        num_images_per_prompt: int,
        device: Any,
        dtype: Any,
        do_classifier_free_guidance: bool = False,
        guess_mode: bool = False,
    ) -> Tensor:
        """Control pictures in [0, 1], a row for each image of ``batch_size``, twice with guidance; (B, 3, H, W)."""
        twice = do_classifier_free_guidance and not guess_mode
        return self._control_rows(image, (height, width), batch_size, num_images_per_prompt, device, dtype, twice)


class PreparesControlImage(ControlPictures):
    """Those that start from another picture."""

    def prepare_control_image(
        self,
        image: Any,
        width: int,
        height: int,
        batch_size: int,
        num_images_per_prompt: int,
        device: Any,
        dtype: Any,
        do_classifier_free_guidance: bool = False,
        guess_mode: bool = False,
    ) -> Tensor:
        """Control pictures in [0, 1], a row for each image of ``batch_size``, twice with guidance; (B, 3, H, W)."""
        twice = do_classifier_free_guidance and not guess_mode
        return self._control_rows(image, (height, width), batch_size, num_images_per_prompt, device, dtype, twice)


class PreparesCroppedControlImage(ControlPictures):
    """Those that paint inside a mask."""

    def prepare_control_image(
        self,
        image: Any,
        width: int,
        height: int,
        batch_size: int,
        num_images_per_prompt: int,
        device: Any,
        dtype: Any,
        crops_coords: Any,
        resize_mode: str,
        do_classifier_free_guidance: bool = False,
        guess_mode: bool = False,
    ) -> Tensor:
        """Control pictures, cut to ``crops_coords``; see :meth:`PreparesControlImage.prepare_control_image`."""
        twice, size = do_classifier_free_guidance and not guess_mode, (height, width)
        return self._control_rows(
            image, size, batch_size, num_images_per_prompt, device, dtype, twice, crops_coords, resize_mode
        )


class PreparesTensor(DiffusionPipeline):
    """Pipelines whose control pictures go through the VAE: they are in [-1, 1], and tensors pass as they are."""

    def prepare_image(
        self,
        image: Any,
        width: int,
        height: int,
        batch_size: int,
        num_images_per_prompt: int,
        device: Any,
        dtype: Any,
        do_classifier_free_guidance: bool = False,
        guess_mode: bool = False,
    ) -> Tensor:
        """Control pictures, a row for each image of ``batch_size``, twice with guidance; (B, 3, H, W)."""
        rows = control_pixels(image, self.image_processor, height, width, batch_size, device, dtype)
        return torch.cat([rows] * 2) if do_classifier_free_guidance and not guess_mode else rows
