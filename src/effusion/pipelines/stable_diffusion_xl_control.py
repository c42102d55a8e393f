"""The classic faces of Stable Diffusion XL with control networks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .base import DiffusionPipeline
from .methods.checks import checks
from .methods.clip import ScoredIds, ScoredSizeIds, SizeIds
from .methods.control import PreparesControlImage, PreparesCroppedControlImage, PreparesImage
from .methods.unet import ByStrength, FromImageOrLatents, FromNoise, InsideMaskOrLatents
from .stable_diffusion_control import together
from .stable_diffusion_xl import StableDiffusionXLBase

Size = tuple[int, int]


class StableDiffusionXLControlNetBase(StableDiffusionXLBase):
    """What the faces with control networks share."""

    _callback_tensor_inputs = [
        *StableDiffusionXLBase._callback_tensor_inputs,
        "negative_prompt_embeds",
        "negative_pooled_prompt_embeds",
    ]


class StableDiffusionXLControlNetPipeline(FromNoise, SizeIds, PreparesImage, StableDiffusionXLControlNetBase):
    """Text to image with Stable Diffusion XL and control networks."""

    task = "controlnet"
    _callback_tensor_inputs = [
        *StableDiffusionXLControlNetBase._callback_tensor_inputs,
        "negative_add_time_ids",
        "image",
    ]
    check_inputs = checks(
        "prompt, prompt_2, image, callback_steps, negative_prompt=None, negative_prompt_2=None, "
        "prompt_embeds=None, negative_prompt_embeds=None, pooled_prompt_embeds=None, ip_adapter_image=None, "
        "ip_adapter_image_embeds=None, negative_pooled_prompt_embeds=None, controlnet_conditioning_scale=1.0, "
        "control_guidance_start=0.0, control_guidance_end=1.0, callback_on_step_end_tensor_inputs=None"
    )

    def __init__(
        self,
        vae: Any,
        text_encoder: Any,
        text_encoder_2: Any,
        tokenizer: Any,
        tokenizer_2: Any,
        unet: Any,
        controlnet: Any,
        scheduler: Any,
        force_zeros_for_empty_prompt: bool = True,
        add_watermarker: bool | None = None,
        feature_extractor: Any = None,
        image_encoder: Any = None,
    ) -> None:
        DiffusionPipeline.__init__(self)
        controlnet = together(controlnet)
        self._register(locals())

    def __call__(
        self,
        prompt: Any = None,
        prompt_2: Any = None,
        image: Any = None,
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
        controlnet_conditioning_scale: float | list[float] = 1.0,
        guess_mode: bool = False,
        control_guidance_start: float | list[float] = 0.0,
        control_guidance_end: float | list[float] = 1.0,
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
        """Make pictures of ``prompt`` that follow the control picture ``image``."""
        return self._generate(locals())


class StableDiffusionXLControlNetImg2ImgPipeline(
    FromImageOrLatents, ByStrength, ScoredSizeIds, PreparesControlImage, StableDiffusionXLControlNetBase
):
    """Image to image with Stable Diffusion XL and control networks."""

    task = "controlnet_image2image"
    _callback_tensor_inputs = [
        *StableDiffusionXLControlNetBase._callback_tensor_inputs,
        "add_neg_time_ids",
        "control_image",
    ]
    check_inputs = checks(
        "prompt, prompt_2, image, strength, num_inference_steps, callback_steps, negative_prompt=None, "
        "negative_prompt_2=None, prompt_embeds=None, negative_prompt_embeds=None, pooled_prompt_embeds=None, "
        "negative_pooled_prompt_embeds=None, ip_adapter_image=None, ip_adapter_image_embeds=None, "
        "controlnet_conditioning_scale=1.0, control_guidance_start=0.0, control_guidance_end=1.0, "
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
        controlnet: Any,
        scheduler: Any,
        requires_aesthetics_score: bool = False,
        force_zeros_for_empty_prompt: bool = True,
        add_watermarker: bool | None = None,
        feature_extractor: Any = None,
        image_encoder: Any = None,
    ) -> None:
        DiffusionPipeline.__init__(self)
        controlnet = together(controlnet)
        self._register(locals())

    def __call__(
        self,
        prompt: Any = None,
        prompt_2: Any = None,
        image: Any = None,
        control_image: Any = None,
        height: int | None = None,
        width: int | None = None,
        strength: float = 0.8,
        num_inference_steps: int = 50,
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
        controlnet_conditioning_scale: float | list[float] = 0.8,
        guess_mode: bool = False,
        control_guidance_start: float | list[float] = 0.0,
        control_guidance_end: float | list[float] = 1.0,
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
        """Repaint ``image`` as ``prompt`` says, following ``control_image``."""
        return self._generate(locals())


class StableDiffusionXLControlNetInpaintPipeline(
    InsideMaskOrLatents, ScoredIds, PreparesCroppedControlImage, StableDiffusionXLControlNetBase
):
    """Inpainting with Stable Diffusion XL and control networks."""

    task = "controlnet_inpaint"
    model_cpu_offload_seq = "text_encoder->text_encoder_2->unet->vae"
    _callback_tensor_inputs = [
        *StableDiffusionXLControlNetBase._callback_tensor_inputs,
        "add_neg_time_ids",
        "control_image",
        "mask",
        "masked_image_latents",
    ]
    check_inputs = checks(
        "prompt, prompt_2, image, mask_image, strength, num_inference_steps, callback_steps, output_type, "
        "negative_prompt=None, negative_prompt_2=None, prompt_embeds=None, negative_prompt_embeds=None, "
        "ip_adapter_image=None, ip_adapter_image_embeds=None, pooled_prompt_embeds=None, "
        "negative_pooled_prompt_embeds=None, controlnet_conditioning_scale=1.0, control_guidance_start=0.0, "
        "control_guidance_end=1.0, callback_on_step_end_tensor_inputs=None, padding_mask_crop=None"
    )

    def __init__(
        self,
        vae: Any,
        text_encoder: Any,
        text_encoder_2: Any,
        tokenizer: Any,
        tokenizer_2: Any,
        unet: Any,
        controlnet: Any,
        scheduler: Any,
        requires_aesthetics_score: bool = False,
        force_zeros_for_empty_prompt: bool = True,
        add_watermarker: bool | None = None,
        feature_extractor: Any = None,
        image_encoder: Any = None,
    ) -> None:
        DiffusionPipeline.__init__(self)
        controlnet = together(controlnet)
        self._register(locals())

    def __call__(
        self,
        prompt: Any = None,
        prompt_2: Any = None,
        image: Any = None,
        mask_image: Any = None,
        control_image: Any = None,
        height: int | None = None,
        width: int | None = None,
        padding_mask_crop: int | None = None,
        strength: float = 0.9999,
        num_inference_steps: int = 50,
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
        ip_adapter_image: Any = None,
        ip_adapter_image_embeds: list[Tensor] | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        controlnet_conditioning_scale: float | list[float] = 1.0,
        guess_mode: bool = False,
        control_guidance_start: float | list[float] = 0.0,
        control_guidance_end: float | list[float] = 1.0,
        guidance_rescale: float = 0.0,
        original_size: Size | None = None,
        crops_coords_top_left: Size = (0, 0),
        target_size: Size | None = None,
        aesthetic_score: float = 6.0,
        negative_aesthetic_score: float = 2.5,
        clip_skip: int | None = None,
        callback_on_step_end: Any = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006
        **kwargs: Any,
    ) -> Any:
        """Paint ``prompt`` where ``mask_image`` is white, following ``control_image``."""
        return self._generate(locals())
