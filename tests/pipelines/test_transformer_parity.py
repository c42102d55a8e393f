"""The transformer families against the peer: same files, same call, same latents after each step, same pictures."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

import effusion

from . import tiny_transformers
from .conftest import Pipes
from .inputs import generator, mask, picture, tensor
from .test_parity import RELATIVE, Case, compare, relative, run

SMALL = {"height": 32, "width": 32}
UNBINNED = {**SMALL, "use_resolution_binning": False}
T5 = {**SMALL, "max_sequence_length": 16}
IMAGE = {"image": picture, "num_inference_steps": 5}
PAINT = {**IMAGE, "mask_image": mask}
NEGATIVE = {"negative_prompt": "blurry", "true_cfg_scale": 3.0}
TWO = {"num_images_per_prompt": 2}
KONTEXT = {**T5, "max_area": 32 * 32, "_auto_resize": False}
CONTROL = {
    "control_image": lambda: picture(seed=9),
    "controlnet_conditioning_scale": 0.7,
    "num_inference_steps": 4,
}


QWEN = {
    **SMALL,
    "prompt": None,
    "prompt_embeds": lambda: tensor(1, 7, 16),
    "prompt_embeds_mask": lambda: torch.ones(1, 7, dtype=torch.long),
}
QWEN_NEGATIVE = {
    "negative_prompt_embeds": lambda: tensor(1, 5, 16, seed=4),
    "negative_prompt_embeds_mask": lambda: torch.tensor([[1, 1, 1, 0, 0]]),
    "true_cfg_scale": 3.0,
}

CASES = [
    Case("flux", "FluxPipeline", "flux", T5),
    Case("flux-size", "FluxPipeline", "flux", {**T5, "height": 40, "width": 24}),
    Case("flux-dev-cfg", "FluxPipeline", "flux-dev", {**T5, **NEGATIVE, **TWO, "prompt_2": "a hat"}),
    Case("flux-lists", "FluxPipeline", "flux-dev", {**T5, "prompt": ["a cat", "a dog"], "guidance_scale": 2.0}),
    Case("flux-sigmas", "FluxPipeline", "flux", {**T5, "sigmas": [1.0, 0.6, 0.2]}),
    Case("flux-i2i", "FluxImg2ImgPipeline", "flux", {**T5, **IMAGE, "strength": 0.7}),
    Case("flux-inpaint", "FluxInpaintPipeline", "flux", {**T5, **PAINT, "strength": 0.7}),
    Case("flux-inpaint-full", "FluxInpaintPipeline", "flux", {**T5, **PAINT, **TWO, "strength": 1.0}),
    Case("flux-fill", "FluxFillPipeline", "flux-fill", {**T5, **PAINT}),
    Case("flux-control", "FluxControlPipeline", "flux-control", {**T5, "control_image": picture}),
    Case("flux-control-i2i", "FluxControlImg2ImgPipeline", "flux-control", {**T5, **IMAGE, "control_image": picture}),
    Case("flux-control-paint", "FluxControlInpaintPipeline", "flux-control", {**T5, **PAINT, "control_image": picture}),
    Case("flux-kontext", "FluxKontextPipeline", "flux-kontext", {**KONTEXT, "image": picture}),
    Case("flux-kontext-text", "FluxKontextPipeline", "flux-kontext", {**KONTEXT, "max_area": 48 * 32}),
    Case("flux-controlnet", "FluxControlNetPipeline", "flux-controlnet", {**T5, **CONTROL}),
    Case(
        "flux-controlnet-part", "FluxControlNetPipeline", "flux-controlnet",
        {**T5, **CONTROL, **NEGATIVE, **TWO, "control_guidance_start": 0.2, "control_guidance_end": 0.7},
    ),
    Case("flux-union", "FluxControlNetPipeline", "flux-union", {**T5, **CONTROL, "control_mode": 2}),
    Case(
        "flux-controlnet-i2i", "FluxControlNetImg2ImgPipeline", "flux-controlnet",
        {**T5, **IMAGE, **CONTROL, "num_inference_steps": 5},
    ),
    Case(
        "flux-controlnet-paint", "FluxControlNetInpaintPipeline", "flux-controlnet",
        {**T5, **PAINT, **CONTROL, "num_inference_steps": 5},
    ),
    Case("sd3", "StableDiffusion3Pipeline", "sd3", SMALL),
    Case(
        "sd3-three", "StableDiffusion3Pipeline", "sd3",
        {**T5, **TWO, "prompt_2": "a hat", "prompt_3": "a bat", "negative_prompt": "blurry"},
    ),
    Case(
        "sd3-skip", "StableDiffusion3Pipeline", "sd3",
        {**SMALL, "num_inference_steps": 6, "skip_guidance_layers": [0], "skip_layer_guidance_stop": 0.5},
    ),
    Case("sd3-i2i", "StableDiffusion3Img2ImgPipeline", "sd3", {**SMALL, **IMAGE}),
    Case("qwen", "QwenImagePipeline", "qwen", QWEN),
    Case("qwen-cfg", "QwenImagePipeline", "qwen", {**QWEN, **QWEN_NEGATIVE, **TWO}),
    Case("qwen-i2i", "QwenImageImg2ImgPipeline", "qwen", {**QWEN, **IMAGE, "strength": 0.7}),
    Case("qwen-inpaint", "QwenImageInpaintPipeline", "qwen", {**QWEN, **PAINT, "strength": 0.7}),
]  # fmt: skip
SILENT = [  # faces that take no `callback_on_step_end`
    Case("alpha", "PixArtAlphaPipeline", "pixart-alpha", {**UNBINNED, **TWO}),
    Case("alpha-size", "PixArtAlphaPipeline", "pixart-alpha", {**UNBINNED, "negative_prompt": "blurry"}),
    Case("sigma", "PixArtSigmaPipeline", "pixart-sigma", UNBINNED),
    Case("sigma-free", "PixArtSigmaPipeline", "pixart-sigma", {**UNBINNED, "guidance_scale": 1.0}),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_face_equals_the_peers(case: Case, ours: Pipes, theirs: Pipes) -> None:
    compare(ours(case.face, case.checkpoint), theirs(case.face, case.checkpoint), case)


@pytest.mark.parametrize("case", SILENT, ids=lambda c: c.name)
def test_silent_face_equals_the_peers(case: Case, ours: Pipes, theirs: Pipes) -> None:
    found = []
    for pipe in (ours(case.face, case.checkpoint), theirs(case.face, case.checkpoint)):
        steps: list[torch.Tensor] = []
        output = pipe(**case.inputs(), callback=lambda i, t, x, steps=steps: steps.append(x.clone()))
        found.append((steps, output.images))
    (a, x), (b, y) = found
    assert len(a) == len(b) > 0
    assert max(relative(p, q) for p, q in zip(a, b, strict=True)) <= RELATIVE
    assert relative(x, y) <= RELATIVE


def test_several_control_networks_equal_the_peers(ours: Pipes, theirs: Pipes) -> None:
    """The same network twice; a list of networks is several of them."""
    call = {
        **T5, "control_image": [picture(seed=9), picture(seed=8)], "control_mode": [0, 2],
        "controlnet_conditioning_scale": [0.4, 0.6],
    }  # fmt: skip
    found = []
    for library, pipes in ((effusion, ours), (diffusers, theirs)):
        single = pipes("FluxControlNetPipeline", "flux-union")
        net = single.components["controlnet"]
        pipe = library.FluxControlNetPipeline(**{**single.components, "controlnet": [net, net]})
        pipe.set_progress_bar_config(disable=True)
        found.append(pipe)
    compare(*found, Case("", "", "", call))


@pytest.mark.parametrize(
    ("face", "name", "more"),
    [
        ("StableDiffusion3ControlNetPipeline", "sd3-controlnet", TWO),
        (
            "StableDiffusion3ControlNetInpaintingPipeline",
            "sd3-controlnet-mask",
            {"control_mask": mask, "control_guidance_end": 0.6},
        ),
    ],
)
def test_sd3_with_a_control_network_equals_the_peers(
    face: str, name: str, more: dict[str, Any], ours: Pipes, theirs: Pipes
) -> None:
    """The control picture's latents are drawn with the global generator, so that is seeded before each run."""
    found = []
    for pipe in (ours(face, name), theirs(face, name)):
        torch.manual_seed(11)
        found.append(run(pipe, Case("", face, name, {**SMALL, **CONTROL, **more}).inputs()))
    (a, x), (b, y) = found
    assert len(a) == len(b) > 0
    assert max(relative(p, q) for p, q in zip(a, b, strict=True)) <= RELATIVE
    assert relative(x.images, y.images) <= RELATIVE


def test_redux_equals_the_peers(ours: Pipes, theirs: Pipes) -> None:
    call = {"image": [picture(), picture(seed=5)], "prompt_embeds_scale": [0.5, 1.0]}
    a, b = (pipes("FluxPriorReduxPipeline", "flux-redux")(**call) for pipes in (ours, theirs))
    assert a.prompt_embeds.shape == b.prompt_embeds.shape
    assert relative(a.prompt_embeds, b.prompt_embeds) <= RELATIVE
    assert relative(a.pooled_prompt_embeds + 1, b.pooled_prompt_embeds + 1) <= RELATIVE


@pytest.mark.parametrize("scale", [4.0, 1.0])
def test_dit_equals_the_peers(scale: float, ours: Pipes, theirs: Pipes) -> None:
    call = {"class_labels": [1, 207], "num_inference_steps": 3, "guidance_scale": scale, "output_type": "np"}
    a, b = (pipes("DiTPipeline", "dit")(**call, generator=generator()).images for pipes in (ours, theirs))
    assert relative(a, b) <= RELATIVE


@pytest.mark.parametrize(("name", "strength"), [("sd3", 0.6), ("sd3", 1.0), ("sd3-33", 0.6), ("sd3-33", 1.0)])
def test_sd3_inpainting_equals_the_peers(name: str, strength: float, ours: Pipes, theirs: Pipes) -> None:
    """Latents only: the peer decodes them without the VAE's shift, which its other pipelines don't forget."""
    case = Case(name, "", name, {**SMALL, **PAINT, **TWO, "strength": strength, "output_type": "latent"})
    face = "StableDiffusion3InpaintPipeline"
    compare(ours(face, name), theirs(face, name), case)


def test_sd3_runs_without_any_of_its_encoders(ours: Pipes) -> None:
    """The peer lets T5 be missing; ours lets each."""
    parts = ours("StableDiffusion3Pipeline", "sd3").components
    for missing in (["text_encoder_3"], ["text_encoder"], ["text_encoder", "text_encoder_2"]):
        pipe = effusion.StableDiffusion3Pipeline(**{**parts, **dict.fromkeys(missing)})
        pipe.set_progress_bar_config(disable=True)
        images = pipe("a cat", **SMALL, num_inference_steps=1, output_type="np").images
        assert images.shape == (1, 32, 32, 3)


def test_kontext_sizes_are_the_peers() -> None:
    """A whole reference picture is too slow for a test: only the choice of its size is compared."""
    from diffusers.pipelines.flux import pipeline_flux_kontext as peer

    from effusion.families.flux_tasks import KONTEXT_SIZES

    assert [tuple(size) for size in peer.PREFERRED_KONTEXT_RESOLUTIONS] == list(KONTEXT_SIZES)


def test_pixart_bins_are_the_peers() -> None:
    from diffusers.pipelines.pixart_alpha import pipeline_pixart_sigma as peer

    from effusion.families.pixart import nearest_bin

    for side, name in ((256, "256"), (512, "512"), (1024, "1024"), (2048, "2048")):
        bins = getattr(peer, f"ASPECT_RATIO_{name}_BIN")
        for height in range(side // 4, side * 3, side // 8):
            for width in range(side // 4, side * 3, side // 8):
                expected = min(bins, key=lambda ratio: abs(float(ratio) - height / width))
                assert nearest_bin(height, width, side) == tuple(int(n) for n in bins[expected]), (side, height, width)


@pytest.mark.parametrize(
    ("face", "name", "call"),
    [
        ("FluxPipeline", "flux-dev", T5),
        ("StableDiffusion3Pipeline", "sd3", SMALL),
        ("QwenImagePipeline", "qwen", QWEN),
    ],
)
def test_what_we_save_the_peer_loads(face: str, name: str, call: dict[str, Any], ours: Pipes, tmp_path: Path) -> None:
    ours(face, name).save_pretrained(tmp_path)
    reloaded = getattr(diffusers, face).from_pretrained(tmp_path, **tiny_transformers.ABSENT.get(name, {}))
    reloaded.set_progress_bar_config(disable=True)
    compare(ours(face, name), reloaded, Case(name, face, name, call))


def test_missing_encoder_is_named(ours: Pipes) -> None:
    parts = ours("FluxPipeline", "flux").components
    pipe = effusion.FluxPipeline(**{**parts, "text_encoder_2": None})
    with pytest.raises(ValueError, match="no `text_encoder_2`.*prompt_embeds"):
        pipe("a cat", **T5)
    with pytest.raises(ValueError, match="no `text_encoder`.*prompt_embeds"):
        ours("QwenImagePipeline", "qwen")("a cat", **SMALL)


def test_a_guidance_that_has_no_effect_is_said(ours: Pipes, caplog: pytest.LogCaptureFixture) -> None:
    run(ours("QwenImagePipeline", "qwen"), Case("", "", "", {**QWEN, "guidance_scale": 2.0}).inputs())
    assert "`guidance_scale` 2.0 has no effect" in caplog.text


def test_sizes_are_rounded_with_a_warning_or_refused(ours: Pipes, caplog: pytest.LogCaptureFixture) -> None:
    flux = ours("FluxPipeline", "flux")
    images = flux("a cat", **{**T5, "height": 35}, num_inference_steps=1, output_type="np").images
    assert images.shape == (1, 32, 32, 3)
    assert "divisible by 4" in caplog.text
    with pytest.raises(ValueError, match="divisible by"):
        ours("StableDiffusion3Pipeline", "sd3")("a cat", height=36, width=32)
    with pytest.raises(ValueError, match="can't be over 512"):
        flux("a cat", max_sequence_length=600)


def test_every_face_of_these_families_is_tried_here() -> None:
    from effusion.pipelines.faces import FACES

    families = (
        "flux",
        "flux-controlnet",
        "flux-fill",
        "flux-control",
        "flux-kontext",
        "stable-diffusion-3",
        "stable-diffusion-3-controlnet",
        "qwenimage",
        "pixart-alpha",
    )
    listed = {name for family in families for name in FACES[family].values()}
    tried = {case.face for case in [*CASES, *SILENT]} | {"StableDiffusion3InpaintPipeline"}
    tried |= {"StableDiffusion3ControlNetPipeline", "StableDiffusion3ControlNetInpaintingPipeline"}
    assert listed <= tried
    assert all(inspect.isclass(getattr(effusion, name)) for name in listed)
