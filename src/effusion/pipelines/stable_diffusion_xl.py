"""The classic faces of Stable Diffusion XL, base and refiner."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..blocks.watermark import watermarker
from ..core.optional import is_available
from ..families import stable_diffusion_xl as sdxl
from .facts import fact, live, native_size
from .methods.checks import checks
from .methods.clip import ScoredSizeIds, SizeIds, XLMethods
from .methods.unet import ByStrengthOrFraction, FromImageOrLatents, FromNoise, InsideMaskOrLatents
from .mixins import StableDiffusionMixin
from .outputs import StableDiffusionXLPipelineOutput

Size = tuple[int, int]


class StableDiffusionXLBase(StableDiffusionMixin, XLMethods):
    """What the faces of Stable Diffusion XL share: components and ``encode_prompt``."""

    family = sdxl.STABLE_DIFFUSION_XL
    output_class = StableDiffusionXLPipelineOutput
    model_cpu_offload_seq = "text_encoder->text_encoder_2->image_encoder->unet->vae"
    _optional_components = [
        "tokenizer",
        "tokenizer_2",
        "text_encoder",
        "text_encoder_2",
        "image_encoder",
        "feature_extractor",
    ]
    _callback_tensor_inputs = ["latents", "prompt_embeds", "add_text_embeds", "add_time_ids"]

    denoising_start = live("denoising_start", "The part of the run that another pipeline has done.")
    denoising_end = live("denoising_end", "The part of the run after which another pipeline goes on.")

    @fact
    def watermark(self) -> Any:
        """What marks the pictures: if ``add_watermarker`` says so or, where it says nothing, if the package is there.

        ``None``, or anything with a method ``apply_watermark``, may be assigned.
        """
        wanted = self.config.get("add_watermarker")
        wanted = is_available("imwatermark") if wanted is None else wanted
        return watermarker() if wanted else None

    def _context(self) -> dict[str, Any]:
        rehearsing = "_rehearsing" in self.__dict__  # for a plan: pixels without values
        return {**super()._context(), "watermark": None if rehearsing else self.watermark}

    def encode_prompt(
        self,
        prompt: Any,
        prompt_2: Any = None,
        device: Any = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: Any = None,
        negative_prompt_2: Any = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Prompt, negative prompt (B, L, D each), and the pooled vectors of both (B, D each)."""
        with torch.no_grad():
            conds = sdxl.encode(
                self.components, torch.device(device or self._execution_device), self.config, prompt, prompt_2,
                negative_prompt, negative_prompt_2, prompt_embeds, negative_prompt_embeds, pooled_prompt_embeds,
                negative_pooled_prompt_embeds, num_images_per_prompt, do_classifier_free_guidance, clip_skip,
            )["conds"]  # fmt: skip
        positive, negative = conds["positive"], conds.get("negative")
        if negative is None:
            return positive.tokens, negative_prompt_embeds, positive.pooled, negative_pooled_prompt_embeds
        return positive.tokens, negative.tokens, positive.pooled, negative.pooled


class StableDiffusionXLPipeline(FromNoise, SizeIds, StableDiffusionXLBase):
    """Text to image with Stable Diffusion XL; ``denoising_end`` hands over to a refiner."""

    task = "text2image"
    default_sample_size = native_size("unet")
    check_inputs = checks(
        "prompt, prompt_2, height, width, callback_steps, negative_prompt=None, negative_prompt_2=None, "
        "prompt_embeds=None, negative_prompt_embeds=None, pooled_prompt_embeds=None, "
        "negative_pooled_prompt_embeds=None, ip_adapter_image=None, ip_adapter_image_embeds=None, "
        "callback_on_step_end_tensor_inputs=None"
    )

    def __init__(
        self,
        vae: Any,
        text_encoder: Any,
        text_encoder_2: Any,
        tokenizer: Any,
        tokenizer_2: Any,
        unet: Any,
        scheduler: Any,
        image_encoder: Any = None,
        feature_extractor: Any = None,
        force_zeros_for_empty_prompt: bool = True,
        add_watermarker: bool | None = None,
    ) -> None:
        super().__init__()
        self._register(locals())

    def __call__(
        self,
        prompt: Any = None,
        prompt_2: Any = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        denoising_end: float | None = None,
        guidance_scale: float = 5.0,
        negative_prompt: Any = None,
        negative_prompt_2: Any = None,
        num_images_per_prompt: int | None = 1,
        eta: float = 0.0,
        generator: Any = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        ip_adapter_image: Any = None,
        ip_adapter_image_embeds: list[Tensor] | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        guidance_rescale: float = 0.0,
        original_size: Size | None = None,
        crops_coords_top_left: Size = (0, 0),
        target_size: Size | None = None,
        negative_original_size: Size | None = None,
        negative_crops_coords_top_left: Size = (0, 0),
        negative_target_size: Size | None = None,
        clip_skip: int | None = None,
        callback_on_step_end: Any = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006
        **kwargs: Any,
    ) -> Any:
        """Make pictures of ``prompt``; returns :class:`StableDiffusionXLPipelineOutput`."""
        return self._generate(locals())


class StableDiffusionXLImg2ImgPipeline(FromImageOrLatents, ByStrengthOrFraction, ScoredSizeIds, StableDiffusionXLBase):
    """Image to image with Stable Diffusion XL; with ``denoising_start`` it refines half-denoised latents."""

    task = "image2image"
    check_inputs = checks(
        "prompt, prompt_2, strength, num_inference_steps, callback_steps, negative_prompt=None, "
        "negative_prompt_2=None, prompt_embeds=None, negative_prompt_embeds=None, ip_adapter_image=None, "
        "ip_adapter_image_embeds=None, callback_on_step_end_tensor_inputs=None"
    )

    def __init__(
        self,
        vae: Any,
        text_encoder: Any,
        text_encoder_2: Any,
        tokenizer: Any,
        tokenizer_2: Any,
        unet: Any,
        scheduler: Any,
        image_encoder: Any = None,
        feature_extractor: Any = None,
        requires_aesthetics_score: bool = False,
        force_zeros_for_empty_prompt: bool = True,
        add_watermarker: bool | None = None,
    ) -> None:
        super().__init__()
        self._register(locals())

    def __call__(
        self,
        prompt: Any = None,
        prompt_2: Any = None,
        image: Any = None,
        strength: float = 0.3,
        num_inference_steps: int = 50,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        denoising_start: float | None = None,
        denoising_end: float | None = None,
        guidance_scale: float = 5.0,
        negative_prompt: Any = None,
        negative_prompt_2: Any = None,
        num_images_per_prompt: int | None = 1,
        eta: float = 0.0,
        generator: Any = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        ip_adapter_image: Any = None,
        ip_adapter_image_embeds: list[Tensor] | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        guidance_rescale: float = 0.0,
        original_size: Size | None = None,
        crops_coords_top_left: Size = (0, 0),
        target_size: Size | None = None,
        negative_original_size: Size | None = None,
        negative_crops_coords_top_left: Size = (0, 0),
        negative_target_size: Size | None = None,
        aesthetic_score: float = 6.0,
        negative_aesthetic_score: float = 2.5,
        clip_skip: int | None = None,
        callback_on_step_end: Any = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006
        **kwargs: Any,
    ) -> Any:
        """Repaint ``image`` as ``prompt`` says, keeping less of it the higher ``strength`` is."""
        return self._generate(locals())


class StableDiffusionXLInpaintPipeline(InsideMaskOrLatents, ScoredSizeIds, StableDiffusionXLBase):
    """Inpainting with Stable Diffusion XL, with 9-channel networks and with ordinary ones."""

    task = "inpaint"
    _callback_tensor_inputs = [*StableDiffusionXLBase._callback_tensor_inputs, "mask", "masked_image_latents"]
    check_inputs = checks(
        "prompt, prompt_2, image, mask_image, height, width, strength, callback_steps, output_type, "
        "negative_prompt=None, negative_prompt_2=None, prompt_embeds=None, negative_prompt_embeds=None, "
        "ip_adapter_image=None, ip_adapter_image_embeds=None, callback_on_step_end_tensor_inputs=None, "
        "padding_mask_crop=None"
    )

    def __init__(
        self,
        vae: Any,
        text_encoder: Any,
        text_encoder_2: Any,
        tokenizer: Any,
        tokenizer_2: Any,
        unet: Any,
        scheduler: Any,
        image_encoder: Any = None,
        feature_extractor: Any = None,
        requires_aesthetics_score: bool = False,
        force_zeros_for_empty_prompt: bool = True,
        add_watermarker: bool | None = None,
    ) -> None:
        super().__init__()
        self._register(locals())

    def __call__(
        self,
        prompt: Any = None,
        prompt_2: Any = None,
        image: Any = None,
        mask_image: Any = None,
        masked_image_latents: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        padding_mask_crop: int | None = None,
        strength: float = 0.9999,
        num_inference_steps: int = 50,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        denoising_start: float | None = None,
        denoising_end: float | None = None,
        guidance_scale: float = 7.5,
        negative_prompt: Any = None,
        negative_prompt_2: Any = None,
        num_images_per_prompt: int | None = 1,
        eta: float = 0.0,
        generator: Any = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        ip_adapter_image: Any = None,
        ip_adapter_image_embeds: list[Tensor] | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        guidance_rescale: float = 0.0,
        original_size: Size | None = None,
        crops_coords_top_left: Size = (0, 0),
        target_size: Size | None = None,
        negative_original_size: Size | None = None,
        negative_crops_coords_top_left: Size = (0, 0),
        negative_target_size: Size | None = None,
        aesthetic_score: float = 6.0,
        negative_aesthetic_score: float = 2.5,
        clip_skip: int | None = None,
        callback_on_step_end: Any = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006
        **kwargs: Any,
    ) -> Any:
        """Paint ``prompt`` where ``mask_image`` is white, keeping the rest of ``image``."""
        return self._generate(locals())
