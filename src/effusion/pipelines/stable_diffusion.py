"""The classic faces of Stable Diffusion 1.x and 2.x."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core import lazy, log
from ..core.types import State
from ..families import stable_diffusion as sd
from .methods.checks import checks
from .methods.clip import StableDiffusionMethods
from .methods.unet import FromImage, FromNoise, InsideMask
from .mixins import StableDiffusionMixin
from .outputs import StableDiffusionPipelineOutput

logger = log.get_logger(__name__)


class StableDiffusionBase(StableDiffusionMixin, StableDiffusionMethods):
    """What the faces of Stable Diffusion share: components and ``encode_prompt``."""

    family = sd.STABLE_DIFFUSION
    output_class = StableDiffusionPipelineOutput
    model_cpu_offload_seq = "text_encoder->image_encoder->unet->vae"
    _optional_components = ["safety_checker", "feature_extractor", "image_encoder"]
    _exclude_from_cpu_offload = ["safety_checker"]
    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds"]
    # what the schedulers of these networks have to say, and those of the first checkpoints don't
    _scheduler_settings: ClassVar[Mapping[str, Any]] = {"steps_offset": 1, "clip_sample": False}

    def __init__(
        self,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        unet: Any,
        scheduler: Any,
        safety_checker: Any,
        feature_extractor: Any,
        image_encoder: Any = None,
        requires_safety_checker: bool = True,
    ) -> None:
        super().__init__()
        check_safety_parts(safety_checker, feature_extractor)
        _put_right(scheduler, self._scheduler_settings)
        if self._scheduler_settings and _is_older(unet, (0, 9)) and unet.config.sample_size < 64:
            _put_right(unet, {"sample_size": 64})
        self._register(locals())

    def encode_prompt(
        self,
        prompt: Any,
        device: Any,
        num_images_per_prompt: int,
        do_classifier_free_guidance: bool,
        negative_prompt: Any = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Embeddings of the prompt and the negative prompt, each (B, L, D); the latter ``None`` without guidance."""
        with torch.no_grad():
            conds = sd.encode(
                self.components, torch.device(device or self._execution_device), prompt, negative_prompt, prompt_embeds,
                negative_prompt_embeds, num_images_per_prompt, do_classifier_free_guidance, clip_skip,
            )["conds"]  # fmt: skip
        return conds["positive"].tokens, conds["negative"].tokens if "negative" in conds else negative_prompt_embeds

    def _result(self, state: State) -> Any:
        flags = state.get("nsfw_content_detected")
        if not state.get("return_dict", True):
            return state.images, flags
        return self.output_class(images=state.images, nsfw_content_detected=flags)


def check_safety_parts(safety_checker: Any, feature_extractor: Any) -> None:
    if safety_checker is not None and feature_extractor is None:
        raise ValueError("a `safety_checker` needs a `feature_extractor`; give both, or neither")


def _put_right(component: Any, settings: Mapping[str, Any]) -> None:
    """Change entries of the configuration that files of old have wrong, as the ecosystem does."""
    config = getattr(component, "config", {})
    wrong = {k: v for k, v in settings.items() if k in config and config[k] != v}
    if wrong:
        name = type(component).__name__
        logger.warning("%s has %s; taken as %s", name, {k: config[k] for k in wrong}, wrong)
        component.register_to_config(**wrong)


def _is_older(component: Any, version: tuple[int, int]) -> bool:
    """Whether a component was saved in a format before ``version``."""
    saved = str(getattr(component, "config", {}).get("_diffusers_version", ""))
    found = re.match(r"(\d+)\.(\d+)", saved)
    return found is not None and (int(found[1]), int(found[2])) < version


class StableDiffusionPipeline(FromNoise, StableDiffusionBase):
    """Text to image with Stable Diffusion 1.x and 2.x."""

    task = "text2image"
    check_inputs = checks(
        "prompt, height, width, callback_steps, negative_prompt=None, prompt_embeds=None, "
        "negative_prompt_embeds=None, ip_adapter_image=None, ip_adapter_image_embeds=None, "
        "callback_on_step_end_tensor_inputs=None"
    )

    def __call__(
        self,
        prompt: Any = None,
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
        guidance_rescale: float = 0.0,
        clip_skip: int | None = None,
        callback_on_step_end: Any = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006
        **kwargs: Any,
    ) -> Any:
        """Make pictures of ``prompt``; returns :class:`StableDiffusionPipelineOutput`."""
        return self._generate(locals())


class StableDiffusionImg2ImgPipeline(FromImage, StableDiffusionBase):
    """Image to image with Stable Diffusion 1.x and 2.x (SDEdit, Meng et al. 2021)."""

    task = "image2image"
    check_inputs = checks(
        "prompt, strength, callback_steps, negative_prompt=None, prompt_embeds=None, "
        "negative_prompt_embeds=None, ip_adapter_image=None, ip_adapter_image_embeds=None, "
        "callback_on_step_end_tensor_inputs=None"
    )

    def __call__(
        self,
        prompt: Any = None,
        image: Any = None,
        strength: float = 0.8,
        num_inference_steps: int | None = 50,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float | None = 7.5,
        negative_prompt: Any = None,
        num_images_per_prompt: int | None = 1,
        eta: float | None = 0.0,
        generator: Any = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
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


class StableDiffusionInpaintPipeline(InsideMask, StableDiffusionBase):
    """Inpainting with Stable Diffusion 1.x and 2.x, with 9-channel networks and with ordinary ones."""

    task = "inpaint"
    _scheduler_settings = {"steps_offset": 1, "skip_prk_steps": True}
    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds", "mask", "masked_image_latents"]
    check_inputs = checks(
        "prompt, image, mask_image, height, width, strength, callback_steps, output_type, "
        "negative_prompt=None, prompt_embeds=None, negative_prompt_embeds=None, ip_adapter_image=None, "
        "ip_adapter_image_embeds=None, callback_on_step_end_tensor_inputs=None, padding_mask_crop=None"
    )

    def __call__(
        self,
        prompt: Any = None,
        image: Any = None,
        mask_image: Any = None,
        masked_image_latents: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        padding_mask_crop: int | None = None,
        strength: float = 1.0,
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
        clip_skip: int | None = None,
        callback_on_step_end: Any = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006
        **kwargs: Any,
    ) -> Any:
        """Paint ``prompt`` where ``mask_image`` is white, keeping the rest of ``image``."""
        return self._generate(locals())


# the ecosystem has the checker under this path too; it imports transformers, so not before somebody asks
__getattr__, __dir__, _ = lazy.attach(__name__, {"StableDiffusionSafetyChecker": "effusion.models.safety_checker"})
