"""The classic faces of FLUX.1 with control networks, and Redux, which makes a prompt of a picture."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..blocks.text import as_list
from ..families import flux
from ..models.controlnet_flux import FluxMultiControlNetModel
from .base import DiffusionPipeline
from .facts import tokenizer_max_length
from .flux import FluxBase
from .methods.checks import checks
from .methods.control import PreparesTensor
from .methods.text import FluxImages, FluxText
from .methods.tokens import FluxFromImage, FluxFromNoise, FluxInsideMask
from .outputs import FluxPriorReduxPipelineOutput


class FluxControlNetBase(FluxBase):
    """What the faces with control networks share."""

    _callback_tensor_inputs = ["latents", "prompt_embeds", "control_image"]

    def __init__(
        self,
        scheduler: Any,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        text_encoder_2: Any,
        tokenizer_2: Any,
        transformer: Any,
        controlnet: Any,
    ) -> None:
        DiffusionPipeline.__init__(self)
        if isinstance(controlnet, (list, tuple)):
            controlnet = FluxMultiControlNetModel(list(controlnet))
        self._register(locals())


class FluxControlNetPipeline(FluxFromNoise, FluxImages, PreparesTensor, FluxControlNetBase):
    """Text to image with FLUX.1 and control networks."""

    task = "controlnet"
    model_cpu_offload_seq = "text_encoder->text_encoder_2->image_encoder->transformer->vae"
    _optional_components = ["image_encoder", "feature_extractor"]
    check_inputs = checks(
        "prompt, prompt_2, height, width, negative_prompt=None, negative_prompt_2=None, prompt_embeds=None, "
        "negative_prompt_embeds=None, pooled_prompt_embeds=None, negative_pooled_prompt_embeds=None, "
        "callback_on_step_end_tensor_inputs=None, max_sequence_length=None"
    )

    def __init__(
        self,
        scheduler: Any,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        text_encoder_2: Any,
        tokenizer_2: Any,
        transformer: Any,
        controlnet: Any,
        image_encoder: Any = None,
        feature_extractor: Any = None,
    ) -> None:
        DiffusionPipeline.__init__(self)
        if isinstance(controlnet, (list, tuple)):
            controlnet = FluxMultiControlNetModel(list(controlnet))
        self._register(locals())

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
        guidance_scale: float = 7.0,
        control_guidance_start: float = 0.0,
        control_guidance_end: float = 1.0,
        control_image: Any = None,
        control_mode: Any = None,
        controlnet_conditioning_scale: float = 1.0,
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
        """Make pictures of ``prompt`` that follow ``control_image``."""
        return self._generate(locals())


class FluxControlNetImg2ImgPipeline(FluxFromImage, PreparesTensor, FluxControlNetBase):
    """Image to image with FLUX.1 and control networks."""

    task = "controlnet_image2image"
    check_inputs = checks(
        "prompt, prompt_2, strength, height, width, callback_on_step_end_tensor_inputs, prompt_embeds=None, "
        "pooled_prompt_embeds=None, max_sequence_length=None"
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
        control_guidance_start: float = 0.0,
        control_guidance_end: float = 1.0,
        control_mode: Any = None,
        controlnet_conditioning_scale: float = 1.0,
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


class FluxControlNetInpaintPipeline(FluxInsideMask, PreparesTensor, FluxControlNetBase):
    """Inpainting with FLUX.1 and control networks."""

    task = "controlnet_inpaint"
    _callback_tensor_inputs = ["latents", "prompt_embeds", "control_image", "mask", "masked_image_latents"]
    check_inputs = checks(
        "prompt, prompt_2, image, mask_image, strength, height, width, output_type, prompt_embeds=None, "
        "pooled_prompt_embeds=None, callback_on_step_end_tensor_inputs=None, padding_mask_crop=None, "
        "max_sequence_length=None"
    )

    def __call__(
        self,
        prompt: Any = None,
        prompt_2: Any = None,
        image: Any = None,
        mask_image: Any = None,
        masked_image_latents: Any = None,
        control_image: Any = None,
        height: int | None = None,
        width: int | None = None,
        strength: float = 0.6,
        padding_mask_crop: Any = None,
        sigmas: list[float] | None = None,
        num_inference_steps: int = 28,
        guidance_scale: float = 7.0,
        control_guidance_start: float = 0.0,
        control_guidance_end: float = 1.0,
        control_mode: Any = None,
        controlnet_conditioning_scale: float = 1.0,
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


class FluxPriorReduxPipeline(FluxText):
    """FLUX.1 Redux: pictures as a prompt for :class:`~effusion.FluxPipeline`."""

    family = flux.FLUX
    task = "redux"
    output_class = FluxPriorReduxPipelineOutput
    model_cpu_offload_seq = "image_encoder->image_embedder"
    _optional_components = ["text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"]
    _callback_tensor_inputs = []
    tokenizer_max_length = tokenizer_max_length

    def __init__(
        self,
        image_encoder: Any,
        feature_extractor: Any,
        image_embedder: Any,
        text_encoder: Any = None,
        tokenizer: Any = None,
        text_encoder_2: Any = None,
        tokenizer_2: Any = None,
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
        """As :meth:`FluxPipeline.encode_prompt`."""
        return FluxBase.encode_prompt(
            self,  # type: ignore[arg-type]
            prompt, prompt_2, device, num_images_per_prompt, prompt_embeds, pooled_prompt_embeds,
            max_sequence_length, lora_scale,
        )  # fmt: skip

    def encode_image(self, image: Any, device: Any, num_images_per_prompt: int) -> Tensor:
        """The image encoder's last states; (B, L, D)."""
        dtype = next(self.image_encoder.parameters()).dtype
        pixels = self.feature_extractor.preprocess(
            images=image, do_resize=True, return_tensors="pt", do_convert_rgb=True
        ).to(device=device, dtype=dtype)
        states = self.image_encoder(**pixels).last_hidden_state
        return states.repeat_interleave(num_images_per_prompt, dim=0)  # type: ignore[no-any-return]

    def check_inputs(
        self,
        image: Any,
        prompt: Any,
        prompt_2: Any,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        prompt_embeds_scale: Any = 1.0,
        pooled_prompt_embeds_scale: Any = 1.0,
    ) -> None:
        """Raise ``ValueError`` for both forms of prompt, or not as many prompts or scales as pictures."""
        if (prompt is not None or prompt_2 is not None) and prompt_embeds is not None:
            raise ValueError("both `prompt` and `prompt_embeds` were given; give one of them")
        count = _count(image)
        if isinstance(prompt, (list, tuple)) and len(prompt) != count:
            raise ValueError(f"{len(prompt)} prompts for {count} pictures: give one, or one for each")
        for scale in (prompt_embeds_scale, pooled_prompt_embeds_scale):
            _scales(scale, count)

    @torch.no_grad()
    def __call__(
        self,
        image: Any,
        prompt: Any = None,
        prompt_2: Any = None,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        prompt_embeds_scale: Any = 1.0,
        pooled_prompt_embeds_scale: Any = 1.0,
        return_dict: bool = True,
    ) -> Any:
        """Embeddings of ``prompt`` (or of nothing) with the pictures' behind, summed over the pictures.

        Raises:
            ValueError: both forms of prompt, or not as many prompts or scales as pictures.
        """
        device, count = self._execution_device, _count(image)
        given = (prompt_embeds, pooled_prompt_embeds, prompt_embeds_scale, pooled_prompt_embeds_scale)
        self.check_inputs(image, prompt, prompt_2, *given)
        scales = [_scales(s, count) for s in given[2:]]
        seen = self.image_embedder(self.encode_image(image, device, 1)).image_embeds.to(device)
        if self.text_encoder is None or self.text_encoder_2 is None:
            text = torch.zeros(count, 512, 4096, device=device, dtype=seen.dtype)
            pooled = torch.zeros(count, 768, device=device, dtype=seen.dtype)
        else:
            texts = as_list(prompt, count)
            text, pooled, _ = self.encode_prompt(
                texts, prompt_2, device, 1, prompt_embeds, pooled_prompt_embeds, max_sequence_length=512
            )
        tokens = torch.cat([text, seen], dim=1) * _column(scales[0], text)[:, :, None]
        pooled = pooled * _column(scales[1], pooled)
        tokens, pooled = tokens.sum(dim=0, keepdim=True), pooled.sum(dim=0, keepdim=True)
        self.maybe_free_model_hooks()
        if not return_dict:
            return tokens, pooled
        return FluxPriorReduxPipelineOutput(prompt_embeds=tokens, pooled_prompt_embeds=pooled)


def _count(image: Any) -> int:
    """How many pictures there are."""
    return len(image) if isinstance(image, (list, tuple)) or torch.is_tensor(image) else 1


def _scales(scale: Any, count: int) -> list[float]:
    scales = list(scale) if isinstance(scale, (list, tuple)) else [scale] * count
    if len(scales) != count:
        raise ValueError(f"{len(scales)} scales for {count} pictures: give one, or one for each")
    return scales


def _column(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, device=like.device, dtype=like.dtype)[:, None]
