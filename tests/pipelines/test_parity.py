"""Every face against the peer: same files, same call, same latents after each step, same pictures."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch

import effusion
from effusion.core import registry

from .conftest import Checkpoints, Pipes
from .inputs import generator, mask, picture, tensor

pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__")  # the peer's schedulers with today's numpy
RELATIVE = 1e-4  # of the largest value, in float32
SD, SD_I2I, SD_INPAINT = (f"StableDiffusion{kind}Pipeline" for kind in ("", "Img2Img", "Inpaint"))
XL, XL_I2I, XL_INPAINT = (f"StableDiffusionXL{kind}Pipeline" for kind in ("", "Img2Img", "Inpaint"))
LCM, LCM_I2I = "LatentConsistencyModelPipeline", "LatentConsistencyModelImg2ImgPipeline"


@dataclass
class Case:
    """One configuration: a face, a checkpoint, and the call; values that are functions are called for each side."""

    name: str
    face: str
    checkpoint: str
    call: dict[str, Any]
    scheduler: str | None = None
    scheduler_config: dict[str, Any] = field(default_factory=dict)
    same_noise: bool = True  # whether the peer draws no more from the generator than it uses

    def inputs(self) -> dict[str, Any]:
        made = {k: v() if callable(v) else v for k, v in self.call.items()}
        return {
            "prompt": "a small cat",
            "generator": generator(),
            "num_inference_steps": 3,
            "output_type": "np",
            **made,
        }


IMAGE = {"image": picture}
PAINT = {"image": picture, "mask_image": mask, "height": 32, "width": 32}
CROP = {
    **PAINT,
    "image": lambda: picture(64),
    "mask_image": lambda: mask(64),
    "padding_mask_crop": 4,
    "output_type": "pil",
}
EMBEDS = {
    "prompt": None,
    "prompt_embeds": lambda: tensor(1, 77, 32),
    "negative_prompt_embeds": lambda: tensor(1, 77, 32, seed=4),
}
XL_EMBEDS = {
    "prompt": None,
    "prompt_embeds": lambda: tensor(1, 77, 64),
    "negative_prompt_embeds": lambda: tensor(1, 77, 64, seed=4),
    "pooled_prompt_embeds": lambda: tensor(1, 32, seed=5),
    "negative_pooled_prompt_embeds": lambda: tensor(1, 32, seed=6),
}
TWO = {"prompt": ["a cat", "a dog"], "negative_prompt": ["blurry", "dark and blurry"]}
GENERATORS = {"generator": lambda: [generator(1), generator(2)]}
SIZES = {
    "original_size": (64, 48), "target_size": (30, 34), "crops_coords_top_left": (3, 4),
    "negative_original_size": (10, 12), "negative_target_size": (20, 22), "negative_crops_coords_top_left": (1, 2),
}  # fmt: skip
END = {"denoising_end": 0.6, "num_inference_steps": 5}
START = {"denoising_start": 0.4, "num_inference_steps": 6}
RANGE = {"denoising_start": 0.4, "denoising_end": 0.8, "num_inference_steps": 10}
SCORES = {"aesthetic_score": 5.0, "negative_aesthetic_score": 1.5}
HALF_DONE = {"image": lambda: tensor(1, 4, 16, 16)}
ANCESTRAL = "EulerAncestralDiscreteScheduler"
KARRAS = {"use_karras_sigmas": True}

CASES = [
    # Stable Diffusion, text to image
    Case("sd", SD, "sd", {}),
    Case("sd no guidance", SD, "sd", {"guidance_scale": 1.0}),
    Case("sd negative, two prompts", SD, "sd", TWO),
    Case("sd images per prompt", SD, "sd", {**TWO, "num_images_per_prompt": 2}),
    Case("sd negative", SD, "sd", {"negative_prompt": "dark"}),
    Case("sd generators", SD, "sd", {**TWO, **GENERATORS}),
    Case("sd generators, ancestral", SD, "sd", {**TWO, **GENERATORS}, ANCESTRAL),
    Case("sd embeds", SD, "sd", EMBEDS),
    Case("sd embeds, images per prompt", SD, "sd", {**EMBEDS, "num_images_per_prompt": 2}),
    Case("sd rescale", SD, "sd", {"guidance_rescale": 0.7}),
    Case("sd eta", SD, "sd", {"eta": 0.7}),
    Case("sd size", SD, "sd", {"height": 16, "width": 40}),
    Case("sd latents given", SD, "sd", {"latents": lambda: tensor(1, 4, 16, 16)}),
    Case("sd timesteps", SD, "sd", {"timesteps": [901, 601, 301, 1]}, "DDPMScheduler"),
    Case("sd sigmas", SD, "sd", {"sigmas": [10.0, 3.0, 0.5]}, "EulerDiscreteScheduler"),
    Case("sd attention kwargs", SD, "sd", {"cross_attention_kwargs": {"scale": 0.5}}),
    Case("sd long prompt", SD, "sd", {"prompt": "a very long prompt that goes on and on " * 4}),
    Case("sd latent output", SD, "sd", {"output_type": "latent"}),
    Case("sd pt output", SD, "sd", {"output_type": "pt"}),
    Case("sd pil output", SD, "sd", {"output_type": "pil"}),
    Case("sd v-prediction, linear projection", SD, "sd-v", {"guidance_rescale": 0.3}),
    Case("sd safety checker", SD, "sd-safe", {"num_images_per_prompt": 2}),
    Case("sd safety checker, pil", SD, "sd-safe", {"output_type": "pil"}),
    Case("sd tiny autoencoder", SD, "sd-taesd", {}),
    Case("sd karras", SD, "sd", {}, "EulerDiscreteScheduler", KARRAS),
    Case("sd dpm++ karras", SD, "sd", {"num_inference_steps": 4}, "DPMSolverMultistepScheduler", KARRAS),
    Case("sd sde-dpm++", SD, "sd", {}, "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    Case("sd lcm scheduler", SD, "sd", {}, "LCMScheduler"),
    Case("sd ipndm", SD, "sd", {"num_inference_steps": 5}, "IPNDMScheduler"),
    # Stable Diffusion, image to image
    Case("i2i", SD_I2I, "sd", {**IMAGE, "num_inference_steps": 4}),
    Case("i2i weak", SD_I2I, "sd", {**IMAGE, "strength": 0.3, "num_inference_steps": 6}),
    Case("i2i full", SD_I2I, "sd", {**IMAGE, "strength": 1.0}),
    Case("i2i two pictures", SD_I2I, "sd", {**TWO, "image": lambda: [picture(), picture(seed=1)]}),
    Case("i2i one picture, four images", SD_I2I, "sd", {**TWO, **IMAGE, "num_images_per_prompt": 2}),
    Case("i2i generators", SD_I2I, "sd", {**TWO, **GENERATORS, **IMAGE}),
    Case("i2i latents as picture", SD_I2I, "sd", {"image": lambda: tensor(1, 4, 16, 16)}),
    Case("i2i tensor", SD_I2I, "sd", {"image": lambda: tensor(1, 3, 32, 32).sigmoid()}),
    Case("i2i ancestral", SD_I2I, "sd", IMAGE, ANCESTRAL),
    Case("i2i pndm", SD_I2I, "sd", {**IMAGE, "num_inference_steps": 5}, "PNDMScheduler"),
    Case("i2i timesteps", SD_I2I, "sd", {**IMAGE, "timesteps": [901, 601, 301, 1]}, "DDPMScheduler"),
    # Stable Diffusion, inpainting
    Case("inpaint", SD_INPAINT, "sd", PAINT),
    Case("inpaint weak", SD_INPAINT, "sd", {**PAINT, "strength": 0.5, "num_inference_steps": 5}),
    Case("inpaint images per prompt", SD_INPAINT, "sd", {**PAINT, "num_images_per_prompt": 2, "strength": 0.7}),
    Case("inpaint generators", SD_INPAINT, "sd", {**PAINT, **TWO, **GENERATORS}),
    Case("inpaint ancestral", SD_INPAINT, "sd", PAINT, ANCESTRAL),
    Case("inpaint latents given", SD_INPAINT, "sd", {**PAINT, "latents": lambda: tensor(1, 4, 16, 16)}),
    Case("inpaint crop", SD_INPAINT, "sd", CROP),
    Case("inpaint9", SD_INPAINT, "sd9", PAINT),
    Case("inpaint9 weak", SD_INPAINT, "sd9", {**PAINT, "strength": 0.5, "num_inference_steps": 5}),
    Case("inpaint9 images per prompt", SD_INPAINT, "sd9", {**PAINT, **TWO, "num_images_per_prompt": 2}),
    Case("inpaint9 masked latents", SD_INPAINT, "sd9", {**PAINT, "masked_image_latents": lambda: tensor(1, 4, 16, 16)}),
    Case("inpaint9 ancestral", SD_INPAINT, "sd9", PAINT, ANCESTRAL),
    Case("inpaint9 crop", SD_INPAINT, "sd9", CROP),
    Case("inpaint asymmetric autoencoder", SD_INPAINT, "sd-asymmetric", PAINT, same_noise=False),
    # Stable Diffusion XL
    Case("xl", XL, "xl", {}),
    Case("xl no guidance", XL, "xl", {"guidance_scale": 1.0}),
    Case("xl second prompts", XL, "xl", {"prompt_2": "a hat", "negative_prompt": "bad", "negative_prompt_2": "worse"}),
    Case("xl two prompts, four images", XL, "xl", {**TWO, "num_images_per_prompt": 2}),
    Case("xl generators", XL, "xl", {**TWO, **GENERATORS}),
    Case("xl embeds", XL, "xl", XL_EMBEDS),
    Case("xl rescale, clip skip", XL, "xl", {"guidance_rescale": 0.3, "clip_skip": 1}),
    Case("xl sizes", XL, "xl", SIZES),
    Case("xl sizes, four images", XL, "xl", {**SIZES, **TWO, "num_images_per_prompt": 2}),
    Case("xl denoising end", XL, "xl", END),
    Case("xl denoising end, latent", XL, "xl", {**END, "output_type": "latent"}),
    Case("xl dpm++ karras", XL, "xl", {"num_inference_steps": 4}, "DPMSolverMultistepScheduler", KARRAS),
    Case("xl timesteps", XL, "xl", {"timesteps": [999, 500, 1]}, "EulerDiscreteScheduler"),
    Case("xl i2i", XL_I2I, "xl", {**IMAGE, "num_inference_steps": 8}),
    Case("xl i2i sizes", XL_I2I, "xl", {**IMAGE, **SIZES, "strength": 0.9}),
    Case("xl i2i negative original", XL_I2I, "xl", {**IMAGE, "strength": 0.9, "negative_original_size": (10, 12)}),
    Case("refiner sizes", XL_I2I, "refiner", {**IMAGE, **SIZES, "strength": 0.9}),
    Case("xl i2i four images", XL_I2I, "xl", {**IMAGE, **TWO, "strength": 0.9, "num_images_per_prompt": 2}),
    Case("xl i2i generators", XL_I2I, "xl", {**IMAGE, **TWO, **GENERATORS, "strength": 0.9}),
    Case("xl inpaint", XL_INPAINT, "xl", PAINT),
    Case("xl inpaint full", XL_INPAINT, "xl", {**PAINT, "strength": 1.0}),
    Case("xl inpaint denoising start", XL_INPAINT, "xl", {**PAINT, **START}),
    Case("xl inpaint range", XL_INPAINT, "xl", {**PAINT, **RANGE}),
    Case("xl inpaint ancestral", XL_INPAINT, "xl", {**PAINT, **TWO, "strength": 0.7}, ANCESTRAL),
    Case("xl inpaint9", XL_INPAINT, "xl9", PAINT),
    Case("xl inpaint9 sizes", XL_INPAINT, "xl9", {**PAINT, **SIZES, **TWO, "strength": 0.7}),
    Case("refiner", XL_I2I, "refiner", {**IMAGE, "num_inference_steps": 8}),
    Case("refiner scores", XL_I2I, "refiner", {**IMAGE, "strength": 0.9, **SCORES}),
    Case("refiner start", XL_I2I, "refiner", {**HALF_DONE, **START}),
    Case("refiner range", XL_I2I, "refiner", {**HALF_DONE, **RANGE}),
    Case("refiner inpaint", XL_INPAINT, "refiner", {**PAINT, "strength": 0.7}),
    # Latent consistency
    Case("lcm", LCM, "lcm", {}),
    Case("lcm images per prompt", LCM, "lcm", {"prompt": ["a cat", "a dog"], "num_images_per_prompt": 2}),
    Case("lcm scale, original steps", LCM, "lcm", {"guidance_scale": 3.0, "original_inference_steps": 20}),
    Case("lcm timesteps", LCM, "lcm", {"timesteps": [999, 759, 499, 259]}),
    Case("lcm generators", LCM, "lcm", {"prompt": ["a cat", "a dog"], **GENERATORS}),
    Case("lcm i2i", LCM_I2I, "lcm", IMAGE),
    Case("lcm i2i weak", LCM_I2I, "lcm", {**IMAGE, "strength": 0.4, "num_images_per_prompt": 2}),
]  # fmt: skip

# What the tiny networks have to hear, or the comparisons above would not notice what becomes of it.
HEARD = [
    (SD, "sd", {}, {"prompt": "a dog"}),
    (SD, "sd", {}, {"negative_prompt": "dark"}),
    (SD, "sd", {}, {"guidance_scale": 7.0}),
    (SD, "sd", {}, {"guidance_rescale": 0.1}),
    (XL, "xl", {}, {"prompt": "a dog"}),
    (XL, "xl", {}, {"prompt_2": "a dog"}),
    (XL, "xl", {}, {"original_size": (64, 48)}),
    (XL, "xl", {}, {"crops_coords_top_left": (3, 4)}),
    (XL, "xl", {}, {"negative_original_size": (10, 12), "negative_target_size": (20, 22)}),
    (XL_I2I, "refiner", {**IMAGE, "strength": 0.9}, {"aesthetic_score": 5.0}),
    (LCM, "lcm", {}, {"prompt": "a dog"}),
    (LCM, "lcm", {}, {"guidance_scale": 7.0}),
    (SD_INPAINT, "sd9", PAINT, {"image": lambda: picture(seed=1)}),
]

# Every diffusion scheduler that both libraries have, with each task.
SAMPLERS = sorted(s.name for s in diffusers.schedulers.KarrasDiffusionSchedulers if s.name in registry.public_names())
SAMPLERS += [n for n in ("TCDScheduler", "DDPMParallelScheduler") if n in registry.public_names()]


def relative(ours: Any, theirs: Any) -> float:
    """The largest difference, as a part of the peer's largest value."""
    a, b = ((x.double().numpy() if isinstance(x, torch.Tensor) else x.astype(float)) for x in (ours, theirs))
    assert a.shape == b.shape, f"shape {a.shape}, the peer's {b.shape}"
    assert np.isfinite(b).all()
    return float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-9))


def run(pipe: Any, inputs: dict[str, Any]) -> tuple[list[torch.Tensor], Any]:
    """The latents after each step, and what the pipeline returned."""
    steps: list[torch.Tensor] = []

    def record(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        steps.append(tensors["latents"].clone())
        return {}

    return steps, pipe(**inputs, callback_on_step_end=record)


def states(generators: Any) -> list[torch.Tensor]:
    return [g.get_state() for g in (generators if isinstance(generators, list) else [generators])]


def compare(ours: Any, theirs: Any, case: Case, bound: float = RELATIVE) -> None:
    """Run both and hold latents, pictures and the generators' states afterwards against each other."""
    given, expected = case.inputs(), case.inputs()
    their_steps, their_output = run(theirs, expected)
    our_steps, our_output = run(ours, given)
    assert len(our_steps) == len(their_steps) > 0
    for index, (a, b) in enumerate(zip(our_steps, their_steps, strict=True)):
        assert a.dtype == b.dtype
        assert relative(a, b) <= bound, f"latents differ after step {index}"
    compare_images(our_output.images, their_output.images, bound)
    assert getattr(our_output, "nsfw_content_detected", None) == getattr(their_output, "nsfw_content_detected", None)
    for a, b in zip(states(given["generator"]), states(expected["generator"]), strict=True):
        assert torch.equal(a, b) or not case.same_noise, "the runs drew different amounts of noise"


def compare_images(ours: Any, theirs: Any, bound: float) -> None:
    if not isinstance(theirs, list):
        assert type(ours) is type(theirs)
        assert relative(ours, theirs) <= bound
        return
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert isinstance(a, PIL.Image.Image)
        assert (a.size, a.mode) == (b.size, b.mode)
        assert np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max() <= 1  # rounding to 8 bits may tip


def with_scheduler(pipe: Any, library: Any, name: str | None, config: dict[str, Any]) -> Any:
    if name is not None:
        pipe.scheduler = getattr(library, name).from_config(pipe.scheduler.config, **config)
    return pipe


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_face_equals_the_peers(case: Case, ours: Pipes, theirs: Pipes) -> None:
    a = with_scheduler(ours(case.face, case.checkpoint), effusion, case.scheduler, case.scheduler_config)
    b = with_scheduler(theirs(case.face, case.checkpoint), diffusers, case.scheduler, case.scheduler_config)
    compare(a, b, case)


@pytest.mark.parametrize(("face", "name", "call", "change"), HEARD, ids=lambda v: v if isinstance(v, str) else "")
def test_the_tiny_networks_hear(
    face: str, name: str, call: dict[str, Any], change: dict[str, Any], ours: Pipes
) -> None:
    pipe, latent = ours(face, name), {"output_type": "latent"}
    plain = pipe(**Case("", face, name, call | latent).inputs()).images
    changed = pipe(**Case("", face, name, call | change | latent).inputs()).images
    assert relative(changed, plain) > 30 * RELATIVE


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("face", [SD, SD_I2I, SD_INPAINT])
def test_every_sampler_equals_the_peers(face: str, sampler: str, ours: Pipes, theirs: Pipes) -> None:
    extra = {SD: {}, SD_I2I: IMAGE, SD_INPAINT: PAINT}[face]
    case = Case(sampler, face, "sd", {**extra, "num_inference_steps": 4})
    config = {"noise_sampler_seed": 0} if sampler == "DPMSolverSDEScheduler" else {}
    a = with_scheduler(ours(face, "sd"), effusion, sampler, config)
    b = with_scheduler(theirs(face, "sd"), diffusers, sampler, config)
    compare(a, b, case)


@pytest.mark.parametrize(
    ("face", "name"), [(SD, "sd"), (SD_INPAINT, "sd9"), (XL, "xl"), (XL_I2I, "refiner"), (LCM, "lcm")]
)
def test_what_we_save_the_peer_loads(face: str, name: str, ours: Pipes, theirs: Pipes, tmp_path: Path) -> None:
    ours(face, name).save_pretrained(tmp_path)
    reloaded = getattr(diffusers, face).from_pretrained(tmp_path)
    reloaded.set_progress_bar_config(disable=True)
    extra = {SD_INPAINT: PAINT, XL_I2I: {**IMAGE, "strength": 0.9}}.get(face, {})
    case = Case(name, face, name, extra)
    compare(ours(face, name), reloaded, case)
    before, after = theirs(face, name), reloaded
    assert {k: v for k, v in after.config.items() if k != "_name_or_path"} == {
        k: v for k, v in before.config.items() if k != "_name_or_path"
    }
    assert dict(after.scheduler.config) == dict(before.scheduler.config)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("face", "name"), [(SD, "sd"), (XL, "xl"), (LCM, "lcm")])
def test_half_precision_equals_the_peers(face: str, name: str, dtype: torch.dtype, checkpoint: Checkpoints) -> None:
    """The same dtypes on the way; values within two units in the last place of the largest."""
    pipes = [getattr(lib, face).from_pretrained(checkpoint(name), torch_dtype=dtype) for lib in (effusion, diffusers)]
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
    case = Case(name, face, name, {})
    compare(*pipes, case, bound=2 * torch.finfo(dtype).eps)


def test_base_and_refiner_in_a_chain(ours: Pipes, theirs: Pipes) -> None:
    results = []
    for pipes in (ours, theirs):
        common = {"prompt": "a cat", "num_inference_steps": 10, "output_type": "latent"}
        latents = pipes(XL, "xl")(**common, denoising_end=0.6, generator=generator()).images
        common |= {"output_type": "np"}
        refined = pipes(XL_I2I, "refiner")(**common, image=latents, denoising_start=0.6, generator=generator(1)).images
        results.append((latents, refined))
    (a, x), (b, y) = results
    assert relative(a, b) <= RELATIVE
    assert relative(x, y) <= RELATIVE


@pytest.mark.parametrize("skip", [0, 1, 2])
def test_clip_skip_is_an_earlier_layer_normalised(skip: int, ours: Pipes) -> None:
    """The peer's own call fails with today's ``transformers``: the reference is computed by hand."""
    pipe = ours(SD, "sd")
    ids = pipe.tokenizer("a cat", padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    encoder = pipe.text_encoder
    with torch.no_grad():
        hidden = encoder(ids, output_hidden_states=True).hidden_states
        norm = getattr(encoder, "text_model", encoder).final_layer_norm
        expected = norm(hidden[len(hidden) - 1 - skip])
        found, _ = pipe.encode_prompt("a cat", "cpu", 1, False, clip_skip=skip)
    assert torch.equal(found, expected)
    empty, _ = pipe.encode_prompt("", "cpu", 1, False)
    common = {"negative_prompt_embeds": empty, "num_inference_steps": 2, "output_type": "latent"}
    by_hand = pipe(prompt_embeds=expected, generator=generator(), **common).images
    direct = pipe(
        prompt="a cat", clip_skip=skip, generator=generator(), num_inference_steps=2, output_type="latent"
    ).images
    assert torch.equal(direct, by_hand)


@pytest.mark.parametrize(("face", "method"), [("DDPMPipeline", "ddpm"), ("DDIMPipeline", "ddpm")])
@pytest.mark.parametrize(
    "call",
    [{}, {"batch_size": 3}, {"output_type": "pil"}, {"eta": 0.5}, {"eta": 0.5, "use_clipped_model_output": True}],
    ids=str,
)
def test_unconditional_equals_the_peers(
    face: str, method: str, call: dict[str, Any], ours: Pipes, theirs: Pipes
) -> None:
    if face == "DDPMPipeline" and "eta" in call:
        pytest.skip("DDPM has no eta")
    results = []
    for pipes in (ours, theirs):
        pipe = pipes(face, method)
        steps: list[torch.Tensor] = []
        wrap_step(pipe.scheduler, steps)
        inputs = {"num_inference_steps": 4, "output_type": "np", **call}
        results.append((steps, pipe(generator=generator(), **inputs).images))
    (a, x), (b, y) = results
    assert len(a) == len(b) == 4
    assert max(relative(p, q) for p, q in zip(a, b, strict=True)) <= RELATIVE
    compare_images(x, y, RELATIVE)


def wrap_step(scheduler: Any, steps: list[torch.Tensor]) -> None:
    """Record what each call of ``scheduler.step`` returns; these faces take no callback."""
    inner = scheduler.step

    @functools.wraps(inner)
    def step(*args: Any, **kwargs: Any) -> Any:
        out = inner(*args, **kwargs)
        steps.append((out[0] if isinstance(out, tuple) else out.prev_sample).clone())
        return out

    scheduler.step = step


def old_scheduler(library: Any, name: str) -> Any:
    """As in the first checkpoints: made before `clip_sample`, `steps_offset` and `skip_prk_steps` were set right."""
    return getattr(library, name)(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


@pytest.mark.parametrize("name", ["DDIMScheduler", "PNDMScheduler"])
@pytest.mark.parametrize(
    ("face", "kind"), [(SD, "sd"), (SD_I2I, "sd"), (SD_INPAINT, "sd"), (LCM, "lcm"), (LCM_I2I, "lcm"), (XL, "xl")]
)
def test_schedulers_of_old_checkpoints_are_put_right_alike(
    name: str, face: str, kind: str, ours: Pipes, theirs: Pipes
) -> None:
    configs = []
    for library, pipes in ((effusion, ours), (diffusers, theirs)):
        components = {**pipes(face, kind).components, "scheduler": old_scheduler(library, name)}
        configs.append(dict(getattr(library, face)(**components).scheduler.config))
    public = [{k: v for k, v in config.items() if not k.startswith("_")} for config in configs]
    assert public[0] == public[1]


@pytest.mark.parametrize(("version", "expected"), [("0.8.1", 64), ("0.9.0", 16), ("0.42.1", 16)])
def test_sample_sizes_of_old_checkpoints_are_put_right_alike(
    version: str, expected: int, checkpoint: Checkpoints
) -> None:
    sizes = []
    for library in (effusion, diffusers):
        pipe = getattr(library, SD).from_pretrained(checkpoint("sd"))
        assert pipe.unet.config["_diffusers_version"] == "0.42.1"
        pipe.unet.register_to_config(_diffusers_version=version)
        sizes.append(getattr(library, SD)(**pipe.components).unet.config.sample_size)
    assert sizes == [expected, expected]
