"""Stable Diffusion 3 with control networks: edges or poses, and the networks that paint inside a mask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..blocks.latents import retrieve_latents, start_from_noise
from ..core.types import Cond, ModelInput
from .control import control_of, control_pixels


def read_controlnet(
    family: Any,
    components: Mapping[str, Any],
    device: torch.device,
    batch: int,
    height: int,
    width: int,
    image_processor: Any,
    mask_processor: Any,
    control_image: Any,
    conds: dict[str, Cond],
    controlnet: Any,
    control_mask: Any = None,
    controlnet_conditioning_scale: Any = 1.0,
    control_guidance_start: Any = 0.0,
    control_guidance_end: Any = 1.0,
    controlnet_pooled_projections: Tensor | None = None,
) -> dict[str, Any]:
    """Prepare the control pictures and what asks the control network(s) at each step."""
    several = hasattr(controlnet, "nets")
    config = (controlnet.nets[0] if several else controlnet).config
    dtype = conds["positive"].tokens.dtype  # type: ignore[union-attr]
    branches = len(conds)
    images = list(control_image) if several else [control_image]
    ready = []
    for image in images:
        if control_mask is None:
            pixels = control_pixels(image, image_processor, height, width, batch, device, dtype)
            pixels = torch.cat([pixels] * branches)  # each branch gets a sample of its own
            ready.append(_latents(components["vae"], config, pixels))
        else:
            where = (height, width, batch, device, dtype)
            pixels = control_pixels(image, image_processor, *where)
            holes = control_pixels(control_mask, mask_processor, *where)
            ready.append(torch.cat([masked_picture(components["vae"], config, pixels, holes)] * branches))

    def ask(inputs: ModelInput, scales: Any) -> dict[str, Any]:
        pooled = inputs.cond.pooled
        if controlnet_pooled_projections is not None and not config.force_zeros_for_pooled_projection:
            pooled = controlnet_pooled_projections
        elif config.force_zeros_for_pooled_projection or control_mask is not None:
            pooled = torch.zeros_like(pooled)  # type: ignore[arg-type]
        seen = [image[-inputs.x.shape[0] :] for image in ready]  # the last rows are the positive branch's
        samples = controlnet(
            hidden_states=inputs.x,
            timestep=inputs.t.expand(inputs.x.shape[0]),
            encoder_hidden_states=inputs.cond.tokens if config.joint_attention_dim is not None else None,
            pooled_projections=pooled,
            joint_attention_kwargs=inputs.attention,
            controlnet_cond=seen if several else seen[0],
            conditioning_scale=scales,
            return_dict=False,
        )[0]
        return {"block_controlnet_hidden_states": samples}

    values = (controlnet_conditioning_scale, control_guidance_start, control_guidance_end)
    return {"control": control_of(controlnet, ask, len(images), *values)}


def _latents(vae: Any, config: Any, pixels: Tensor) -> Tensor:
    """Latents of a control picture; networks without text were trained on ones without the VAE's shift.

    They are a sample drawn with torch's global generator, as the ecosystem does: the run's own is for its noise.
    """
    z = retrieve_latents(vae.encode(pixels.to(vae.dtype))).to(pixels.dtype)
    shift = 0.0 if config.force_zeros_for_pooled_projection else vae.config.shift_factor
    return (z - shift) * vae.config.scaling_factor  # type: ignore[no-any-return]


def masked_picture(vae: Any, config: Any, pixels: Tensor, holes: Tensor) -> Tensor:
    """Latents of the picture with the mask cut out, and the mask as one more channel (1 = keep)."""
    z = _latents(vae, config, torch.where(holes.repeat(1, 3, 1, 1) > 0.5, -1.0, pixels))
    keep = 1 - torch.nn.functional.interpolate(holes, size=z.shape[-2:])
    return torch.cat([z, keep], dim=1)


SD3_STARTS = {
    "controlnet": lambda family: [
        ("read_controlnet", read_controlnet),
        ("set_timesteps", family.schedule),
        ("start", start_from_noise),
    ],
    "controlnet_inpaint": lambda family: [
        ("read_controlnet", read_controlnet),
        ("set_timesteps", family.schedule),
        ("start", start_from_noise),
    ],
}
