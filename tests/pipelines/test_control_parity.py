"""Stable Diffusion with control networks against the peer: same files, same call, same latents after each step."""

from __future__ import annotations

import diffusers
import pytest

import effusion

from .conftest import Pipes
from .inputs import mask, picture, tensor
from .test_parity import (
    ANCESTRAL,
    CROP,
    EMBEDS,
    GENERATORS,
    KARRAS,
    SCORES,
    SIZES,
    START,
    TWO,
    XL_EMBEDS,
    Case,
    compare,
    with_scheduler,
)

SD, SD_I2I, SD_INPAINT = (f"StableDiffusionControlNet{kind}Pipeline" for kind in ("", "Img2Img", "Inpaint"))
XL, XL_I2I, XL_INPAINT = (f"StableDiffusionXLControlNet{kind}Pipeline" for kind in ("", "Img2Img", "Inpaint"))

EDGES = {"image": lambda: picture(seed=9)}
BOTH = {"image": lambda: [picture(seed=9), picture(seed=8)], "controlnet_conditioning_scale": [0.5, 1.5]}
REDO = {"image": picture, "control_image": lambda: picture(seed=9), "num_inference_steps": 4}
REDO_BOTH = {**REDO, "control_image": lambda: [picture(seed=9), picture(seed=8)]}
PAINT = {**REDO, "mask_image": mask, "num_inference_steps": 3}
PAINT_BOTH = {**PAINT, "control_image": lambda: [picture(seed=9), picture(seed=8)]}
CROPPED = {**CROP, "control_image": lambda: picture(64, seed=9)}
WINDOW = {"control_guidance_start": 0.2, "control_guidance_end": 0.8, "num_inference_steps": 6}
WINDOWS = {"control_guidance_start": [0.0, 0.5], "control_guidance_end": [0.5, 1.0], "num_inference_steps": 6}
GUESS = {"guess_mode": True, "controlnet_conditioning_scale": 0.7}
LARGE = {"image": lambda: picture(48, seed=9)}

CASES = [
    Case("sd", SD, "sd-control", EDGES),
    Case("sd no guidance", SD, "sd-control", {**EDGES, "guidance_scale": 1.0}),
    Case("sd scale", SD, "sd-control", {**EDGES, "controlnet_conditioning_scale": 0.3}),
    Case("sd two prompts, four images", SD, "sd-control", {**EDGES, **TWO, "num_images_per_prompt": 2}),
    Case("sd picture per prompt", SD, "sd-control", {**TWO, "image": lambda: [picture(seed=9), picture(seed=8)]}),
    Case("sd generators", SD, "sd-control", {**EDGES, **TWO, **GENERATORS}, ANCESTRAL),
    Case("sd embeds", SD, "sd-control", {**EDGES, **EMBEDS}),
    Case("sd guess", SD, "sd-control", {**EDGES, **GUESS, **TWO}),
    Case("sd guess, no guidance", SD, "sd-control", {**EDGES, **GUESS, "guidance_scale": 1.0}),
    Case("sd window", SD, "sd-control", {**EDGES, **WINDOW}),
    Case("sd size of the picture", SD, "sd-control", LARGE),
    Case("sd size given", SD, "sd-control", {**LARGE, "height": 16, "width": 40}),
    Case("sd width given", SD, "sd-control", {**LARGE, "width": 24}),
    Case("sd tensor", SD, "sd-control", {"image": lambda: tensor(1, 3, 48, 32).sigmoid()}),
    Case("sd tensor, size given", SD, "sd-control", {"image": lambda: tensor(1, 3, 48, 32).sigmoid(), "height": 32}),
    Case("sd gray picture", SD, "sd-control", {"image": mask}),
    Case("sd latents given", SD, "sd-control", {**EDGES, "latents": lambda: tensor(1, 4, 16, 16)}),
    Case("sd timesteps", SD, "sd-control", {**EDGES, "timesteps": [901, 601, 301, 1]}, "DDPMScheduler"),
    Case("sd attention kwargs", SD, "sd-control", {**EDGES, "cross_attention_kwargs": {"scale": 0.5}}),
    Case("sd dpm++ karras", SD, "sd-control", {**EDGES, "num_inference_steps": 4}, "DPMSolverMultistepScheduler", KARRAS),
    Case("sd heun window", SD, "sd-control", {**EDGES, **WINDOW}, "HeunDiscreteScheduler"),
    Case("sd shuffle", SD, "sd-control-shuffle", EDGES),
    Case("sd several", SD, "sd-controls", BOTH),
    Case("sd several, one scale", SD, "sd-controls", {**BOTH, "controlnet_conditioning_scale": 0.7}),
    Case("sd several, guess", SD, "sd-controls", {**BOTH, "guess_mode": True}),
    Case("sd several, windows", SD, "sd-controls", {**BOTH, **WINDOWS}),
    Case("sd several, window", SD, "sd-controls", {**BOTH, **WINDOW}),
    Case(
        "sd several, pictures per prompt", SD, "sd-controls",
        {**TWO, "image": lambda: [[picture(seed=s), picture(seed=s + 1)] for s in (6, 8)], "num_images_per_prompt": 2},
    ),
    Case("i2i", SD_I2I, "sd-control", REDO),
    Case("i2i weak, ancestral", SD_I2I, "sd-control", {**REDO, **TWO, "strength": 0.5}, ANCESTRAL),
    Case("i2i guess, window", SD_I2I, "sd-control", {**REDO, **GUESS, **WINDOW}),
    Case("i2i generators", SD_I2I, "sd-control", {**REDO, **TWO, **GENERATORS}),
    Case("i2i several", SD_I2I, "sd-controls", REDO_BOTH),
    Case("i2i size given", SD_I2I, "sd-control", {**REDO, "image": lambda: picture(64), "height": 32, "width": 48}),
    Case("i2i latents as picture", SD_I2I, "sd-control", {**REDO, "image": lambda: tensor(1, 4, 16, 16)}),
    Case("inpaint", SD_INPAINT, "sd-control", PAINT),
    Case("inpaint weak", SD_INPAINT, "sd-control", {**PAINT, "strength": 0.5, "num_inference_steps": 5}),
    Case("inpaint ancestral", SD_INPAINT, "sd-control", {**PAINT, **TWO, "num_images_per_prompt": 2}, ANCESTRAL),
    Case("inpaint guess, window", SD_INPAINT, "sd-control", {**PAINT, **GUESS, **WINDOW}),
    Case("inpaint several", SD_INPAINT, "sd-controls", PAINT_BOTH),
    Case("inpaint crop", SD_INPAINT, "sd-control", CROPPED),
    Case(
        "inpaint size of the picture", SD_INPAINT, "sd-control",
        {"image": lambda: picture(48), "control_image": lambda: picture(48, seed=9), "mask_image": lambda: mask(48)},
    ),
    Case("inpaint9", SD_INPAINT, "sd9-control", {**PAINT, **TWO}),
    Case("inpaint9 weak", SD_INPAINT, "sd9-control", {**PAINT, "strength": 0.5, "num_inference_steps": 5}),
    Case("inpaint9 crop", SD_INPAINT, "sd9-control", CROPPED),
    Case("xl", XL, "xl-control", EDGES),
    Case("xl two prompts, four images", XL, "xl-control", {**EDGES, **TWO, "num_images_per_prompt": 2}),
    Case("xl embeds", XL, "xl-control", {**EDGES, **XL_EMBEDS}),
    Case("xl guess, window", XL, "xl-control", {**EDGES, **GUESS, **WINDOW, "prompt_2": "a hat"}),
    Case("xl sizes", XL, "xl-control", {**EDGES, **SIZES}),
    Case("xl sizes, guess, four images", XL, "xl-control", {**EDGES, **SIZES, **GUESS, **TWO, "num_images_per_prompt": 2}),
    Case("xl size of the picture", XL, "xl-control", LARGE),
    Case("xl denoising end", XL, "xl-control", {**EDGES, "denoising_end": 0.6, "num_inference_steps": 5}),
    Case("xl several, windows", XL, "xl-controls", {**BOTH, **WINDOWS}),
    Case("xl i2i", XL_I2I, "xl-control", REDO),
    Case("xl i2i sizes, two", XL_I2I, "xl-control", {**REDO, **SIZES, **TWO}),
    Case("xl i2i guess, window", XL_I2I, "xl-control", {**REDO, **GUESS, **WINDOW}),
    Case("xl i2i several", XL_I2I, "xl-controls", REDO_BOTH),
    Case("refiner i2i scores", XL_I2I, "refiner-control", {**REDO, **SIZES, **SCORES}),
    Case("xl inpaint", XL_INPAINT, "xl-control", PAINT),
    Case("xl inpaint full, guess", XL_INPAINT, "xl-control", {**PAINT, **GUESS, "strength": 1.0}),
    Case("xl inpaint rescale, window", XL_INPAINT, "xl-control", {**PAINT, **WINDOW, "guidance_rescale": 0.3, **TWO}),
    Case("xl inpaint start", XL_INPAINT, "xl-control", {**PAINT, **START}),
    Case("xl inpaint several", XL_INPAINT, "xl-controls", PAINT_BOTH),
    Case("xl inpaint crop", XL_INPAINT, "xl-control", CROPPED),
    Case(
        "xl inpaint size of the picture", XL_INPAINT, "xl-control",
        {"image": lambda: picture(48), "control_image": lambda: picture(48, seed=9), "mask_image": lambda: mask(48)},
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_face_equals_the_peers(case: Case, ours: Pipes, theirs: Pipes) -> None:
    a = with_scheduler(ours(case.face, case.checkpoint), effusion, case.scheduler, case.scheduler_config)
    b = with_scheduler(theirs(case.face, case.checkpoint), diffusers, case.scheduler, case.scheduler_config)
    compare(a, b, case)
