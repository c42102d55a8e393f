"""FLUX.1 with control networks, single, union or several."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..blocks.latents import pack
from ..core.random import Generators
from ..core.types import Cond, ModelInput
from .control import control_latents, control_of, control_pixels


def read_controlnet(
    family: Any,
    components: Mapping[str, Any],
    device: torch.device,
    batch: int,
    height: int,
    width: int,
    image_processor: Any,
    control_image: Any,
    conds: dict[str, Cond],
    controlnet: Any,
    control_mode: Any = None,
    controlnet_conditioning_scale: Any = 1.0,
    control_guidance_start: Any = 0.0,
    control_guidance_end: Any = 1.0,
    guidance_scale: float = 3.5,
    generator: Generators = None,
) -> dict[str, Any]:
    """ControlNet: prepare the control pictures and what asks the control network(s) at each step."""
    several = hasattr(controlnet, "nets")
    nets = list(controlnet.nets) if several else [controlnet]
    images = list(control_image) if several else [control_image]
    modes = list(control_mode) if isinstance(control_mode, (list, tuple)) else [control_mode] * len(images)
    ready = []
    for index, image in enumerate(images):
        pixels = control_pixels(image, image_processor, height, width, batch, device, components["vae"].dtype)
        if nets[min(index, len(nets) - 1)].input_hint_block is None:
            pixels = pack(control_latents(family, components["vae"], pixels, generator), family.packing)
        ready.append(pixels)
    kinds = [_mode(mode, batch, device, several) for mode in modes]
    guidance = None
    if nets[0].config.guidance_embeds:
        guidance = torch.full([batch], guidance_scale, device=device, dtype=torch.float32)
    positive = conds["positive"]

    def ask(inputs: ModelInput, scales: Any) -> dict[str, Any]:
        blocks, single_blocks = controlnet(
            hidden_states=inputs.x,
            controlnet_cond=ready if several else ready[0],
            controlnet_mode=kinds if several else kinds[0],
            conditioning_scale=scales,
            timestep=inputs.t.expand(inputs.x.shape[0]).to(inputs.x.dtype) / 1000,
            guidance=guidance,
            pooled_projections=positive.pooled,
            encoder_hidden_states=positive.tokens,
            joint_attention_kwargs=inputs.attention,
            return_dict=False,
            **inputs.positions,
        )
        return {
            "controlnet_block_samples": blocks,
            "controlnet_single_block_samples": single_blocks,
            "controlnet_blocks_repeat": nets[0].input_hint_block is not None or None,
        }

    return {
        "control": control_of(
            controlnet, ask, len(images), controlnet_conditioning_scale, control_guidance_start, control_guidance_end,
            once=True,
        )
    }  # fmt: skip


def _mode(mode: int | None, batch: int, device: torch.device, several: bool) -> Tensor | None:
    """The kind of control for a union network; (B, 1), or (B,) where there are several networks."""
    if mode is None or (isinstance(mode, int) and mode < 0):
        return None
    shape = (batch,) if several else (batch, 1)
    return torch.full(shape, mode, device=device, dtype=torch.long)
