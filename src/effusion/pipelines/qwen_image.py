"""The classic faces of Qwen-Image and Qwen-Image-Edit."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ..families import qwen_image, qwen_image_text
from .base import DiffusionPipeline
from .facts import current_timestep, fact, latent_channels, live
from .methods.checks import checks
from .methods.qwen import QwenFromImage, QwenFromNoise, QwenInsideMask, QwenReference
from .outputs import QwenImagePipelineOutput


class QwenImageBase(DiffusionPipeline):
    """What the faces of Qwen-Image share: components and ``encode_prompt``."""

    family = qwen_image.QWEN_IMAGE
    output_class = QwenImagePipelineOutput
    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _callback_tensor_inputs = ["latents", "prompt_embeds"]
    _template: ClassVar[str] = qwen_image_text.DESCRIBE

    default_sample_size = fact(lambda pipe: 128)
    tokenizer_max_length = fact(lambda pipe: qwen_image_text.MAX_TOKENS)
    latent_channels = latent_channels
    prompt_template_encode = fact(lambda pipe: pipe._template)
    prompt_template_encode_start_idx = fact(lambda pipe: qwen_image_text.DROP[pipe._template])
    attention_kwargs = live("attention_kwargs", "What attention processors are given.")
    current_timestep = current_timestep

    def __init__(self, scheduler: Any, vae: Any, text_encoder: Any, tokenizer: Any, transformer: Any) -> None:
        super().__init__()
        self._register(locals())

    def encode_prompt(
        self,
        prompt: Any,
        device: Any = None,
        num_images_per_prompt: int = 1,
        prompt_embeds: Tensor | None = None,
        prompt_embeds_mask: Tensor | None = None,
        max_sequence_length: int = 1024,
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, L, D) and their mask (B, L), which is ``None`` if all of them are text."""
        return self._encode(
            prompt, device, num_images_per_prompt, prompt_embeds, prompt_embeds_mask, max_sequence_length
        )

    def _encode(
        self, prompt: Any, device: Any, count: int, embeds: Any, mask: Any, length: int, image: Any = None
    ) -> tuple[Any, Any]:
        with torch.no_grad():
            positive = qwen_image_text.encode(
                self.components, torch.device(device or self._execution_device), prompt, None, embeds, mask,
                num_images_per_prompt=count, max_sequence_length=length, prompt_image=image,
                **self._assigned("prompt_template_encode", "prompt_template_encode_start_idx", "tokenizer_max_length"),
            )["conds"]["positive"]  # fmt: skip
        return positive.tokens, positive.mask


class QwenImagePipeline(QwenFromNoise, QwenImageBase):
    """Text to image with Qwen-Image."""

    task = "text2image"
    check_inputs = checks(
        "prompt, height, width, negative_prompt=None, prompt_embeds=None, negative_prompt_embeds=None, "
        "prompt_embeds_mask=None, negative_prompt_embeds_mask=None, callback_on_step_end_tensor_inputs=None, "
        "max_sequence_length=None"
    )

    def __call__(
        self,
        prompt: Any = None,
        negative_prompt: Any = None,
        true_cfg_scale: float = 4.0,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        sigmas: list[float] | None = None,
        guidance_scale: Any = None,
        num_images_per_prompt: int = 1,
        generator: Any = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_embeds_mask: Any = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_embeds_mask: Any = None,
        output_type: str = "pil",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Any = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006
        max_sequence_length: int = 512,
    ) -> Any:
        """Make pictures of ``prompt``."""
        return self._generate(locals())


class QwenImageImg2ImgPipeline(QwenFromImage, QwenImageBase):
    """Image to image with Qwen-Image."""

    task = "image2image"
    check_inputs = checks(
        "prompt, strength, height, width, negative_prompt=None, prompt_embeds=None, "
        "negative_prompt_embeds=None, prompt_embeds_mask=None, negative_prompt_embeds_mask=None, "
        "callback_on_step_end_tensor_inputs=None, max_sequence_length=None"
    )

    def __call__(
        self,
        prompt: Any = None,
        negative_prompt: Any = None,
        true_cfg_scale: float = 4.0,
        image: Any = None,
        height: int | None = None,
        width: int | None = None,
        strength: float = 0.6,
        num_inference_steps: int = 50,
        sigmas: list[float] | None = None,
        guidance_scale: Any = None,
        num_images_per_prompt: int = 1,
        generator: Any = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_embeds_mask: Any = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_embeds_mask: Any = None,
        output_type: str = "pil",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Any = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006
        max_sequence_length: int = 512,
    ) -> Any:
        """Repaint ``image`` as ``prompt`` says, keeping less of it the higher ``strength`` is."""
        return self._generate(locals())


class QwenImageInpaintPipeline(QwenInsideMask, QwenImageBase):
    """Inpainting with Qwen-Image."""

    task = "inpaint"
    check_inputs = checks(
        "prompt, image, mask_image, strength, height, width, output_type, negative_prompt=None, "
        "prompt_embeds=None, negative_prompt_embeds=None, prompt_embeds_mask=None, "
        "negative_prompt_embeds_mask=None, callback_on_step_end_tensor_inputs=None, padding_mask_crop=None, "
        "max_sequence_length=None"
    )

    def __call__(
        self,
        prompt: Any = None,
        negative_prompt: Any = None,
        true_cfg_scale: float = 4.0,
        image: Any = None,
        mask_image: Any = None,
        masked_image_latents: Any = None,
        height: int | None = None,
        width: int | None = None,
        padding_mask_crop: Any = None,
        strength: float = 0.6,
        num_inference_steps: int = 50,
        sigmas: list[float] | None = None,
        guidance_scale: Any = None,
        num_images_per_prompt: int = 1,
        generator: Any = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_embeds_mask: Any = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_embeds_mask: Any = None,
        output_type: str = "pil",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Any = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006
        max_sequence_length: int = 512,
    ) -> Any:
        """Paint ``prompt`` where ``mask_image`` is white, keeping the rest of ``image``."""
        return self._generate(locals())


class QwenImageEditPipeline(QwenReference, QwenImageBase):
    """Editing with Qwen-Image-Edit: a picture and an instruction."""

    task = "edit"
    _template = qwen_image_text.EDIT
    default_sample_size = 128  # nothing reads it: the size is that of the picture
    check_inputs = checks(
        "prompt, height, width, negative_prompt=None, prompt_embeds=None, negative_prompt_embeds=None, "
        "prompt_embeds_mask=None, negative_prompt_embeds_mask=None, callback_on_step_end_tensor_inputs=None, "
        "max_sequence_length=None"
    )

    def __init__(
        self, scheduler: Any, vae: Any, text_encoder: Any, tokenizer: Any, processor: Any, transformer: Any
    ) -> None:
        DiffusionPipeline.__init__(self)
        self._register(locals())

    def encode_prompt(  # type: ignore[override]
        self,
        prompt: Any,
        image: Any = None,
        device: Any = None,
        num_images_per_prompt: int = 1,
        prompt_embeds: Tensor | None = None,
        prompt_embeds_mask: Tensor | None = None,
        max_sequence_length: int = 1024,
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, L, D) of the instruction and the picture, and their mask (B, L) or ``None``."""
        return self._encode(
            prompt, device, num_images_per_prompt, prompt_embeds, prompt_embeds_mask, max_sequence_length, image
        )

    def __call__(
        self,
        image: Any = None,
        prompt: Any = None,
        negative_prompt: Any = None,
        true_cfg_scale: float = 4.0,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        sigmas: list[float] | None = None,
        guidance_scale: Any = None,
        num_images_per_prompt: int = 1,
        generator: Any = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_embeds_mask: Any = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_embeds_mask: Any = None,
        output_type: str = "pil",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Any = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006
        max_sequence_length: int = 512,
    ) -> Any:
        """Edit ``image`` as ``prompt`` says."""
        return self._generate(locals())
