"""What pipelines return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..core.outputs import BaseOutput


@dataclass
class ImagePipelineOutput(BaseOutput):
    """Pictures: a list of PIL images, an array (B, H, W, C), a tensor (B, C, H, W), or latents."""

    images: Any


@dataclass
class StableDiffusionPipelineOutput(BaseOutput):
    """Pictures, and for each whether the safety checker flagged it (``None`` without a checker)."""

    images: Any
    nsfw_content_detected: list[bool] | None = None


@dataclass
class StableDiffusionXLPipelineOutput(BaseOutput):
    """Pictures: a list of PIL images, an array (B, H, W, C), a tensor (B, C, H, W), or latents."""

    images: Any


@dataclass
class FluxPipelineOutput(BaseOutput):
    """Pictures: a list of PIL images, an array (B, H, W, C), a tensor (B, C, H, W), or packed latents."""

    images: Any


@dataclass
class StableDiffusion3PipelineOutput(BaseOutput):
    """Pictures: a list of PIL images, an array (B, H, W, C), a tensor (B, C, H, W), or latents."""

    images: Any


@dataclass
class QwenImagePipelineOutput(BaseOutput):
    """Pictures: a list of PIL images, an array (B, H, W, C), a tensor (B, C, H, W), or packed latents."""

    images: Any


@dataclass
class FluxPriorReduxPipelineOutput(BaseOutput):
    """A prompt made of pictures: tokens (B, L, D) and the pooled vector (B, D)."""

    prompt_embeds: Any
    pooled_prompt_embeds: Any
