"""The classic faces of Latent Consistency Models."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..families.latent_consistency import LATENT_CONSISTENCY
from .methods.checks import checks
from .methods.unet import FromImage, FromNoise
from .stable_diffusion import StableDiffusionBase


class LatentConsistencyBase(StableDiffusionBase):
    """What the faces of Latent Consistency Models share."""

    family = LATENT_CONSISTENCY
    model_cpu_offload_seq = "text_encoder->unet->vae"
    _scheduler_settings = {}
    _callback_tensor_inputs = ["latents", "denoised", "prompt_embeds", "w_embedding"]

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Never: the guidance scale is an input of the network."""
        return False


class LatentConsistencyModelPipeline(FromNoise, LatentConsistencyBase):
    """Text to image in a few steps."""

    task = "text2image"
    check_inputs = checks(
        "prompt, height, width, callback_steps, prompt_embeds=None, ip_adapter_image=None, "
        "ip_adapter_image_embeds=None, callback_on_step_end_tensor_inputs=None"
    )

    def __call__(
        self,
        prompt: Any = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 4,
        original_inference_steps: int | None = None,
        timesteps: list[int] | None = None,
        guidance_scale: float = 8.5,
        num_images_per_prompt: int | None = 1,
        generator: Any = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        ip_adapter_image: Any = None,
        ip_adapter_image_embeds: list[Tensor] | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        clip_skip: int | None = None,
        callback_on_step_end: Any = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006
        **kwargs: Any,
    ) -> Any:
        """Make pictures of ``prompt``."""
        return self._generate(locals())


class LatentConsistencyModelImg2ImgPipeline(FromImage, LatentConsistencyBase):
    """Image to image in a few steps."""

    task = "image2image"
    check_inputs = checks(
        "prompt, strength, callback_steps, prompt_embeds=None, ip_adapter_image=None, "
        "ip_adapter_image_embeds=None, callback_on_step_end_tensor_inputs=None"
    )

    def __call__(
        self,
        prompt: Any = None,
        image: Any = None,
        num_inference_steps: int = 4,
        strength: float = 0.8,
        original_inference_steps: int | None = None,
        timesteps: list[int] | None = None,
        guidance_scale: float = 8.5,
        num_images_per_prompt: int | None = 1,
        generator: Any = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        ip_adapter_image: Any = None,
        ip_adapter_image_embeds: list[Tensor] | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        clip_skip: int | None = None,
        callback_on_step_end: Any = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006
        **kwargs: Any,
    ) -> Any:
        """Repaint ``image`` as ``prompt`` says, keeping less of it the higher ``strength`` is."""
        return self._generate(locals())
