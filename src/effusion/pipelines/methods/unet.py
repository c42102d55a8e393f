"""The steps of Stable Diffusion 1.x, 2.x and XL."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from ...blocks.inpaint import image_latents_of
from ...blocks.latents import check_generators, clean_latents, encode_pixels, match_batch
from ...blocks.timesteps import first_sigma, noised, start_at_fraction, start_at_strength
from ...core.random import Generators, randn_tensor
from ..base import DiffusionPipeline

Steps = tuple[Tensor, int]


class StepMethods(DiffusionPipeline):
    """What any pipeline with a diffusion scheduler has."""

    def prepare_extra_step_kwargs(self, generator: Any, eta: Any) -> dict[str, Any]:
        """Those of ``eta`` and ``generator`` that the scheduler's ``step`` takes."""
        taken = inspect.signature(self.scheduler.step).parameters
        return {name: value for name, value in (("eta", eta), ("generator", generator)) if name in taken}


class FromNoise(DiffusionPipeline):
    """Pipelines that start from noise."""

    def prepare_latents(
        self,
        batch_size: int,
        num_channels_latents: int,
        height: int,
        width: int,
        dtype: Any,
        device: Any,
        generator: Generators,
        latents: Tensor | None = None,
    ) -> Tensor:
        """Noise, or ``latents``, at the first noise level; (B, C, h, w)."""
        check_generators(generator, batch_size)
        if latents is None:
            latents = _noise(self, batch_size, num_channels_latents, height, width, generator, device, dtype)
        return latents.to(device) * first_sigma(self.scheduler)


def _noise(
    pipe: Any, batch: int, channels: int, height: int, width: int, generator: Generators, device: Any, dtype: Any
) -> Tensor:
    shape = (batch, channels, int(height) // pipe.vae_scale_factor, int(width) // pipe.vae_scale_factor)
    return randn_tensor(shape, generator=generator, device=torch.device(device), dtype=dtype)


def noised_image(
    pipe: Any, image: Tensor, timestep: Any, batch: int, dtype: Any, device: Any, generator: Generators, noisy: bool
) -> Tensor:
    """The latents of pictures at the noise level of ``timestep``, or clean."""
    clean = clean_latents(pipe.family, pipe.components, image.to(device=device, dtype=dtype), batch, generator)
    if not noisy:
        return clean
    noise = randn_tensor(clean.shape, generator=generator, device=torch.device(device), dtype=dtype)
    return noised(pipe.scheduler, clean, noise, timestep)


class ByStrength(DiffusionPipeline):
    """Pipelines that do a part of the schedule."""

    def get_timesteps(self, num_inference_steps: int, strength: float, device: Any) -> Steps:
        """The last ``strength`` part of the schedule that is set, and how many steps it has."""
        return start_at_strength(self.scheduler, num_inference_steps, strength)


class ByStrengthOrFraction(DiffusionPipeline):
    """The same with a fraction of the denoising to start at instead."""

    def get_timesteps(
        self, num_inference_steps: int, strength: float, device: Any, denoising_start: float | None = None
    ) -> Steps:
        """The last ``strength`` part of the schedule that is set, or what comes after ``denoising_start``."""
        if denoising_start is not None:
            return start_at_fraction(self.scheduler, denoising_start)
        return start_at_strength(self.scheduler, num_inference_steps, strength)


class FromImage(ByStrength):
    """Pipelines that start from a picture."""

    def prepare_latents(
        self,
        image: Tensor,
        timestep: Any,
        batch_size: int,
        num_images_per_prompt: int,
        dtype: Any,
        device: Any,
        generator: Generators = None,
    ) -> Tensor:
        """The latents of ``image`` (pixels in [-1, 1]) at the noise level of ``timestep`` (B,)."""
        batch = batch_size * num_images_per_prompt
        return noised_image(self, image, timestep, batch, dtype, device, generator, True)


class FromImageOrLatents(DiffusionPipeline):
    """The same with pictures that may be half denoised already."""

    def prepare_latents(
        self,
        image: Tensor,
        timestep: Any,
        batch_size: int,
        num_images_per_prompt: int,
        dtype: Any,
        device: Any,
        generator: Generators = None,
        add_noise: bool = True,
    ) -> Tensor:
        """The latents of ``image`` (pixels in [-1, 1]) at the noise level of ``timestep`` (B,), or clean."""
        batch = batch_size * num_images_per_prompt
        return noised_image(self, image, timestep, batch, dtype, device, generator, add_noise)


class MaskMethods(DiffusionPipeline):
    """Pipelines that paint inside a mask."""

    def _encode_vae_image(self, image: Tensor, generator: Generators) -> Tensor:
        """Normalised latents of pixels in [-1, 1]."""
        return encode_pixels(self.family, self.vae, image, generator)

    def _start_inside(
        self, batch: int, channels: int, height: int, width: int, dtype: Any, device: Any, generator: Generators,
        latents: Tensor | None, image: Tensor | None, timestep: Any, full: bool, noisy: bool, wanted: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
        """Start latents, their noise and, where ``wanted`` or needed, the picture's latents."""
        check_generators(generator, batch)
        known = None
        needed = latents is None and not full
        if needed and (image is None or timestep is None):
            raise ValueError("at less than full strength `prepare_latents` needs `image` and `timestep`")
        if image is not None and (wanted or needed):
            known = image_latents_of(self.family, self.components, image, batch, generator, device, dtype)
        noise = latents
        if latents is None or not noisy:
            noise = _noise(self, batch, channels, height, width, generator, device, dtype)
        assert noise is not None
        noise = noise.to(device)
        if not noisy:
            assert known is not None
            return known.to(device), noise, known
        if latents is not None or full:
            return noise * first_sigma(self.scheduler), noise, known
        assert known is not None
        return noised(self.scheduler, known, noise, timestep), noise, known

    def prepare_mask_latents(
        self,
        mask: Tensor,
        masked_image: Tensor | None,
        batch_size: int,
        height: int,
        width: int,
        dtype: Any,
        device: Any,
        generator: Generators,
        do_classifier_free_guidance: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """The mask (B, 1, h, w) and the masked picture's latents (B, C, h, w), once for each branch of guidance."""
        copies = 2 if do_classifier_free_guidance else 1
        size = (height // self.vae_scale_factor, width // self.vae_scale_factor)
        small = torch.nn.functional.interpolate(mask, size=size).to(device=device, dtype=dtype)
        small = match_batch(small, batch_size, "masks").repeat(copies, 1, 1, 1)
        if masked_image is None:
            return small, None
        args = (masked_image, batch_size, generator, device, dtype)
        return small, image_latents_of(self.family, self.components, *args).repeat(copies, 1, 1, 1)


class InsideMask(ByStrength, MaskMethods):
    """Pipelines of Stable Diffusion that paint inside a mask."""

    def prepare_latents(
        self,
        batch_size: int,
        num_channels_latents: int,
        height: int,
        width: int,
        dtype: Any,
        device: Any,
        generator: Generators,
        latents: Tensor | None = None,
        image: Tensor | None = None,
        timestep: Any = None,
        is_strength_max: bool = True,
        return_noise: bool = False,
        return_image_latents: bool = False,
    ) -> tuple[Tensor, ...]:
        """Start latents, then what is asked for: their noise, the picture's latents."""
        start, noise, known = self._start_inside(
            batch_size, num_channels_latents, height, width, dtype, device, generator, latents, image, timestep,
            is_strength_max, True, return_image_latents,
        )  # fmt: skip
        return _asked(start, (return_noise, noise), (return_image_latents, known))


class InsideMaskOrLatents(ByStrengthOrFraction, MaskMethods):
    """The same with pictures that may be half denoised already."""

    def prepare_latents(
        self,
        batch_size: int,
        num_channels_latents: int,
        height: int,
        width: int,
        dtype: Any,
        device: Any,
        generator: Generators,
        latents: Tensor | None = None,
        image: Tensor | None = None,
        timestep: Any = None,
        is_strength_max: bool = True,
        add_noise: bool = True,
        return_noise: bool = False,
        return_image_latents: bool = False,
    ) -> tuple[Tensor, ...]:
        """Start latents, then what is asked for: their noise, the picture's latents."""
        start, noise, known = self._start_inside(
            batch_size, num_channels_latents, height, width, dtype, device, generator, latents, image, timestep,
            is_strength_max, add_noise, return_image_latents or not add_noise,
        )  # fmt: skip
        return _asked(start, (return_noise, noise), (return_image_latents, known))


def _asked(start: Tensor, *more: tuple[bool, Any]) -> tuple[Any, ...]:
    return (start, *(value for wanted, value in more if wanted))
