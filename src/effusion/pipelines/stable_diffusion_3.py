"""The classic faces of Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..families import stable_diffusion_3 as sd3
from ..families.stable_diffusion_3_text import encode
from .facts import live, native_size, patch_size, tokenizer_max_length
from .methods.checks import checks
from .methods.sd3 import InsideMask3
from .methods.text import StableDiffusion3Text
from .methods.unet import FromImage, FromNoise
from .outputs import StableDiffusion3PipelineOutput


class StableDiffusion3Base(StableDiffusion3Text):
    """What the faces of Stable Diffusion 3 share: components and ``encode_prompt``."""

    family = sd3.STABLE_DIFFUSION_3
    output_class = StableDiffusion3PipelineOutput
    model_cpu_offload_seq = "text_encoder->text_encoder_2->text_encoder_3->image_encoder->transformer->vae"
    _optional_components = ["image_encoder", "feature_extractor"]
    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds", "negative_pooled_prompt_embeds"]

    default_sample_size = native_size("transformer")
    tokenizer_max_length = tokenizer_max_length
    patch_size = patch_size
    joint_attention_kwargs = live("joint_attention_kwargs", "What attention processors are given.")
    skip_guidance_layers = live("skip_guidance_layers", "The layers that skip-layer guidance leaves out.")

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
        image_encoder: Any = None,
        feature_extractor: Any = None,
    ) -> None:
        super().__init__()
        self._register(locals())

    def encode_prompt(
        self,
        prompt: Any,
        prompt_2: Any,
        prompt_3: Any,
        device: Any = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: Any = None,
        negative_prompt_2: Any = None,
        negative_prompt_3: Any = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        clip_skip: int | None = None,
        max_sequence_length: int = 256,
        lora_scale: float | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Prompt, negative prompt (B, L, D each), and the pooled vectors of both (B, D each)."""
        with torch.no_grad():
            conds = encode(
                self.components, torch.device(device or self._execution_device), prompt, prompt_2, prompt_3,
                negative_prompt, negative_prompt_2, negative_prompt_3, prompt_embeds, pooled_prompt_embeds,
                negative_prompt_embeds, negative_pooled_prompt_embeds, num_images_per_prompt,
                do_classifier_free_guidance, clip_skip, max_sequence_length, **self._assigned("tokenizer_max_length"),
            )["conds"]  # fmt: skip
        positive, negative = conds["positive"], conds.get("negative")
        if negative is None:
            return positive.tokens, negative_prompt_embeds, positive.pooled, negative_pooled_prompt_embeds
        return positive.tokens, negative.tokens, positive.pooled, negative.pooled


class StableDiffusion3Pipeline(FromNoise, StableDiffusion3Base):
    """Text to image with Stable Diffusion 3."""

    task = "text2image"
    _callback_tensor_inputs = ["latents", "prompt_embeds", "pooled_prompt_embeds"]
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
        skip_guidance_layers: Any = None,
        skip_layer_guidance_scale: float = 2.8,
        skip_layer_guidance_stop: float = 0.2,
        skip_layer_guidance_start: float = 0.01,
        mu: Any = None,
    ) -> Any:
        """Make pictures of ``prompt``."""
        return self._generate(locals())


class StableDiffusion3Img2ImgPipeline(FromImage, StableDiffusion3Base):
    """Image to image with Stable Diffusion 3."""

    task = "image2image"
    check_inputs = checks(
        "prompt, prompt_2, prompt_3, height, width, strength, negative_prompt=None, negative_prompt_2=None, "
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
        image: Any = None,
        strength: float = 0.6,
        num_inference_steps: int = 50,
        sigmas: list[float] | None = None,
        guidance_scale: float = 7.0,
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
        output_type: str = "pil",
        ip_adapter_image: Any = None,
        ip_adapter_image_embeds: Any = None,
        return_dict: bool = True,
        joint_attention_kwargs: dict[str, Any] | None = None,
        clip_skip: Any = None,
        callback_on_step_end: Any = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006
        max_sequence_length: int = 256,
        mu: Any = None,
    ) -> Any:
        """Repaint ``image`` as ``prompt`` says, keeping less of it the higher ``strength`` is."""
        return self._generate(locals())


class StableDiffusion3InpaintPipeline(InsideMask3, StableDiffusion3Base):
    """Inpainting with Stable Diffusion 3."""

    task = "inpaint"
    check_inputs = checks(
        "prompt, prompt_2, prompt_3, height, width, strength, negative_prompt=None, negative_prompt_2=None, "
        "negative_prompt_3=None, prompt_embeds=None, negative_prompt_embeds=None, pooled_prompt_embeds=None, "
        "negative_pooled_prompt_embeds=None, callback_on_step_end_tensor_inputs=None, "
        "max_sequence_length=None"
    )

    def __call__(
        self,
        prompt: Any = None,
        prompt_2: Any = None,
        prompt_3: Any = None,
        image: Any = None,
        mask_image: Any = None,
        masked_image_latents: Any = None,
        height: int | None = None,
        width: int | None = None,
        padding_mask_crop: Any = None,
        strength: float = 0.6,
        num_inference_steps: int = 50,
        sigmas: list[float] | None = None,
        guidance_scale: float = 7.0,
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
        mu: Any = None,
    ) -> Any:
        """Paint ``prompt`` where ``mask_image`` is white, keeping the rest of ``image``."""
        return self._generate(locals())
