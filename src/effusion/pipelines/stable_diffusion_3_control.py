"""The classic faces of Stable Diffusion 3 with control networks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..blocks.images import VaeImageProcessor
from ..models.controlnet_sd3 import SD3MultiControlNetModel
from .base import DiffusionPipeline
from .facts import fact
from .methods.checks import checks
from .methods.control import PreparesTensor
from .methods.sd3 import PreparesImageAndMask
from .methods.unet import FromNoise
from .stable_diffusion_3 import StableDiffusion3Base


class StableDiffusion3ControlNetBase(StableDiffusion3Base):
    """What the faces with control networks share."""

    def __init__(
        self,
        transformer: Any,
        scheduler: Any,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        text_encoder_2: Any,
        tokenizer_2: Any,
        text_encoder_3: Any,
        tokenizer_3: Any,
        controlnet: Any,
        image_encoder: Any = None,
        feature_extractor: Any = None,
    ) -> None:
        DiffusionPipeline.__init__(self)
        if isinstance(controlnet, (list, tuple)):
            controlnet = SD3MultiControlNetModel(list(controlnet))
        self._register(locals())


class StableDiffusion3ControlNetPipeline(FromNoise, PreparesTensor, StableDiffusion3ControlNetBase):
    """Text to image with Stable Diffusion 3 and control networks."""

    task = "controlnet"
    check_inputs = checks(
        "prompt, prompt_2, prompt_3, height, width, negative_prompt=None, negative_prompt_2=None, "
        "negative_prompt_3=None, prompt_embeds=None, negative_prompt_embeds=None, pooled_prompt_embeds=None, "
        "negative_pooled_prompt_embeds=None, callback_on_step_end_tensor_inputs=None, "
        "max_sequence_length=None"
    )

    def __call__(
        self,
        prompt: Any = None,
        prompt_2: Any = None,
        prompt_3: Any = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 28,
        sigmas: list[float] | None = None,
        guidance_scale: float = 7.0,
        control_guidance_start: float = 0.0,
        control_guidance_end: float = 1.0,
        control_image: Any = None,
        controlnet_conditioning_scale: float = 1.0,
        controlnet_pooled_projections: Any = None,
        negative_prompt: Any = None,
        negative_prompt_2: Any = None,
        negative_prompt_3: Any = None,
        num_images_per_prompt: int = 1,
        generator: Any = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        ip_adapter_image: Any = None,
        ip_adapter_image_embeds: Any = None,
        output_type: str = "pil",
        return_dict: bool = True,
        joint_attention_kwargs: dict[str, Any] | None = None,
        clip_skip: Any = None,
        callback_on_step_end: Any = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006
        max_sequence_length: int = 256,
    ) -> Any:
        """Make pictures of ``prompt`` that follow ``control_image``."""
        return self._generate(locals())


class StableDiffusion3ControlNetInpaintingPipeline(FromNoise, PreparesImageAndMask, StableDiffusion3ControlNetBase):
    """Inpainting with Stable Diffusion 3 and an inpainting control network."""

    task = "controlnet_inpaint"
    check_inputs = checks(
        "height, width, image, prompt, prompt_2, prompt_3, negative_prompt=None, negative_prompt_2=None, "
        "negative_prompt_3=None, prompt_embeds=None, negative_prompt_embeds=None, pooled_prompt_embeds=None, "
        "negative_pooled_prompt_embeds=None, ip_adapter_image=None, ip_adapter_image_embeds=None, "
        "controlnet_conditioning_scale=1.0, control_guidance_start=0.0, control_guidance_end=1.0, "
        "callback_on_step_end_tensor_inputs=None, max_sequence_length=None"
    )

    @fact
    def image_processor(self) -> VaeImageProcessor:
        """What reads the picture, with three channels, and makes pictures of the result."""
        return self._processor(do_convert_rgb=True)

    def __call__(
        self,
        prompt: Any = None,
        prompt_2: Any = None,
        prompt_3: Any = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 28,
        sigmas: list[float] | None = None,
        guidance_scale: float = 7.0,
        control_guidance_start: float = 0.0,
        control_guidance_end: float = 1.0,
        control_image: Any = None,
        control_mask: Any = None,
        controlnet_conditioning_scale: float = 1.0,
        controlnet_pooled_projections: Any = None,
        negative_prompt: Any = None,
        negative_prompt_2: Any = None,
        negative_prompt_3: Any = None,
        num_images_per_prompt: int = 1,
        generator: Any = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        ip_adapter_image: Any = None,
        ip_adapter_image_embeds: Any = None,
        output_type: str = "pil",
        return_dict: bool = True,
        joint_attention_kwargs: dict[str, Any] | None = None,
        clip_skip: Any = None,
        callback_on_step_end: Any = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006
        max_sequence_length: int = 256,
    ) -> Any:
        """Paint ``prompt`` where ``control_mask`` is white, keeping the rest of ``control_image``."""
        return self._generate(locals())
