"""The classic faces of FLUX.1."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..families import flux, flux_text
from .base import DiffusionPipeline
from .facts import current_timestep, fact, latent_channels, live, tokenizer_max_length
from .methods.checks import checks
from .methods.control import PreparesTensor
from .methods.text import FluxImages, FluxText
from .methods.tokens import FluxFilling, FluxFromImage, FluxFromNoise, FluxInsideMask, FluxReference
from .outputs import FluxPipelineOutput


class FluxBase(FluxText):
    """What the faces of FLUX.1 share: components and ``encode_prompt``."""

    family = flux.FLUX
    output_class = FluxPipelineOutput
    model_cpu_offload_seq = "text_encoder->text_encoder_2->transformer->vae"
    _callback_tensor_inputs = ["latents", "prompt_embeds"]

    default_sample_size = fact(lambda pipe: 128)
    tokenizer_max_length = tokenizer_max_length
    latent_channels = latent_channels
    vae_latent_channels = latent_channels
    joint_attention_kwargs = live("joint_attention_kwargs", "What attention processors are given.")
    current_timestep = current_timestep

    def __init__(
        self,
        scheduler: Any,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        text_encoder_2: Any,
        tokenizer_2: Any,
        transformer: Any,
    ) -> None:
        super().__init__()
        self._register(locals())

    def encode_prompt(
        self,
        prompt: Any,
        prompt_2: Any = None,
        device: Any = None,
        num_images_per_prompt: int = 1,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        max_sequence_length: int = 512,
        lora_scale: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """T5 tokens (B, L, D), CLIP's pooled vectors (B, D) and the positions of the tokens (L, 3)."""
        with torch.no_grad():
            positive = flux_text.encode(
                self.components, torch.device(device or self._execution_device), prompt, prompt_2,
                prompt_embeds=prompt_embeds, pooled_prompt_embeds=pooled_prompt_embeds,
                num_images_per_prompt=num_images_per_prompt, max_sequence_length=max_sequence_length,
                **self._assigned("tokenizer_max_length"),
            )["conds"]["positive"]  # fmt: skip
        tokens = positive.tokens
        return tokens, positive.pooled, torch.zeros(tokens.shape[1], 3, device=tokens.device, dtype=tokens.dtype)


class FluxGuidedBase(FluxImages, FluxBase):
    """Those faces that also have room for an image encoder."""

    model_cpu_offload_seq = "text_encoder->text_encoder_2->image_encoder->transformer->vae"
    _optional_components = ["image_encoder", "feature_extractor"]

    def __init__(
        self,
        scheduler: Any,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        text_encoder_2: Any,
        tokenizer_2: Any,
        transformer: Any,
        image_encoder: Any = None,
        feature_extractor: Any = None,
    ) -> None:
        DiffusionPipeline.__init__(self)
        self._register(locals())


class FluxPipeline(FluxFromNoise, FluxGuidedBase):
    """Text to image with FLUX.1."""

    task = "text2image"
    check_inputs = checks(
        "prompt, prompt_2, height, width, negative_prompt=None, negative_prompt_2=None, prompt_embeds=None, "
        "negative_prompt_embeds=None, pooled_prompt_embeds=None, negative_pooled_prompt_embeds=None, "
        "callback_on_step_end_tensor_inputs=None, max_sequence_length=None"
    )

    def __call__(
        self,
        prompt: Any = None,
        prompt_2: Any = None,
        negative_prompt: Any = None,
        negative_prompt_2: Any = None,
        true_cfg_scale: float = 1.0,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 28,
        sigmas: list[float] | None = None,
        guidance_scale: float = 3.5,
        num_images_per_prompt: int = 1,
        generator: Any = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        ip_adapter_image: Any = None,
        ip_adapter_image_embeds: Any = None,
        negative_ip_adapter_image: Any = None,
        negative_ip_adapter_image_embeds: Any = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        joint_attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Any = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006
        max_sequence_length: int = 512,
    ) -> Any:
        """Make pictures of ``prompt``."""
        return self._generate(locals())


class FluxImg2ImgPipeline(FluxFromImage, FluxGuidedBase):
    """Image to image with FLUX.1."""

    task = "image2image"
    check_inputs = checks(
        "prompt, prompt_2, strength, height, width, negative_prompt=None, negative_prompt_2=None, "
        "prompt_embeds=None, negative_prompt_embeds=None, pooled_prompt_embeds=None, "
        "negative_pooled_prompt_embeds=None, callback_on_step_end_tensor_inputs=None, "
        "max_sequence_length=None"
    )

    def __call__(
        self,
        prompt: Any = None,
        prompt_2: Any = None,
        negative_prompt: Any = None,
        negative_prompt_2: Any = None,
        true_cfg_scale: float = 1.0,
        image: Any = None,
        height: int | None = None,
        width: int | None = None,
        strength: float = 0.6,
        num_inference_steps: int = 28,
        sigmas: list[float] | None = None,
        guidance_scale: float = 7.0,
        num_images_per_prompt: int = 1,
        generator: Any = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        ip_adapter_image: Any = None,
        ip_adapter_image_embeds: Any = None,
        negative_ip_adapter_image: Any = None,
        negative_ip_adapter_image_embeds: Any = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        joint_attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Any = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006
        max_sequence_length: int = 512,
    ) -> Any:
        """Repaint ``image`` as ``prompt`` says, keeping less of it the higher ``strength`` is."""
        return self._generate(locals())


class FluxInpaintPipeline(FluxInsideMask, FluxGuidedBase):
    """Inpainting with an ordinary FLUX.1."""

    task = "inpaint"
    check_inputs = checks(
        "prompt, prompt_2, image, mask_image, strength, height, width, output_type, negative_prompt=None, "
        "negative_prompt_2=None, prompt_embeds=None, negative_prompt_embeds=None, pooled_prompt_embeds=None, "
        "negative_pooled_prompt_embeds=None, callback_on_step_end_tensor_inputs=None, padding_mask_crop=None, "
        "max_sequence_length=None"
    )

    def __call__(
        self,
        prompt: Any = None,
        prompt_2: Any = None,
        negative_prompt: Any = None,
        negative_prompt_2: Any = None,
        true_cfg_scale: float = 1.0,
        image: Any = None,
        mask_image: Any = None,
        masked_image_latents: Any = None,
        height: int | None = None,
        width: int | None = None,
        padding_mask_crop: Any = None,
        strength: float = 0.6,
        num_inference_steps: int = 28,
        sigmas: list[float] | None = None,
        guidance_scale: float = 7.0,
        num_images_per_prompt: int = 1,
        generator: Any = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        ip_adapter_image: Any = None,
        ip_adapter_image_embeds: Any = None,
        negative_ip_adapter_image: Any = None,
        negative_ip_adapter_image_embeds: Any = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        joint_attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Any = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006
        max_sequence_length: int = 512,
    ) -> Any:
        """Paint ``prompt`` where ``mask_image`` is white, keeping the rest of ``image``."""
        return self._generate(locals())


class FluxKontextPipeline(FluxReference, FluxGuidedBase):
    """Editing with FLUX.1 Kontext: a reference picture and an instruction."""

    task = "kontext"
    check_inputs = checks(
        "prompt, prompt_2, height, width, negative_prompt=None, negative_prompt_2=None, prompt_embeds=None, "
        "negative_prompt_embeds=None, pooled_prompt_embeds=None, negative_pooled_prompt_embeds=None, "
        "callback_on_step_end_tensor_inputs=None, max_sequence_length=None"
    )

    def __call__(
        self,
        image: Any = None,
        prompt: Any = None,
        prompt_2: Any = None,
        negative_prompt: Any = None,
        negative_prompt_2: Any = None,
        true_cfg_scale: float = 1.0,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 28,
        sigmas: list[float] | None = None,
        guidance_scale: float = 3.5,
        num_images_per_prompt: int = 1,
        generator: Any = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        ip_adapter_image: Any = None,
        ip_adapter_image_embeds: Any = None,
        negative_ip_adapter_image: Any = None,
        negative_ip_adapter_image_embeds: Any = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        joint_attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Any = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006
        max_sequence_length: int = 512,
        max_area: int = 1024**2,
        _auto_resize: bool = True,
    ) -> Any:
        """Edit ``image`` as ``prompt`` says; without one, make a picture of it."""
        return self._generate(locals())


class FluxFillPipeline(FluxFilling, FluxBase):
    """Inpainting and outpainting with FLUX.1 Fill."""

    task = "fill"
    check_inputs = checks(
        "prompt, prompt_2, strength, height, width, prompt_embeds=None, pooled_prompt_embeds=None, "
        "callback_on_step_end_tensor_inputs=None, max_sequence_length=None, image=None, mask_image=None, "
        "masked_image_latents=None"
    )

    def __call__(
        self,
        prompt: Any = None,
        prompt_2: Any = None,
        image: Any = None,
        mask_image: Any = None,
        masked_image_latents: Any = None,
        height: int | None = None,
        width: int | None = None,
        strength: float = 1.0,
        num_inference_steps: int = 50,
        sigmas: list[float] | None = None,
        guidance_scale: float = 30.0,
        num_images_per_prompt: int = 1,
        generator: Any = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        joint_attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Any = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006
        max_sequence_length: int = 512,
    ) -> Any:
        """Paint ``prompt`` where ``mask_image`` is white; the network sees the rest of ``image``."""
        return self._generate(locals())


class FluxControlPipeline(FluxFromNoise, PreparesTensor, FluxBase):
    """Pictures that follow edges or depth, with FLUX.1 Canny or Depth."""

    task = "control"
    check_inputs = checks(
        "prompt, prompt_2, height, width, prompt_embeds=None, pooled_prompt_embeds=None, "
        "callback_on_step_end_tensor_inputs=None, max_sequence_length=None"
    )

    def __call__(
        self,
        prompt: Any = None,
        prompt_2: Any = None,
        control_image: Any = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 28,
        sigmas: list[float] | None = None,
        guidance_scale: float = 3.5,
        num_images_per_prompt: int = 1,
        generator: Any = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        joint_attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Any = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006
        max_sequence_length: int = 512,
    ) -> Any:
        """Make pictures of ``prompt`` that follow ``control_image``."""
        return self._generate(locals())


class FluxControlImg2ImgPipeline(FluxFromImage, PreparesTensor, FluxBase):
    """Image to image that follows edges or depth."""

    task = "control_image2image"
    check_inputs = checks(
        "prompt, prompt_2, strength, height, width, prompt_embeds=None, pooled_prompt_embeds=None, "
        "callback_on_step_end_tensor_inputs=None, max_sequence_length=None"
    )

    def __call__(
        self,
        prompt: Any = None,
        prompt_2: Any = None,
        image: Any = None,
        control_image: Any = None,
        height: int | None = None,
        width: int | None = None,
        strength: float = 0.6,
        num_inference_steps: int = 28,
        sigmas: list[float] | None = None,
        guidance_scale: float = 7.0,
        num_images_per_prompt: int = 1,
        generator: Any = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        joint_attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Any = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006
        max_sequence_length: int = 512,
    ) -> Any:
        """Repaint ``image`` as ``prompt`` says, following ``control_image``."""
        return self._generate(locals())


class FluxControlInpaintPipeline(FluxInsideMask, PreparesTensor, FluxBase):
    """Inpainting that follows edges or depth."""

    task = "control_inpaint"
    check_inputs = checks(
        "prompt, prompt_2, strength, height, width, prompt_embeds=None, pooled_prompt_embeds=None, "
        "callback_on_step_end_tensor_inputs=None, max_sequence_length=None"
    )

    def __call__(
        self,
        prompt: Any = None,
        prompt_2: Any = None,
        image: Any = None,
        control_image: Any = None,
        mask_image: Any = None,
        masked_image_latents: Any = None,
        height: int | None = None,
        width: int | None = None,
        strength: float = 0.6,
        num_inference_steps: int = 28,
        sigmas: list[float] | None = None,
        guidance_scale: float = 7.0,
        num_images_per_prompt: int = 1,
        generator: Any = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        joint_attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Any = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006
        max_sequence_length: int = 512,
    ) -> Any:
        """Paint ``prompt`` where ``mask_image`` is white, following ``control_image``."""
        return self._generate(locals())
