"""The classic faces of Stable Diffusion 1.x and 2.x with control networks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from ..models.controlnet import MultiControlNetModel
from .base import DiffusionPipeline
from .methods.checks import checks
from .methods.control import PreparesControlImage, PreparesCroppedControlImage, PreparesImage
from .methods.unet import FromImage, FromNoise, InsideMask
from .stable_diffusion import StableDiffusionBase, check_safety_parts


def together(controlnet: Any) -> Any:
    """A list of control networks as one network."""
    return MultiControlNetModel(list(controlnet)) if isinstance(controlnet, (list, tuple)) else controlnet


class StableDiffusionControlNetBase(StableDiffusionBase):
    """What the faces with control networks share."""

    _scheduler_settings: ClassVar[Mapping[str, Any]] = {}

    def __init__(
        self,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        unet: Any,
        controlnet: Any,
        scheduler: Any,
        safety_checker: Any,
        feature_extractor: Any,
        image_encoder: Any = None,
        requires_safety_checker: bool = True,
    ) -> None:
        DiffusionPipeline.__init__(self)
        check_safety_parts(safety_checker, feature_extractor)
        controlnet = together(controlnet)
        self._register(locals())


class StableDiffusionControlNetPipeline(FromNoise, PreparesImage, StableDiffusionControlNetBase):
    """Text to image with Stable Diffusion and control networks."""

    task = "controlnet"
    _callback_tensor_inputs = [*StableDiffusionBase._callback_tensor_inputs, "image"]
    check_inputs = checks(
        "prompt, image, callback_steps, negative_prompt=None, prompt_embeds=None, "
        "negative_prompt_embeds=None, ip_adapter_image=None, ip_adapter_image_embeds=None, "
        "controlnet_conditioning_scale=1.0, control_guidance_start=0.0, control_guidance_end=1.0, "
        "callback_on_step_end_tensor_inputs=None"
    )

    def __call__(
        self,
        prompt: Any = None,
        image: Any = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float = 7.5,
        negative_prompt: Any = None,
        num_images_per_prompt: int | None = 1,
        eta: float = 0.0,
        generator: Any = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        ip_adapter_image: Any = None,
        ip_adapter_image_embeds: list[Tensor] | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        controlnet_conditioning_scale: float | list[float] = 1.0,
        guess_mode: bool = False,
        control_guidance_start: float | list[float] = 0.0,
        control_guidance_end: float | list[float] = 1.0,
        clip_skip: int | None = None,
        callback_on_step_end: Any = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006
        **kwargs: Any,
    ) -> Any:
        """Make pictures of ``prompt`` that follow the control picture ``image``."""
        return self._generate(locals())


class StableDiffusionControlNetImg2ImgPipeline(FromImage, PreparesControlImage, StableDiffusionControlNetBase):
    """Image to image with Stable Diffusion and control networks."""

    task = "controlnet_image2image"
    model_cpu_offload_seq = "text_encoder->unet->vae"
    _callback_tensor_inputs = [*StableDiffusionBase._callback_tensor_inputs, "control_image"]
    check_inputs = checks(
        "prompt, image, callback_steps, negative_prompt=None, prompt_embeds=None, "
        "negative_prompt_embeds=None, ip_adapter_image=None, ip_adapter_image_embeds=None, "
        "controlnet_conditioning_scale=1.0, control_guidance_start=0.0, control_guidance_end=1.0, "
        "callback_on_step_end_tensor_inputs=None"
    )

    def __call__(
        self,
        prompt: Any = None,
        image: Any = None,
        control_image: Any = None,
        height: int | None = None,
        width: int | None = None,
        strength: float = 0.8,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        negative_prompt: Any = None,
        num_images_per_prompt: int | None = 1,
        eta: float = 0.0,
        generator: Any = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        ip_adapter_image: Any = None,
        ip_adapter_image_embeds: list[Tensor] | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        controlnet_conditioning_scale: float | list[float] = 0.8,
        guess_mode: bool = False,
        control_guidance_start: float | list[float] = 0.0,
        control_guidance_end: float | list[float] = 1.0,
        clip_skip: int | None = None,
        callback_on_step_end: Any = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006
        **kwargs: Any,
    ) -> Any:
        """Repaint ``image`` as ``prompt`` says, following ``control_image``."""
        return self._generate(locals())


class StableDiffusionControlNetInpaintPipeline(InsideMask, PreparesCroppedControlImage, StableDiffusionControlNetBase):
    """Inpainting with Stable Diffusion and control networks."""

    task = "controlnet_inpaint"
    _callback_tensor_inputs = [
        *StableDiffusionBase._callback_tensor_inputs,
        "control_image",
        "mask",
        "masked_image_latents",
    ]
    check_inputs = checks(
        "prompt, image, mask_image, height, width, callback_steps, output_type, negative_prompt=None, "
        "prompt_embeds=None, negative_prompt_embeds=None, ip_adapter_image=None, "
        "ip_adapter_image_embeds=None, controlnet_conditioning_scale=1.0, control_guidance_start=0.0, "
        "control_guidance_end=1.0, callback_on_step_end_tensor_inputs=None, padding_mask_crop=None"
    )

    def __call__(
        self,
        prompt: Any = None,
        image: Any = None,
        mask_image: Any = None,
        control_image: Any = None,
        height: int | None = None,
        width: int | None = None,
        padding_mask_crop: int | None = None,
        strength: float = 1.0,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        negative_prompt: Any = None,
        num_images_per_prompt: int | None = 1,
        eta: float = 0.0,
        generator: Any = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        ip_adapter_image: Any = None,
        ip_adapter_image_embeds: list[Tensor] | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        controlnet_conditioning_scale: float | list[float] = 0.5,
        guess_mode: bool = False,
        control_guidance_start: float | list[float] = 0.0,
        control_guidance_end: float | list[float] = 1.0,
        clip_skip: int | None = None,
        callback_on_step_end: Any = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006
        **kwargs: Any,
    ) -> Any:
        """Paint ``prompt`` where ``mask_image`` is white, following ``control_image``."""
        return self._generate(locals())
