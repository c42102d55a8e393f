"""What pipelines with CLIP beside a UNet do with guidance, pictures and prompts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...blocks.decode import check_safety
from ...blocks.images import VaeImageProcessor
from ...blocks.latents import decode_to_pixels
from ...blocks.timesteps import guidance_embedding
from ...families.stable_diffusion_xl_sizes import check_ids
from ..base import DiffusionPipeline
from .unet import StepMethods

Size = tuple[int, int]


class ImageEncoding(DiffusionPipeline):
    """Pipelines with CLIP's image encoder, for IP-Adapters."""

    def encode_image(
        self, image: Any, device: Any, num_images_per_prompt: int, output_hidden_states: bool | None = None
    ) -> tuple[Tensor, Tensor]:
        """Embeddings of pictures and of nothing; with ``output_hidden_states`` the last but one layer's states."""
        pixels = see(self, image, device)
        if not output_hidden_states:
            embeds = self.image_encoder(pixels).image_embeds.repeat_interleave(num_images_per_prompt, dim=0)
            return embeds, torch.zeros_like(embeds)
        states = [
            self.image_encoder(x, output_hidden_states=True).hidden_states[-2]
            for x in (pixels, torch.zeros_like(pixels))
        ]
        positive, negative = (x.repeat_interleave(num_images_per_prompt, dim=0) for x in states)
        return positive, negative


def see(pipe: Any, image: Any, device: Any) -> Tensor:
    """Pictures as the image encoder takes them."""
    dtype = next(pipe.image_encoder.parameters()).dtype
    if not torch.is_tensor(image):
        image = pipe.feature_extractor(image, return_tensors="pt").pixel_values
    return image.to(device=device, dtype=dtype)


class UNetMethods(StepMethods, ImageEncoding):
    """What all of them have."""

    def get_guidance_scale_embedding(
        self, w: Tensor, embedding_dim: int = 512, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """See :func:`~effusion.blocks.timesteps.guidance_embedding`."""
        return guidance_embedding(w, embedding_dim, dtype)


class StableDiffusionMethods(UNetMethods):
    """What those of Stable Diffusion 1.x and 2.x have."""

    def run_safety_checker(self, image: Any, device: Any, dtype: Any) -> tuple[Any, list[bool] | None]:
        """Pictures, blacked out where the safety checker says so, and its flags."""
        return check_safety(self.components, image, self.image_processor, device, dtype)

    def decode_latents(self, latents: Tensor) -> Any:
        """Latents to arrays (B, H, W, 3) in [0, 1]."""
        pixels = decode_to_pixels(self.family, self.vae, latents)
        return VaeImageProcessor.pt_to_numpy(VaeImageProcessor.denormalize(pixels))

    def _encode_prompt(
        self,
        prompt: Any,
        device: Any,
        num_images_per_prompt: int,
        do_classifier_free_guidance: bool,
        negative_prompt: Any = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        lora_scale: float | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The embeddings of ``encode_prompt`` as one batch, the negative ones first."""
        positive, negative = self.encode_prompt(
            prompt, device, num_images_per_prompt, do_classifier_free_guidance, negative_prompt, prompt_embeds,
            negative_prompt_embeds, lora_scale, **kwargs,
        )  # fmt: skip
        return positive if negative is None else torch.cat([negative, positive])


class XLMethods(UNetMethods):
    """What those of Stable Diffusion XL have."""

    def upcast_vae(self) -> None:
        """Let the VAE compute in float32."""
        self.vae.to(dtype=torch.float32)


class SizeIds(DiffusionPipeline):
    """Pipelines of XL that start from noise."""

    def _get_add_time_ids(
        self,
        original_size: Size,
        crops_coords_top_left: Size,
        target_size: Size,
        dtype: Any,
        text_encoder_projection_dim: int | None = None,
    ) -> Tensor:
        """The numbers of the micro-conditioning; (1, 6)."""
        ids = [*original_size, *crops_coords_top_left, *target_size]
        check_ids(self.unet, len(ids), text_encoder_projection_dim)
        return torch.tensor([ids], dtype=dtype)


class ScoredSizeIds(DiffusionPipeline):
    """Pipelines of XL that start from a picture, refiners among them."""

    def _get_add_time_ids(
        self,
        original_size: Size,
        crops_coords_top_left: Size,
        target_size: Size,
        aesthetic_score: float,
        negative_aesthetic_score: float,
        negative_original_size: Size,
        negative_crops_coords_top_left: Size,
        negative_target_size: Size,
        dtype: Any,
        text_encoder_projection_dim: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The numbers of the micro-conditioning of both branches; (1, 6) each, of a refiner (1, 5)."""
        if self.config.get("requires_aesthetics_score", False):
            ids = [*original_size, *crops_coords_top_left, aesthetic_score]
            negative = [*negative_original_size, *negative_crops_coords_top_left, negative_aesthetic_score]
        else:
            ids = [*original_size, *crops_coords_top_left, *target_size]
            negative = [*negative_original_size, *crops_coords_top_left, *negative_target_size]
        check_ids(self.unet, len(ids), text_encoder_projection_dim)
        return torch.tensor([ids], dtype=dtype), torch.tensor([negative], dtype=dtype)


class ScoredIds(DiffusionPipeline):
    """Those that know no sizes of the negative branch."""

    def _get_add_time_ids(
        self,
        original_size: Size,
        crops_coords_top_left: Size,
        target_size: Size,
        aesthetic_score: float,
        negative_aesthetic_score: float,
        dtype: Any,
        text_encoder_projection_dim: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`ScoredSizeIds._get_add_time_ids`, with the same sizes for both branches."""
        sizes = (original_size, crops_coords_top_left, target_size)
        return ScoredSizeIds._get_add_time_ids(
            self,  # type: ignore[arg-type]
            *sizes, aesthetic_score, negative_aesthetic_score, *sizes, dtype, text_encoder_projection_dim,
        )  # fmt: skip
