"""The classic faces of PixArt-alpha and PixArt-sigma."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..families import pixart
from .methods.checks import checks
from .methods.text import CaptionText
from .methods.unet import FromNoise, StepMethods
from .outputs import ImagePipelineOutput


class PixArtBase(CaptionText, StepMethods):
    """What the faces of PixArt share: components and ``encode_prompt``."""

    family = pixart.PIXART
    output_class = ImagePipelineOutput
    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components = ["tokenizer", "text_encoder"]

    def __init__(self, tokenizer: Any, text_encoder: Any, vae: Any, transformer: Any, scheduler: Any) -> None:
        super().__init__()
        self._register(locals())

    def _encode(self, prompt: Any, guide: bool, device: Any, **options: Any) -> tuple[Any, Any, Any, Any]:
        with torch.no_grad():
            where = torch.device(device or self._execution_device)
            conds = pixart.encode(self.components, where, prompt, guide=guide, **options)["conds"]
        positive, negative = conds["positive"], conds.get("negative")
        if negative is None:
            return positive.tokens, positive.mask, None, None
        return positive.tokens, positive.mask, negative.tokens, negative.mask


class PixArtAlphaPipeline(FromNoise, PixArtBase):
    """Text to image with PixArt-alpha."""

    task = "text2image"
    check_inputs = checks(
        "prompt, height, width, negative_prompt, callback_steps, prompt_embeds=None, "
        "negative_prompt_embeds=None, prompt_attention_mask=None, negative_prompt_attention_mask=None"
    )

    def encode_prompt(
        self,
        prompt: Any,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str = "",
        num_images_per_prompt: int = 1,
        device: Any = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        clean_caption: bool = False,
        max_sequence_length: int = 120,
        **kwargs: Any,
    ) -> tuple[Any, Any, Any, Any]:
        """Tokens (B, L, D) and mask (B, L) of the prompt, then of the negative prompt."""
        return self._encode(
            prompt, do_classifier_free_guidance, device, negative_prompt=negative_prompt,
            prompt_embeds=prompt_embeds, prompt_attention_mask=prompt_attention_mask,
            negative_prompt_embeds=negative_prompt_embeds,
            negative_prompt_attention_mask=negative_prompt_attention_mask,
            num_images_per_prompt=num_images_per_prompt, clean_caption=clean_caption,
            max_sequence_length=max_sequence_length,
        )  # fmt: skip

    def __call__(
        self,
        prompt: Any = None,
        negative_prompt: Any = "",
        num_inference_steps: int = 20,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float = 4.5,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        eta: float = 0.0,
        generator: Any = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Any = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_attention_mask: Any = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback: Any = None,
        callback_steps: int = 1,
        clean_caption: bool = True,
        use_resolution_binning: bool = True,
        max_sequence_length: int = 120,
        **kwargs: Any,
    ) -> Any:
        """Make pictures of ``prompt``."""
        return self._generate(locals())


class PixArtSigmaPipeline(FromNoise, PixArtBase):
    """Text to image with PixArt-sigma."""

    task = "text2image"
    check_inputs = checks(
        "prompt, height, width, negative_prompt, callback_steps, prompt_embeds=None, "
        "negative_prompt_embeds=None, prompt_attention_mask=None, negative_prompt_attention_mask=None"
    )

    def encode_prompt(
        self,
        prompt: Any,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str = "",
        num_images_per_prompt: int = 1,
        device: Any = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        clean_caption: bool = False,
        max_sequence_length: int = 300,
        **kwargs: Any,
    ) -> tuple[Any, Any, Any, Any]:
        """Tokens (B, L, D) and mask (B, L) of the prompt, then of the negative prompt."""
        return self._encode(
            prompt, do_classifier_free_guidance, device, negative_prompt=negative_prompt,
            prompt_embeds=prompt_embeds, prompt_attention_mask=prompt_attention_mask,
            negative_prompt_embeds=negative_prompt_embeds,
            negative_prompt_attention_mask=negative_prompt_attention_mask,
            num_images_per_prompt=num_images_per_prompt, clean_caption=clean_caption,
            max_sequence_length=max_sequence_length,
        )  # fmt: skip

    def __call__(
        self,
        prompt: Any = None,
        negative_prompt: Any = "",
        num_inference_steps: int = 20,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float = 4.5,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        eta: float = 0.0,
        generator: Any = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Any = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_attention_mask: Any = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback: Any = None,
        callback_steps: int = 1,
        clean_caption: bool = True,
        use_resolution_binning: bool = True,
        max_sequence_length: int = 300,
        **kwargs: Any,
    ) -> Any:
        """Make pictures of ``prompt``."""
        return self._generate(locals())
