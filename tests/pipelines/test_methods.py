"""The steps of a call as methods: those that the peer's pipelines have, with its parameters and numbers."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

import effusion
from effusion.core import registry
from effusion.pipelines.faces import FACES

from .conftest import Pipes
from .inputs import generator, mask, picture, tensor
from .test_parity import RELATIVE, relative
from .test_signatures import parameters

NAMES = [name for tasks in FACES.values() for name in tasks.values() if hasattr(diffusers, name)]
NAMES.append("FluxPriorReduxPipeline")
# of the peer's methods with an underscore, those that scripts and other people's pipelines call
INNER = {
    "_encode_prompt", "_encode_vae_image", "_extract_masked_hidden", "_get_add_time_ids", "_get_clip_prompt_embeds",
    "_get_qwen_prompt_embeds", "_get_t5_prompt_embeds", "_pack_latents", "_prepare_latent_image_ids",
    "_text_preprocessing", "_unpack_latents",
}  # fmt: skip
# (class or "*", method): why it is not here
EXCEPTIONS = {
    ("*", "prepare_ip_adapter_image_embeds"): "IP-Adapters are not there yet",
    ("FluxControlInpaintPipeline", "prepare_mask_latents"): "its mask is the other tasks' one, see the blocks",
    ("LatentConsistencyModelPipeline", "do_classifier_free_guidance"): "never",
    ("LatentConsistencyModelImg2ImgPipeline", "do_classifier_free_guidance"): "never",
}


def own_methods(cls: Any) -> list[str]:
    """Public methods and properties that the peer defines in the class itself, and those of :data:`INNER`."""
    kinds = (property, staticmethod, classmethod)
    found = [n for n, v in vars(cls).items() if inspect.isfunction(v) or isinstance(v, kinds)]
    return [n for n in found if n in INNER or not n.startswith("_")]


WANTED = [
    (name, method)
    for name in dict.fromkeys(NAMES)
    for method in own_methods(getattr(diffusers, name))
    if not {(name, method), ("*", method)} & set(EXCEPTIONS)
]


@pytest.mark.parametrize("name", list(dict.fromkeys(NAMES)))
def test_the_peers_methods_are_there(name: str) -> None:
    ours, theirs = registry.find_class("diffusers", name), getattr(diffusers, name)
    lacking, other = [], []
    for method in (m for n, m in WANTED if n == name):
        if not hasattr(ours, method):
            lacking.append(method)
        elif callable(getattr(theirs, method)) and method != "enable_sequential_cpu_offload":
            a, b = (parameters(getattr(cls, method)) for cls in (ours, theirs))
            other += [] if a == b else [(method, a, b)]
    assert lacking == []
    assert other == []


def test_exceptions_are_the_peers_methods() -> None:
    for name, method in EXCEPTIONS:
        classes = NAMES if name == "*" else [name]
        assert any(method in own_methods(getattr(diffusers, c)) for c in classes), f"{name}.{method}"


# -- numbers -------------------------------------------------------------------------------------

SD, SD_I2I, SD_INPAINT = (f"StableDiffusion{kind}Pipeline" for kind in ("", "Img2Img", "Inpaint"))
XL, XL_I2I, XL_INPAINT = (f"StableDiffusionXL{kind}Pipeline" for kind in ("", "Img2Img", "Inpaint"))
SD3, SD3_I2I, SD3_INPAINT = (f"StableDiffusion3{kind}Pipeline" for kind in ("", "Img2Img", "Inpaint"))
CONTROL, CONTROL_INPAINT = "StableDiffusionControlNetPipeline", "StableDiffusionControlNetInpaintPipeline"
F32, CPU = torch.float32, torch.device("cpu")
Call = Callable[[], dict[str, Any]]


def pixels(count: int = 2, seed: int = 3) -> torch.Tensor:
    return tensor(count, 3, 32, 32, seed=seed).tanh()


def hole(count: int = 1) -> torch.Tensor:
    return (tensor(count, 1, 32, 32, seed=5) > 0).float()


def at(t: float, count: int = 2) -> torch.Tensor:
    return torch.tensor([t] * count)


def size(**more: Any) -> dict[str, Any]:
    return {"height": 32, "width": 32, "dtype": F32, "device": CPU, "generator": generator(), **more}


def noise(channels: int = 4, **more: Any) -> dict[str, Any]:
    return size(batch_size=2, num_channels_latents=channels, **more)


def image(**more: Any) -> dict[str, Any]:
    return {
        "image": pixels(), "timestep": at(301), "batch_size": 1, "num_images_per_prompt": 2, "dtype": F32,
        "device": CPU, "generator": generator(), **more,
    }  # fmt: skip


def inside(**more: Any) -> dict[str, Any]:
    return noise(image=pixels(), timestep=at(301), return_noise=True, return_image_latents=True, **more)


def masked(**more: Any) -> dict[str, Any]:
    return size(mask=hole(), masked_image=pixels(1), batch_size=2, do_classifier_free_guidance=True, **more)


def tokens(**more: Any) -> dict[str, Any]:
    channels = {"num_channels_latents": 1}
    return {**noise(), **channels, "image": pixels(), "timestep": at(0.6), **more}


IDS: dict[str, Any] = {
    "original_size": (64, 48), "crops_coords_top_left": (3, 4), "target_size": (30, 34), "dtype": F32,
    "text_encoder_projection_dim": 32,
}  # fmt: skip
SCORED = {
    **IDS, "aesthetic_score": 6.0, "negative_aesthetic_score": 2.5, "negative_original_size": (10, 12),
    "negative_crops_coords_top_left": (1, 2), "negative_target_size": (20, 22),
}  # fmt: skip
ROWS: dict[str, Any] = {
    "image": picture(48), "width": 32, "height": 32, "batch_size": 2, "num_images_per_prompt": 2, "device": CPU,
    "dtype": F32, "do_classifier_free_guidance": True,
}  # fmt: skip
STEPS = {"num_inference_steps": 10, "strength": 0.55, "device": CPU}
TEXT = {"prompt": ["a cat", "a dog"], "num_images_per_prompt": 2, "device": CPU}

CASES: list[tuple[str, str, str, Call]] = [
    (SD, "sd", "prepare_latents", noise),
    (SD, "sd", "prepare_latents", lambda: noise(latents=tensor(2, 4, 16, 16), generator=None)),
    (SD, "sd", "prepare_extra_step_kwargs", lambda: {"generator": None, "eta": 0.3}),
    (SD, "sd", "get_guidance_scale_embedding", lambda: {"w": torch.tensor([1.5, 7.0]), "embedding_dim": 33}),
    (SD, "sd", "decode_latents", lambda: {"latents": tensor(2, 4, 16, 16)}),
    (SD, "sd", "_encode_prompt", lambda: {**TEXT, "do_classifier_free_guidance": True}),
    (SD, "sd", "run_safety_checker", lambda: {"image": pixels(), "device": CPU, "dtype": F32}),
    (SD, "sd-safe", "run_safety_checker", lambda: {"image": pixels(), "device": CPU, "dtype": F32}),
    (SD, "sd-safe", "run_safety_checker", lambda: {"image": np.full((1, 32, 32, 3), 0.4), "device": CPU, "dtype": F32}),
    (SD_I2I, "sd", "get_timesteps", lambda: STEPS),
    (SD_I2I, "sd", "prepare_latents", image),
    (SD_I2I, "sd", "prepare_latents", lambda: image(image=pixels(1), generator=[generator(1), generator(2)])),
    (SD_INPAINT, "sd", "get_timesteps", lambda: STEPS),
    (SD_INPAINT, "sd", "prepare_latents", inside),
    (SD_INPAINT, "sd", "prepare_latents", lambda: inside(is_strength_max=False)),
    (SD_INPAINT, "sd", "prepare_latents", lambda: inside(latents=tensor(2, 4, 16, 16))),
    (SD_INPAINT, "sd", "prepare_mask_latents", masked),
    (SD_INPAINT, "sd", "_encode_vae_image", lambda: {"image": pixels(), "generator": generator()}),
    (XL, "xl", "prepare_latents", noise),
    (XL, "xl", "_get_add_time_ids", lambda: IDS),
    (XL_I2I, "xl", "prepare_latents", image),
    (XL_I2I, "xl", "prepare_latents", lambda: image(add_noise=False)),
    (XL_I2I, "xl", "get_timesteps", lambda: STEPS),
    (XL_I2I, "xl", "get_timesteps", lambda: {**STEPS, "denoising_start": 0.4}),
    (XL_I2I, "xl", "_get_add_time_ids", lambda: SCORED),
    (XL_I2I, "refiner", "_get_add_time_ids", lambda: SCORED),
    (XL_INPAINT, "xl", "prepare_latents", lambda: inside(is_strength_max=False)),
    (XL_INPAINT, "xl", "prepare_latents", lambda: inside(add_noise=False)),
    (XL_INPAINT, "xl", "prepare_mask_latents", masked),
    (XL_INPAINT, "xl", "_get_add_time_ids", lambda: SCORED),
    (CONTROL, "sd-control", "prepare_image", lambda: ROWS),
    (CONTROL, "sd-control", "prepare_image", lambda: {**ROWS, "image": [picture(), picture(seed=2)], "batch_size": 4}),
    (CONTROL, "sd-control", "prepare_image", lambda: {**ROWS, "guess_mode": True}),
    ("StableDiffusionControlNetImg2ImgPipeline", "sd-control", "prepare_control_image", lambda: ROWS),
    (
        CONTROL_INPAINT, "sd-control", "prepare_control_image",
        lambda: {**ROWS, "crops_coords": (4, 8, 40, 30), "resize_mode": "fill"},
    ),
    ("LatentConsistencyModelPipeline", "lcm", "prepare_latents", noise),
    ("LatentConsistencyModelImg2ImgPipeline", "lcm", "prepare_latents", image),
    (SD3, "sd3", "prepare_latents", lambda: noise(16)),
    (SD3, "sd3", "_get_clip_prompt_embeds", lambda: {**TEXT, "clip_model_index": 1}),
    (SD3, "sd3", "_get_t5_prompt_embeds", lambda: {**TEXT, "max_sequence_length": 16}),
    (SD3_I2I, "sd3", "get_timesteps", lambda: STEPS),
    (SD3_INPAINT, "sd3", "_encode_vae_image", lambda: {"image": pixels(), "generator": generator()}),
    ("StableDiffusion3ControlNetPipeline", "sd3-controlnet", "prepare_image", lambda: ROWS),
    ("FluxPipeline", "flux", "prepare_latents", lambda: noise(1)),
    ("FluxPipeline", "flux", "prepare_latents", lambda: noise(1, height=34, latents=tensor(2, 64, 4))),
    ("FluxPipeline", "flux", "_pack_latents", lambda: {**args_of_packing(tensor(2, 4, 8, 6))}),
    ("FluxPipeline", "flux", "_unpack_latents", lambda: unpacking(tensor(2, 12, 16))),
    ("FluxPipeline", "flux", "_get_clip_prompt_embeds", lambda: TEXT),
    ("FluxPipeline", "flux", "_get_t5_prompt_embeds", lambda: {**TEXT, "max_sequence_length": 16}),
    (
        "FluxPipeline", "flux", "_prepare_latent_image_ids",
        lambda: {"batch_size": 2, "height": 3, "width": 5, "device": CPU, "dtype": F32},
    ),
    ("FluxImg2ImgPipeline", "flux", "get_timesteps", lambda: STEPS),
    ("FluxImg2ImgPipeline", "flux", "prepare_latents", tokens),
    ("FluxInpaintPipeline", "flux", "prepare_latents", tokens),
    ("FluxInpaintPipeline", "flux", "_encode_vae_image", lambda: {"image": pixels(), "generator": generator()}),
    (
        "FluxInpaintPipeline", "flux", "prepare_mask_latents",
        lambda: size(mask=hole(), masked_image=pixels(1), batch_size=1, num_channels_latents=1, num_images_per_prompt=2),
    ),
    (
        "FluxFillPipeline", "flux-fill", "prepare_mask_latents",
        lambda: size(mask=hole(), masked_image=pixels(1), batch_size=1, num_channels_latents=1, num_images_per_prompt=2),
    ),
    ("FluxControlPipeline", "flux-control", "prepare_image", lambda: ROWS),
    ("FluxKontextPipeline", "flux-kontext", "prepare_latents", lambda: noise(1, image=pixels(1))),
    ("FluxKontextPipeline", "flux-kontext", "prepare_latents", lambda: noise(1, image=None)),
    ("QwenImagePipeline", "qwen", "prepare_latents", noise),
    ("QwenImagePipeline", "qwen", "_pack_latents", lambda: args_of_packing(tensor(2, 4, 8, 6))),
    ("QwenImagePipeline", "qwen", "_unpack_latents", lambda: unpacking(tensor(2, 12, 16))),
    (
        "QwenImagePipeline", "qwen", "_extract_masked_hidden",
        lambda: {"hidden_states": tensor(2, 4, 3), "mask": torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])},
    ),
    ("QwenImageImg2ImgPipeline", "qwen", "prepare_latents", lambda: {**noise(), **qwen_image()}),
    ("QwenImageInpaintPipeline", "qwen", "prepare_latents", lambda: {**noise(), **qwen_image()}),
    ("QwenImageEditPipeline", "qwen-edit", "prepare_latents", lambda: noise(image=pixels(1)[:, :, None])),
    ("PixArtAlphaPipeline", "pixart-alpha", "prepare_latents", noise),
    ("PixArtSigmaPipeline", "pixart-sigma", "_text_preprocessing", lambda: {"text": [" A Cat ", "b"]}),
]  # fmt: skip


def args_of_packing(latents: torch.Tensor) -> dict[str, Any]:
    b, c, h, w = latents.shape
    return {"latents": latents, "batch_size": b, "num_channels_latents": c, "height": h, "width": w}


def unpacking(latents: torch.Tensor) -> dict[str, Any]:
    return {"latents": latents, "height": 70, "width": 48, "vae_scale_factor": 8}


def qwen_image() -> dict[str, Any]:
    return {"image": pixels()[:, :, None], "timestep": at(0.6)}


def hold_against(ours: Any, theirs: Any) -> None:
    if isinstance(theirs, (tuple, list)):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            hold_against(a, b)
    elif isinstance(theirs, (torch.Tensor, np.ndarray)):
        assert type(ours) is type(theirs)
        assert ours.dtype == theirs.dtype
        assert relative(ours, theirs) <= RELATIVE
    else:
        assert ours == theirs


@pytest.mark.parametrize(
    ("face", "name", "method", "given"), CASES, ids=[f"{i} {c[0]}.{c[2]}" for i, c in enumerate(CASES)]
)
def test_numbers_equal_the_peers(face: str, name: str, method: str, given: Call, ours: Pipes, theirs: Pipes) -> None:
    found = []
    for pipes in (ours, theirs):
        pipe, arguments = pipes(face, name), given()
        if "scheduler" in pipe.components:
            flow = "FlowMatch" in type(pipe.scheduler).__name__
            options = {"mu": 0.7} if flow and pipe.scheduler.config.use_dynamic_shifting else {}
            pipe.scheduler.set_timesteps(10, **options)
            timestep = arguments.get("timestep")
            if timestep is not None:
                arguments["timestep"] = pipe.scheduler.timesteps[4:5].repeat(len(timestep))
        with torch.no_grad():
            found.append(getattr(pipe, method)(**arguments))
        drawn = arguments.get("generator")
        found[-1] = (found[-1], drawn.get_state() if isinstance(drawn, torch.Generator) else None)
    (a, state), (b, peers) = found
    hold_against(a, b)
    assert state is None or torch.equal(state, peers), "the methods drew different amounts of noise"


def test_encoders_of_pictures_equal_the_peers(ours: Pipes, theirs: Pipes) -> None:
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(**shape, image_size=32, patch_size=8, projection_dim=16))
    extractor = CLIPImageProcessor(crop_size=32, size=32)
    common = (picture(), CPU)
    for face, name, arguments in (
        (SD, "sd", (*common, 2)), (SD, "sd", (*common, 2, True)), (SD3, "sd3", common), ("FluxPipeline", "flux", (*common, 2)),
    ):  # fmt: skip
        found = []
        for pipes in (ours, theirs):
            pipe = pipes(face, name)
            pipe.register_modules(image_encoder=encoder.eval(), feature_extractor=extractor)
            with torch.no_grad():
                found.append(pipe.encode_image(*arguments))
        hold_against(*found)


def test_upcasting_the_vae(ours: Pipes) -> None:
    pipe = ours(XL, "xl")
    pipe = getattr(effusion, XL)(**{**pipe.components, "vae": type(pipe.vae).from_config(pipe.vae.config).half()})
    pipe.upcast_vae()
    assert pipe.vae.dtype == torch.float32


BAD: list[tuple[str, str, Any, dict[str, Any], str]] = [
    (SD, "sd", ("a cat", 30, 32, None), {}, "divisible by 8"),
    (SD, "sd", (None, 32, 32, None), {}, "neither `prompt`"),
    (SD, "sd", ("a cat", 32, 32, 0), {}, "positive integer"),
    (SD, "sd", ("a cat", 32, 32, 1), {"callback_on_step_end_tensor_inputs": ["noise"]}, "noise"),
    (SD_I2I, "sd", ("a cat", 1.4, None), {}, "between 0 and 1"),
    (SD_INPAINT, "sd", ("a cat", picture(), None, 32, 32, 0.5, None, "pil"), {}, "`mask_image` is missing"),
    (SD_INPAINT, "sd", ("a cat", picture(), mask(), 32, 32, 0.5, None, "np"), {"padding_mask_crop": 4}, "needs PIL"),
    (XL_I2I, "xl", ("a cat", None, 0.5, 0, None), {}, "`num_inference_steps`"),
    (CONTROL, "sd-control", ("a cat", None, None), {}, "`image` is missing"),
    (CONTROL, "sd-control", ("a cat", picture(), None), {"control_guidance_start": 1.0}, "can't act from 1.0"),
    (SD3, "sd3", ("a cat", None, None, 32, 32), {"max_sequence_length": 1000}, "over 512"),
    ("FluxPipeline", "flux", ("a cat", None, 32, 32), {"prompt_embeds": tensor(1, 4, 32)}, "both `prompt`"),
    ("QwenImagePipeline", "qwen", (None, 32, 32), {}, "neither `prompt`"),
    ("FluxPriorReduxPipeline", "flux-redux", ([picture()] * 2, None, None), {"prompt_embeds_scale": [1.0]}, "1 scales for 2"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("face", "name", "args", "kwargs", "message"), BAD, ids=lambda v: v if isinstance(v, str) else ""
)
def test_check_inputs_raises(face: str, name: str, args: Any, kwargs: Any, message: str, ours: Pipes) -> None:
    pipe = ours(face, name)
    with pytest.raises(ValueError, match=message):
        pipe.check_inputs(*args, **kwargs)
    with pytest.raises(TypeError):
        pipe.check_inputs(*args, **kwargs, nothing=1)


def test_check_inputs_is_silent_about_good_ones(ours: Pipes) -> None:
    ours(SD, "sd").check_inputs("a cat", 32, 32, 1)
    ours(XL_INPAINT, "xl").check_inputs("a cat", None, picture(), mask(), 32, 32, 0.5, None, "pil", padding_mask_crop=2)
    ours(CONTROL, "sd-controls").check_inputs("a cat", [picture()] * 2, None)
    ours("FluxPipeline", "flux").check_inputs("a cat", None, 32, 32)


def test_control_pictures_are_counted(ours: Pipes) -> None:
    pipe = ours(CONTROL, "sd-control")
    pipe.check_image(picture(), ["a", "b"], None)
    pipe.check_image([picture()] * 2, ["a", "b"], None)
    for image in ([picture()] * 3, "edges.png"):
        with pytest.raises(ValueError, match="control pictures for 2|not str"):
            pipe.check_image(image, ["a", "b"], None)


# -- functions beside the classes ----------------------------------------------------------------

SHARED = ("retrieve_timesteps", "retrieve_latents", "calculate_shift", "rescale_noise_cfg", "calculate_dimensions")
TABLES = ("PREFERRED_KONTEXT_RESOLUTIONS", *(f"ASPECT_RATIO_{side}_BIN" for side in (256, 512, 1024, 2048)))


def test_functions_beside_the_classes_have_the_same_paths() -> None:
    lacking, seen = [], set()
    for name in dict.fromkeys(NAMES):
        peer = importlib.import_module(getattr(diffusers, name).__module__)
        ours = importlib.import_module(peer.__name__.replace("diffusers", "effusion", 1))
        for function in (f for f in (*SHARED, *TABLES) if hasattr(peer, f)):
            seen.add(function)
            if not hasattr(ours, function):
                lacking.append(f"{ours.__name__}.{function}")
    assert lacking == []
    assert seen == {*SHARED, *TABLES}


def test_tables_beside_the_classes_equal_the_peers() -> None:
    for module, tables in (
        ("flux.pipeline_flux_kontext", TABLES[:1]),
        ("pixart_alpha.pipeline_pixart_alpha", TABLES[1:4]),
        ("pixart_alpha.pipeline_pixart_sigma", TABLES[1:]),
    ):
        ours, theirs = (importlib.import_module(f"{root}.pipelines.{module}") for root in ("effusion", "diffusers"))
        for table in tables:
            assert getattr(ours, table) == getattr(theirs, table), table


def test_functions_beside_the_classes_equal_the_peers() -> None:
    from diffusers.pipelines.flux import pipeline_flux as their_flux
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as their_edit
    from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion as their_sd
    from effusion.pipelines.qwenimage import pipeline_qwenimage_edit as our_edit

    from effusion.pipelines.flux import pipeline_flux as our_flux
    from effusion.pipelines.stable_diffusion import pipeline_stable_diffusion as our_sd

    for name in ("calculate_shift", "retrieve_timesteps"):
        a, b = (list(inspect.signature(getattr(m, name)).parameters)[:5] for m in (our_flux, their_flux))
        assert a == b, name
    assert our_flux.calculate_shift(1000, max_shift=2.0) == pytest.approx(
        their_flux.calculate_shift(1000, max_shift=2.0)
    )
    assert our_edit.calculate_dimensions(1024**2, 1.7) == their_edit.calculate_dimensions(1024**2, 1.7)
    a, b = tensor(2, 4, 8, 8), tensor(2, 4, 8, 8, seed=8)
    assert relative(our_sd.rescale_noise_cfg(a, b, 0.6), their_sd.rescale_noise_cfg(a, b, 0.6)) <= 1e-6
    for kwargs in ({"num_inference_steps": 5}, {"timesteps": [900, 500, 3]}):
        pairs = [
            module.retrieve_timesteps(library.DDPMScheduler(), **kwargs)
            for module, library in ((our_sd, effusion), (their_sd, diffusers))
        ]
        assert torch.equal(pairs[0][0], pairs[1][0])
        assert pairs[0][1] == pairs[1][1]
