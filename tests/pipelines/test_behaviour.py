"""What callers do with a pipeline besides one call: callbacks, interrupting, streaming, sharing, editing, mistakes."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

import effusion
from effusion.core.errors import UnsupportedTask
from effusion.families.base import TASKS
from effusion.families.latent_consistency import LATENT_CONSISTENCY
from effusion.families.stable_diffusion import STABLE_DIFFUSION
from effusion.families.stable_diffusion_xl import STABLE_DIFFUSION_XL
from effusion.families.unconditional import UNCONDITIONAL

from .conftest import Checkpoints, Pipes
from .inputs import generator, mask, picture, tensor
from .test_parity import LCM, LCM_I2I, PAINT, RELATIVE, SD, SD_I2I, SD_INPAINT, XL, XL_I2I, XL_INPAINT, relative

Tensors = dict[str, Any]
Callback = Callable[[Any, int, Any, Tensors], Tensors]


def latents_of(pipe: Any, steps: int = 4, seed: int = 0, **inputs: Any) -> torch.Tensor:
    """The latents of a short run."""
    inputs = {"prompt": "a cat", "num_inference_steps": steps, "output_type": "latent", **inputs}
    found: torch.Tensor = pipe(**inputs, generator=generator(seed)).images
    return found


def both(ours: Pipes, theirs: Pipes, face: str, name: str, **inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return latents_of(ours(face, name), **inputs), latents_of(theirs(face, name), **inputs)


# -- callbacks -----------------------------------------------------------------------------------


def shrink(pipe: Any, index: int, timestep: Any, tensors: Tensors) -> Tensors:
    return {"latents": tensors["latents"] * 0.9}


def forget_prompt(pipe: Any, index: int, timestep: Any, tensors: Tensors) -> Tensors:
    if index == 1:
        tensors["prompt_embeds"] = torch.zeros_like(tensors["prompt_embeds"])
    return tensors


def less_guidance(pipe: Any, index: int, timestep: Any, tensors: Tensors) -> Tensors:
    if index == 1:
        pipe._guidance_scale = 2.0
    return tensors


def other_mask(pipe: Any, index: int, timestep: Any, tensors: Tensors) -> Tensors:
    if index == 1:
        tensors["mask"] = 1 - tensors["mask"]
    return tensors


@pytest.mark.parametrize(
    ("face", "name", "inputs"),
    [
        (SD, "sd", {}),
        (SD_I2I, "sd", {"image": picture()}),
        (SD_INPAINT, "sd9", PAINT),
        (XL, "xl", {}),
        (LCM, "lcm", {}),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
@pytest.mark.parametrize(
    ("callback", "names"),
    [
        (shrink, ["latents"]),
        (forget_prompt, ["latents", "prompt_embeds"]),
        (less_guidance, ["latents"]),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_what_a_callback_changes_acts_as_with_the_peer(
    face: str, name: str, inputs: Any, callback: Callback, names: list[str], ours: Pipes, theirs: Pipes
) -> None:
    given = {k: v() if callable(v) else v for k, v in inputs.items()}
    options = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": names}
    a, b = both(ours, theirs, face, name, **given, **options)
    assert relative(a, b) <= RELATIVE
    if not (callback is less_guidance and face == LCM):  # there the scale is embedded before the loop
        assert relative(a, latents_of(ours(face, name), **given)) > 1e-3, "the callback changed nothing"


@pytest.mark.parametrize("name", ["sd", "sd9"])
def test_a_callback_may_replace_the_mask(name: str, ours: Pipes, theirs: Pipes) -> None:
    given = {k: v() if callable(v) else v for k, v in PAINT.items()}
    options = {"callback_on_step_end": other_mask, "callback_on_step_end_tensor_inputs": ["latents", "mask"]}
    a, b = both(ours, theirs, SD_INPAINT, name, **given, **options)
    assert relative(a, b) <= RELATIVE
    assert relative(a, latents_of(ours(SD_INPAINT, name), **given)) > 1e-3, "the callback changed nothing"


@pytest.mark.parametrize(
    ("face", "name", "callback"),
    [
        (SD, "sd", "SDCFGCutoffCallback"),
        (XL, "xl", "SDXLCFGCutoffCallback"),
        ("StableDiffusion3Pipeline", "sd3", "SD3CFGCutoffCallback"),
    ],
)
@pytest.mark.parametrize(
    "when", [{"cutoff_step_ratio": 0.5}, {"cutoff_step_ratio": None, "cutoff_step_index": 1}], ids=str
)
def test_cutting_guidance_off_equals_the_peers(
    face: str, name: str, callback: str, when: dict[str, Any], ours: Pipes, theirs: Pipes
) -> None:
    def official(module: Any) -> Any:
        return getattr(module, callback)(**when)

    evaluated = []
    pipe = ours(face, name)
    network = pipe.components[pipe.family.denoiser]
    hook = network.register_forward_hook(lambda m, args, out: evaluated.append(out[0].shape[0]))
    a = latents_of(pipe, callback_on_step_end=official(effusion))
    hook.remove()
    b = latents_of(theirs(face, name), callback_on_step_end=official(diffusers.callbacks))
    assert relative(a, b) <= RELATIVE
    assert evaluated[0] == 2 and evaluated[-1] == 1


def test_several_callbacks_act_in_order(ours: Pipes) -> None:
    seen: list[str] = []

    class Note(effusion.PipelineCallback):
        tensor_inputs = ("latents",)

        def __init__(self, name: str) -> None:
            super().__init__(1.0)
            self.name = name

        def callback_fn(self, pipeline: Any, step_index: int, timestep: Any, callback_kwargs: Tensors) -> Tensors:
            seen.append(f"{self.name}{step_index}")
            return callback_kwargs

    together = effusion.MultiPipelineCallbacks([Note("a"), Note("b")])
    latents_of(ours(SD, "sd"), steps=2, callback_on_step_end=together)
    assert seen == ["a0", "b0", "a1", "b1"]


def test_callbacks_have_a_configuration(tmp_path: Path) -> None:
    callback = effusion.SDCFGCutoffCallback(cutoff_step_ratio=0.25)
    assert callback.config.cutoff_step_ratio == 0.25
    assert callback.config.cutoff_step_index is None
    callback.save_config(tmp_path)
    config = effusion.SDXLCFGCutoffCallback.load_config(tmp_path)
    assert effusion.SDXLCFGCutoffCallback.from_config(config).config.cutoff_step_ratio == 0.25

    class Mine(effusion.PipelineCallback):
        def callback_fn(self, pipeline: Any, step_index: int, timestep: Any, callback_kwargs: Tensors) -> Tensors:
            return {"ratio": self.config.cutoff_step_ratio}

    assert Mine(0.5)(None, 0, 0, {}) == {"ratio": 0.5}


def test_the_callback_of_control_networks_cuts_their_picture() -> None:
    class Pipe:
        num_timesteps, _guidance_scale = 4, 5.0

    names = ("prompt_embeds", "add_text_embeds", "add_time_ids")
    for batch, picture_rows in ((1, 2), (1, 1), (2, 4)):
        tensors: Tensors = {name: torch.arange(2 * batch) for name in names}
        tensors["image"] = torch.arange(picture_rows)
        for library in (effusion, diffusers.callbacks) if batch == 1 else (effusion,):  # the peer keeps one row
            pipe = Pipe()
            callback = library.SDXLControlnetCFGCutoffCallback(cutoff_step_ratio=0.5)
            assert callback(pipe, 1, 0, dict(tensors)).keys() == tensors.keys()
            cut = callback(pipe, 2, 0, dict(tensors))
            assert pipe._guidance_scale == 0.0
            assert {k: v.tolist() for k, v in cut.items()} == {k: v.tolist()[-batch:] for k, v in tensors.items()}


@pytest.mark.parametrize(
    "when", [{"cutoff_step_ratio": None}, {"cutoff_step_index": 3}, {"cutoff_step_ratio": 1.5}], ids=str
)
def test_a_cutoff_is_one_number_in_range(when: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="cutoff_step_ratio"):
        effusion.SDCFGCutoffCallback(**when)


@pytest.mark.parametrize(
    ("face", "name", "inputs"),
    [(SD, "sd", {}), (SD_INPAINT, "sd9", PAINT), (XL, "xl", {}), (LCM, "lcm", {})],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_a_callback_gets_every_tensor_that_it_may_ask_for(
    face: str, name: str, inputs: Any, ours: Pipes, theirs: Pipes
) -> None:
    shapes: list[dict[str, Any]] = []
    names = type(ours(face, name))._callback_tensor_inputs

    def note(pipe: Any, index: int, timestep: Any, tensors: Tensors) -> Tensors:
        shapes.append({k: None if v is None else tuple(v.shape) for k, v in tensors.items()})
        return tensors

    given = {k: v() if callable(v) else v for k, v in inputs.items()}
    options = {"callback_on_step_end": note, "callback_on_step_end_tensor_inputs": names, "steps": 1}
    a, b = both(ours, theirs, face, name, **given, **options)
    assert shapes[0] == shapes[1]
    assert relative(a, b) <= RELATIVE


def test_the_callback_of_old_scripts_works(ours: Pipes) -> None:
    seen: list[tuple[int, tuple[int, ...]]] = []
    latents_of(ours(SD, "sd"), callback=lambda i, t, x: seen.append((i, tuple(x.shape))), callback_steps=2)
    assert seen == [(0, (1, 4, 16, 16)), (2, (1, 4, 16, 16))]


def test_interrupting_stops_after_the_step(ours: Pipes, theirs: Pipes) -> None:
    def run(pipe: Any) -> tuple[list[int], torch.Tensor]:
        done: list[int] = []

        def stop(pipe: Any, index: int, timestep: Any, tensors: Tensors) -> Tensors:
            done.append(index)
            pipe._interrupt = index == 1
            return tensors

        return done, latents_of(pipe, callback_on_step_end=stop)

    (done, a), (_, b) = run(ours(SD, "sd")), run(theirs(SD, "sd"))
    assert done == [0, 1]
    assert relative(a, b) <= RELATIVE
    pipe = ours(SD, "sd")
    run(pipe)
    assert len(list(pipe.stream(prompt="a cat", num_inference_steps=3, output_type="latent"))) == 3, "not reset"


def test_facts_of_the_run_are_readable_from_a_callback(ours: Pipes) -> None:
    seen: list[Any] = []

    def read(pipe: Any, index: int, timestep: Any, tensors: Tensors) -> Tensors:
        seen.append((pipe.guidance_scale, pipe.guidance_rescale, pipe.do_classifier_free_guidance, pipe.num_timesteps))
        seen.append((pipe.clip_skip, pipe.cross_attention_kwargs, pipe.interrupt))
        return {}

    latents_of(
        ours(SD, "sd"), steps=2, guidance_scale=3.0, guidance_rescale=0.1, clip_skip=1, callback_on_step_end=read
    )
    assert seen[:2] == [(3.0, 0.1, True, 2), (1, None, False)]


# -- streaming and progress ----------------------------------------------------------------------


def test_a_stream_gives_every_step_and_then_the_result(ours: Pipes) -> None:
    pipe = ours(SD, "sd")
    steps = list(pipe.stream(prompt="a cat", num_inference_steps=3, output_type="latent", generator=generator()))
    assert [(s.index, s.total) for s in steps] == [(0, 3), (1, 3), (2, 3)]
    assert torch.equal(steps[-1].state.images, latents_of(pipe, steps=3))


def test_leaving_a_stream_stops_the_run(ours: Pipes) -> None:
    pipe, calls = ours(SD, "sd"), []
    hook = pipe.unet.register_forward_pre_hook(lambda m, args: calls.append(1))
    for step in pipe.stream(prompt="a cat", num_inference_steps=50):
        if step.index == 1:
            break
    hook.remove()
    assert len(calls) == 2


def test_the_progress_bar_follows_its_configuration(ours: Pipes, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = ours(SD, "sd")
    pipe.set_progress_bar_config(desc="painting")
    latents_of(pipe, steps=3)
    assert "painting: 100%" in (shown := capsys.readouterr().err)
    assert "3/3" in shown
    pipe.set_progress_bar_config(disable=True)
    latents_of(pipe, steps=3)
    assert capsys.readouterr().err == ""
    assert list(pipe.progress_bar([1, 2])) == [1, 2]
    with pytest.raises(ValueError, match="`iterable` or `total`"):
        pipe.progress_bar()


@pytest.mark.parametrize("name", ["HeunDiscreteScheduler", "PNDMScheduler"])
def test_the_progress_bar_ends_full_where_steps_have_several_timesteps(
    name: str, ours: Pipes, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe = ours(SD, "sd")
    pipe.scheduler = getattr(effusion, name).from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config()
    latents_of(pipe, steps=4)
    assert "100%" in capsys.readouterr().err


# -- mistakes ------------------------------------------------------------------------------------

LONG = {"prompt_embeds": tensor(1, 77, 32)}
MISTAKES: list[tuple[str, str, str, dict[str, Any], str]] = [
    ("size", SD, "sd", {"height": 30}, r"divisible by 8, got 30 x 32.*nearest size is 32 x 32"),
    ("negative size", SD, "sd", {"height": -8}, r"divisible by 8, got -8 x 32"),
    ("no prompt", SD, "sd", {"prompt": None}, r"neither `prompt` nor `prompt_embeds`.*give one"),
    ("both", SD, "sd", LONG, r"both `prompt` and `prompt_embeds`.*give one"),
    (
        "both negatives", SD, "sd", {"negative_prompt": "x", "negative_prompt_embeds": tensor(1, 77, 32)},
        r"both `negative_prompt` and `negative_prompt_embeds`",
    ),
    (
        "shapes", SD, "sd", {"prompt": None, **LONG, "negative_prompt_embeds": tensor(1, 70, 32)},
        r"same shape.*\(1, 77, 32\).*\(1, 70, 32\)",
    ),
    ("negatives", SD, "sd", {"prompt": ["a", "b"], "negative_prompt": ["x"] * 3}, "3 negative prompts for 2 prompts"),
    ("output", SD, "sd", {"output_type": "jpg"}, r"`output_type` has to be one of .*'pil'.*got 'jpg'"),
    ("tensor name", SD, "sd", {"callback_on_step_end_tensor_inputs": ["noise"]}, r"\['noise'\].*allowed are \['lat"),
    ("callback steps", SD, "sd", {"callback_steps": 0}, "positive integer, got 0"),
    ("steps", SD, "sd", {"num_inference_steps": 0}, "at least 1, got 0"),
    ("two schedules", SD, "sd", {"timesteps": [3, 1], "sigmas": [1.0]}, "both `timesteps` and `sigmas`"),
    ("sigmas", SD, "sd", {"sigmas": [1.0, 0.5]}, "DDIMScheduler takes no custom `sigmas`"),
    ("generators", SD, "sd", {"generator": [generator()] * 3}, "3 generators for a batch of 1"),
    ("ip adapter", SD, "sd", {"ip_adapter_image": picture()}, "no IP-Adapter is loaded"),
    ("strength", SD_I2I, "sd", {"image": picture(), "strength": 1.2}, "between 0 and 1, got 1.2"),
    ("no step left", SD_I2I, "sd", {"image": picture(), "strength": 0.1}, "no denoising step is left of 4"),
    ("no image", SD_I2I, "sd", {}, "`image` is missing"),
    ("strange image", SD_I2I, "sd", {"image": "cat.png"}, "expected a PIL image"),
    ("images", SD_I2I, "sd", {"image": [picture()] * 2, "prompt": ["a"] * 3}, "2 images can't be shared out to .* 3"),
    (
        "black mask", SD_INPAINT, "sd",
        {"image": picture(), "mask_image": mask().point(lambda _: 0), "padding_mask_crop": 2}, "black everywhere",
    ),
    (
        "crop of an array", SD_INPAINT, "sd",
        {"image": np.array(picture()), "mask_image": mask(), "padding_mask_crop": 2}, "needs PIL.* got ndarray",
    ),
    (
        "crop to an array", SD_INPAINT, "sd",
        {"image": picture(), "mask_image": mask(), "padding_mask_crop": 2, "output_type": "np"}, "needs PIL.*'np'",
    ),
    ("no mask", SD_INPAINT, "sd", {"image": picture()}, "`mask_image` is missing"),
    ("no picture", SD_INPAINT, "sd", {"mask_image": mask()}, "`image` is missing"),
    ("pooled", XL, "xl", {"prompt": None, "prompt_embeds": tensor(1, 77, 64)}, "without `pooled_prompt_embeds`"),
    ("second prompt", XL, "xl", {"prompt": None, "prompt_2": "x", "prompt_embeds": tensor(1, 7, 64)}, "`prompt_2`"),
    ("fraction", XL, "xl", {"denoising_end": 1.5}, r"`denoising_end` has to be a float between 0 and 1, got 1.5"),
    (
        "order", XL_INPAINT, "xl",
        {"image": picture(), "mask_image": mask(), "denoising_start": 0.8, "denoising_end": 0.4}, "must come before",
    ),
    ("refiner as base", XL, "refiner", {}, "requires_aesthetics_score"),
    ("lcm steps", LCM, "lcm", {"num_inference_steps": 60}, "60"),
]  # fmt: skip


@pytest.mark.parametrize(("face", "name", "inputs", "message"), [m[1:] for m in MISTAKES], ids=[m[0] for m in MISTAKES])
def test_a_mistake_is_explained_before_any_step(
    face: str, name: str, inputs: dict[str, Any], message: str, ours: Pipes
) -> None:
    pipe, calls = ours(face, name), []
    hook = pipe.unet.register_forward_pre_hook(lambda m, args: calls.append(1))
    given = {"prompt": "a cat", "num_inference_steps": 4, **inputs}
    with pytest.raises(ValueError, match=message):
        pipe(**given)
    hook.remove()
    assert not calls, "the network ran before the mistake was found"


def test_arguments_that_no_face_has_are_refused(ours: Pipes) -> None:
    with pytest.raises(TypeError, match=r"StableDiffusionPipeline.*\['stepz'\]"):
        ours(SD, "sd")(prompt="a cat", stepz=3)
    with pytest.raises(TypeError, match="string or a list of strings, not int"):
        ours(SD, "sd")(prompt=3)


def test_one_negative_prompt_serves_all_prompts(ours: Pipes) -> None:
    """The peer refuses a string beside a list; here it is what it looks like."""
    one = latents_of(ours(SD, "sd"), prompt=["a", "b"], negative_prompt="dark")
    assert torch.equal(one, latents_of(ours(SD, "sd"), prompt=["a", "b"], negative_prompt=["dark", "dark"]))


def test_what_is_cut_from_a_long_prompt_is_said(ours: Pipes, caplog: pytest.LogCaptureFixture) -> None:
    latents_of(ours(SD, "sd"), steps=1, prompt="a" * 75 + "xyz")
    assert any("77 tokens" in m and "xyz" in m.replace(" ", "") for m in caplog.messages)
    caplog.clear()
    latents_of(ours(SD, "sd"), steps=1, prompt="a" * 75)
    assert not caplog.messages


def test_outputs_come_as_tuples_on_request(ours: Pipes) -> None:
    pipe = ours(SD, "sd-safe")
    out = pipe("a cat", num_inference_steps=1, generator=generator())
    images, flags = pipe("a cat", num_inference_steps=1, generator=generator(), return_dict=False)
    assert out.nsfw_content_detected == flags == out["nsfw_content_detected"]
    assert np.array_equal(np.asarray(images[0]), np.asarray(out[0][0]))


# -- components ----------------------------------------------------------------------------------


def test_components_are_the_arguments_of_the_face(ours: Pipes, theirs: Pipes) -> None:
    for face, name in ((SD, "sd"), (XL, "xl"), (LCM, "lcm")):
        mine = ours(face, name)
        assert set(mine.components) == set(theirs(face, name).components)
        assert all(getattr(mine, k) is v for k, v in mine.components.items())


def test_setting_a_component_updates_the_configuration(ours: Pipes, tmp_path: Path) -> None:
    pipe = ours(SD, "sd")
    pipe.scheduler = effusion.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    assert tuple(pipe.config["scheduler"]) == ("diffusers", "EulerDiscreteScheduler")
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["scheduler"] == [
        "diffusers",
        "EulerDiscreteScheduler",
    ]
    assert type(effusion.StableDiffusionPipeline.from_pretrained(tmp_path).scheduler) is effusion.EulerDiscreteScheduler


def test_swapping_the_scheduler_as_everyone_does_is_silent(ours: Pipes, caplog: pytest.LogCaptureFixture) -> None:
    pipe = ours(SD, "sd")
    for name in ("EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DDIMScheduler"):
        pipe.scheduler = getattr(effusion, name).from_config(pipe.scheduler.config)
    assert not caplog.messages
    effusion.DDIMScheduler.from_config({**pipe.scheduler.config, "betas_start": 1})
    assert "betas_start" in caplog.text


def test_to_casts_every_network(ours: Pipes) -> None:
    pipe = ours(SD, "sd")
    own = effusion.StableDiffusionPipeline(**{k: copy.deepcopy(v) for k, v in pipe.components.items()})
    own.set_progress_bar_config(disable=True)
    assert own.to("cpu", torch.bfloat16) is own
    assert {m.dtype for m in own.modules.values()} == {own.dtype} == {torch.bfloat16}
    assert latents_of(own, steps=1).dtype == torch.bfloat16
    assert own.to(torch.float32).dtype == torch.float32


@pytest.mark.parametrize("sampler", ["DDIMScheduler", "EulerAncestralDiscreteScheduler", "PNDMScheduler"])
def test_the_same_seed_gives_the_same_bits(sampler: str, ours: Pipes) -> None:
    pipe = ours(SD, "sd")
    pipe.scheduler = getattr(effusion, sampler).from_config(pipe.scheduler.config)
    first = latents_of(pipe)
    assert torch.equal(first, latents_of(pipe))
    assert not torch.equal(first, latents_of(pipe, seed=1))


def test_a_batch_is_what_its_members_are_alone(ours: Pipes) -> None:
    """Lists of generators mean: each picture as if made alone."""
    pipe = ours(SD, "sd")
    inputs = {"num_inference_steps": 3, "output_type": "latent"}
    together = pipe(prompt=["a cat", "a dog"], generator=[generator(4), generator(5)], **inputs).images
    alone = [pipe(prompt=p, generator=generator(s), **inputs).images for p, s in (("a cat", 4), ("a dog", 5))]
    assert relative(together, torch.cat(alone)) <= 1e-5


# -- sharing -------------------------------------------------------------------------------------

AUTO = {
    "text2image": effusion.AutoPipelineForText2Image,
    "image2image": effusion.AutoPipelineForImage2Image,
    "inpaint": effusion.AutoPipelineForInpainting,
}


@pytest.mark.parametrize(("name", "face"), [("sd", SD), ("xl", XL), ("refiner", XL_I2I)])
@pytest.mark.parametrize("task", TASKS)
def test_auto_pipelines_find_the_same_class_as_the_peers(
    name: str, face: str, task: str, ours: Pipes, theirs: Pipes, checkpoint: Checkpoints
) -> None:
    auto, peer = AUTO[task], getattr(diffusers, AUTO[task].__name__)
    mine = ours(face, name)
    shared = auto.from_pipe(mine)
    assert type(shared).__name__ == type(peer.from_pipe(theirs(face, name))).__name__
    assert type(auto.from_pretrained(checkpoint(name))) is type(shared)
    for key, component in mine.components.items():
        assert getattr(shared, key) is component, "a component was copied"
    assert shared.config.get("requires_aesthetics_score") in (None, mine.config.get("requires_aesthetics_score", False))


CONTROLLED = [
    ("FluxPipeline", "flux", "flux-controlnet", {"text2image": "", "image2image": "Img2Img", "inpaint": "Inpaint"}),
    ("StableDiffusion3Pipeline", "sd3", "sd3-controlnet", {"text2image": "", "inpaint": "Inpainting"}),
]


@pytest.mark.parametrize(("face", "name", "controlled", "tasks"), CONTROLLED, ids=[c[1] for c in CONTROLLED])
def test_auto_pipelines_switch_to_control_networks_and_back(
    face: str, name: str, controlled: str, tasks: dict[str, str], ours: Pipes, theirs: Pipes, checkpoint: Checkpoints
) -> None:
    stem = face.removesuffix("Pipeline")
    mine, peer = ours(face, name), theirs(face, name)
    nets = [pipes(f"{stem}ControlNetPipeline", controlled).controlnet for pipes in (ours, theirs)]
    for task, ending in tasks.items():
        wanted = f"{stem}ControlNet{ending}Pipeline"
        auto, theirs_ = AUTO[task], getattr(diffusers, AUTO[task].__name__)
        made = auto.from_pipe(mine, controlnet=nets[0], enable_pag=False)
        assert type(made).__name__ == wanted
        if ending != "Inpainting":  # the peer looks for "Inpaint", and finds no class
            assert type(theirs_.from_pipe(peer, controlnet=nets[1])).__name__ == wanted
        assert made.controlnet is nets[0]
        assert type(auto.from_pretrained(checkpoint(name), controlnet=nets[0], enable_pag=None)) is type(made)
        assert type(auto.from_pipe(made)) is type(made)
        back = auto.from_pipe(made, controlnet=None)
        assert type(back) is type(auto.from_pipe(mine))
        assert type(auto.from_pretrained(checkpoint(name), controlnet=None)) is type(back)


def test_auto_pipelines_say_what_they_lack(ours: Pipes, checkpoint: Checkpoints) -> None:
    auto, dit = effusion.AutoPipelineForText2Image, ours("DiTPipeline", "dit")
    with pytest.raises(ValueError, match=r"DiTPipeline has no pipeline with control networks; there are \['"):
        auto.from_pipe(dit, controlnet=object())
    for make in (lambda: auto.from_pipe(ours(SD, "sd"), enable_pag=True),
                 lambda: auto.from_pretrained(checkpoint("sd"), enable_pag=True)):  # fmt: skip
        with pytest.raises(UnsupportedTask, match="`enable_pag`.*pass False"):
            make()


def test_what_a_class_has_no_use_for_is_found_again_when_sharing_back(ours: Pipes, theirs: Pipes) -> None:
    for library, pipes in ((effusion, ours), (diffusers, theirs)):
        there = library.AutoPipelineForText2Image.from_pipe(pipes(XL_I2I, "refiner"))
        assert "requires_aesthetics_score" not in there.config
        back = library.AutoPipelineForImage2Image.from_pipe(there)
        assert back.config.requires_aesthetics_score is True


def test_auto_pipelines_are_not_built_directly() -> None:
    with pytest.raises(OSError, match="from_pretrained"):
        effusion.AutoPipelineForText2Image()


def test_auto_pipelines_of_lcm(ours: Pipes) -> None:
    pipe = ours(LCM, "lcm")
    assert type(AUTO["image2image"].from_pipe(pipe)).__name__ == LCM_I2I
    with pytest.raises(ValueError, match="inpaint"):
        AUTO["inpaint"].from_pipe(pipe)


def test_from_pipe_shares_replaces_and_checks(ours: Pipes) -> None:
    pipe = ours(SD, "sd")
    other = effusion.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    made = effusion.StableDiffusionImg2ImgPipeline.from_pipe(pipe, scheduler=other)
    assert made.unet is pipe.unet
    assert made.scheduler is other
    assert pipe.scheduler is not other
    with pytest.raises(ValueError, match=r"from DDPMPipeline: components \['text_encoder', 'tokenizer', 'vae'\]"):
        effusion.StableDiffusionPipeline.from_pipe(ours("DDPMPipeline", "ddpm"))
    with pytest.raises(ValueError, match=r"\['unets'\] are unknown"):
        effusion.StableDiffusionImg2ImgPipeline.from_pipe(pipe, unets=None)


@pytest.mark.parametrize(("face", "name"), [(SD, "sd"), (XL, "xl")])
def test_from_pipe_equals_the_peers_pipeline(face: str, name: str, ours: Pipes, theirs: Pipes) -> None:
    to = face.replace("Pipeline", "Img2ImgPipeline")
    a = getattr(effusion, to).from_pipe(ours(face, name))
    b = getattr(diffusers, to).from_pipe(theirs(face, name))
    for pipe in (a, b):
        pipe.set_progress_bar_config(disable=True)
    x, y = (latents_of(p, image=picture(), strength=0.8) for p in (a, b))
    assert relative(x, y) <= RELATIVE


# -- families x tasks, and edited lists ----------------------------------------------------------

FAMILIES = {
    "sd": (STABLE_DIFFUSION, SD), "xl": (STABLE_DIFFUSION_XL, XL), "lcm": (LATENT_CONSISTENCY, LCM),
    "ddpm": (UNCONDITIONAL, "DDPMPipeline"),
}  # fmt: skip


@pytest.mark.parametrize("task", [*TASKS, "text2video"])
@pytest.mark.parametrize("name", list(FAMILIES))
def test_every_cell_of_families_and_tasks_runs_or_is_refused(name: str, task: str, ours: Pipes) -> None:
    family, face = FAMILIES[name]
    if task not in family.tasks:
        with pytest.raises(UnsupportedTask, match=f"{family.name} can't do {task}; it can do "):
            effusion.ModularPipeline.from_pipeline(ours(face, name), task)
        return
    pipe = effusion.ModularPipeline.from_pipeline(ours(face, name), task)
    pipe.set_progress_bar_config(disable=True)
    size = 32 if name != "ddpm" else 16
    inputs: dict[str, Any] = {"num_inference_steps": 4, "generator": generator(), "output_type": "pt"}
    if name != "ddpm":
        inputs["prompt"] = "a cat"
    if task != "text2image":
        inputs["image"] = picture(size)
    if task == "inpaint":
        inputs["mask_image"] = mask(size)
    images = pipe(output="images", **inputs)
    assert images.shape == (1, 3, size, size)
    assert torch.isfinite(images).all()
    if task == "image2image":
        inputs |= {"strength": 0.25, "generator": generator()}  # one step of four
        weak = pipe(output="images", **inputs)
        source = torch.from_numpy(np.array(picture(size)) / 255).permute(2, 0, 1)[None].float()
        if name == "ddpm":
            assert (weak - source).abs().mean() < (images - source).abs().mean(), "the picture had no effect"
    if task == "inpaint" and name == "ddpm":
        outside = torch.from_numpy(np.array(mask(size))) < 128
        source = torch.from_numpy(np.array(picture(size)) / 255).permute(2, 0, 1)[None].float()
        assert (images - source)[..., outside].abs().max() < 0.01, "what the mask keeps was changed"


@pytest.mark.parametrize(("face", "name"), [(SD, "sd"), (XL, "xl"), (LCM, "lcm")])
def test_the_modular_pipeline_equals_the_face(face: str, name: str, ours: Pipes, checkpoint: Checkpoints) -> None:
    classic = latents_of(ours(face, name))
    for pipe in (
        effusion.ModularPipeline.from_pipeline(ours(face, name)),
        effusion.ModularPipeline.from_pretrained(checkpoint(name)),
    ):
        pipe.set_progress_bar_config(disable=True)
        inputs = {"prompt": "a cat", "num_inference_steps": 4, "output_type": "latent", "generator": generator()}
        assert torch.equal(pipe(output="images", **inputs), classic)


def test_edited_blocks_act(ours: Pipes) -> None:
    pipe = effusion.ModularPipeline.from_pipeline(ours(SD, "sd"))
    pipe.set_progress_bar_config(disable=True)
    inputs = {"prompt": "a cat", "num_inference_steps": 2, "output_type": "latent"}
    plain = pipe(output="images", generator=generator(), **inputs)
    pipe.blocks.insert_before("denoise", "mirror", lambda latents: {"latents": latents.flip(-1)})
    mirrored = pipe(output="images", generator=generator(), **inputs)
    assert not torch.equal(plain, mirrored)
    pipe.blocks.remove("mirror")
    assert torch.equal(pipe(output="images", generator=generator(), **inputs), plain)

    def tint(latents: torch.Tensor, strength_of_tint: float = 0.0) -> dict[str, Any]:
        """Add a constant."""
        return {"latents": latents + strength_of_tint, "tinted": True}

    pipe.blocks.insert_after("denoise", "tint", tint)
    state = pipe(generator=generator(), strength_of_tint=0.5, **inputs)
    assert torch.equal(state.images, plain + 0.5)
    assert state.get("tinted") is True
    both = pipe(output=["images", "tinted"], generator=generator(), **inputs)
    assert set(both) == {"images", "tinted"}
    assert "tint(latents, strength_of_tint): Add a constant." in repr(pipe.blocks)


def test_the_blocks_of_a_face_are_its_own(ours: Pipes) -> None:
    pipe, other = ours(SD, "sd"), ours(SD, "sd")
    pipe.blocks.replace("decode", lambda latents: {"images": "replaced"})
    assert pipe("a cat", num_inference_steps=1).images == "replaced"
    assert other("a cat", num_inference_steps=1, output_type="latent").images.shape == (1, 4, 16, 16)


def test_mistakes_with_blocks_are_explained(ours: Pipes) -> None:
    pipe = effusion.ModularPipeline.from_pipeline(ours(SD, "sd"))
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match=r"no block is called 'dnoise'; there are \['check'"):
        pipe.blocks.insert_before("dnoise", "x", dict)
    with pytest.raises(ValueError, match="called 'decode' is in the list already"):
        pipe.blocks.insert_before("denoise", "decode", dict)
    with pytest.raises(ValueError, match=r"no block asks for \['promt'\]"):
        pipe(promt="a cat")
    pipe.blocks.insert_before("denoise", "needy", lambda missing_thing: {})
    with pytest.raises(ValueError, match="`needy` needs `missing_thing`"):
        pipe(prompt="a cat", num_inference_steps=1)
    pipe.blocks.replace("needy", lambda: 3)
    with pytest.raises(TypeError, match="`needy` returned int"):
        pipe(prompt="a cat", num_inference_steps=1)


def test_faces_hold_no_logic() -> None:
    """Each ``__call__`` hands its arguments on, and that is all."""
    for face in (SD, SD_I2I, SD_INPAINT, XL, XL_I2I, XL_INPAINT, LCM, LCM_I2I, "DDPMPipeline", "DDIMPipeline"):
        body = inspect.getsource(getattr(effusion, face).__call__).split('"""')[-1].split()
        assert body == ["return", "self._generate(locals())"], face
