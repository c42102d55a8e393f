"""Pipelines with control networks besides one call: mistakes, files, sharing, callbacks, memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

import effusion
from effusion.families.control import Control, control_of
from effusion.pipelines.members import folders_to_fetch
from effusion.pipelines.planning import skeleton

from .conftest import Checkpoints, Pipes
from .inputs import generator, mask, picture
from .test_control_parity import BOTH, EDGES, PAINT, REDO, SD, SD_I2I, SD_INPAINT, XL, XL_I2I, XL_INPAINT
from .test_parity import RELATIVE, Case, compare, relative


def call(inputs: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The arguments of a run; of ``inputs``, functions are called."""
    return Case("", "", "", {**inputs, "output_type": "latent"}).inputs() | more


# -- mistakes ------------------------------------------------------------------------------------

MISTAKES: list[tuple[str, str, str, dict[str, Any], str]] = [
    ("no picture", SD, "sd-control", {}, "`image` is missing: the picture to follow"),
    ("no control picture", SD_I2I, "sd-control", {"image": picture()}, "`control_image` is missing"),
    ("only the control picture", SD_I2I, "sd-control", {"control_image": picture()}, "`image` is missing"),
    ("no mask", SD_INPAINT, "sd-control", {"image": picture(), "control_image": picture()}, "`mask_image` is missing"),
    ("no picture, xl", XL, "xl-control", {}, "`image` is missing"),
    ("strange", SD, "sd-control", {"image": "edges.png"}, "`image` has to be a PIL image.* got str"),
    ("strange, in a list", SD, "sd-controls", {"image": [picture(), 3]}, "`image` has to be a PIL image.* got int"),
    ("empty", SD, "sd-control", {"image": []}, "`image` has to be a PIL image.* got list"),
    ("two pictures", SD, "sd-control", {"image": [picture()] * 2}, "`image` has 2 pictures for 1 prompts"),
    (
        "sizes differ", SD_I2I, "sd-control", {"image": picture(64), "control_image": picture(32)},
        "different sizes.*`image` 64x64, `control_image` 32x32.*give `height` and `width`",
    ),
    (
        "sizes of several differ", XL, "xl-controls", {"image": [picture(64), picture(32)]},
        "different sizes.*`image` 64x64, `image` 32x32",
    ),
    (
        "sizes differ, inpainting", XL_INPAINT, "xl-control",
        {"image": picture(64), "control_image": picture(32), "mask_image": mask(64)}, "different sizes",
    ),
    ("one for several", SD, "sd-controls", {"image": picture()}, "2 control networks: `image` has to be a list.*got Image"),
    ("too many", SD, "sd-controls", {"image": [picture()] * 3}, "2 control networks, `image` is a list of 3"),
    ("rows", SD, "sd-controls", {"image": [[picture()], [picture()] * 2]}, "2 control networks.*list of these for each"),
    (
        "scales", SD, "sd-controls", {"image": [picture()] * 2, "controlnet_conditioning_scale": [1.0, 1.0, 1.0]},
        r"2 control networks: .*\[3, 2, 2\] values",
    ),
    ("list for one", SD, "sd-control", {**EDGES, "controlnet_conditioning_scale": [1.0, 1.0]}, r"\[2, 1, 1\] values"),
    ("no number", SD, "sd-control", {**EDGES, "controlnet_conditioning_scale": "strong"}, "numbers.*'strong'"),
    ("backwards", SD, "sd-control", {**EDGES, "control_guidance_start": 0.8, "control_guidance_end": 0.2}, "from 0.8 to 0.2"),
    ("too late", XL_I2I, "xl-control", {**REDO, "control_guidance_end": 1.2}, "from 0.0 to 1.2"),
    ("ends", SD, "sd-controls", {**BOTH, "control_guidance_end": [1.0]}, r"\[2, 2, 1\] values"),
    ("strength", SD_I2I, "sd-control", {**REDO, "strength": 1.5}, "between 0 and 1, got 1.5"),
    ("no prompt", SD, "sd-control", {**EDGES, "prompt": None}, "neither `prompt` nor `prompt_embeds`"),
]  # fmt: skip


@pytest.mark.parametrize(("face", "name", "inputs", "message"), [m[1:] for m in MISTAKES], ids=[m[0] for m in MISTAKES])
def test_a_mistake_is_explained_before_any_network_runs(
    face: str, name: str, inputs: dict[str, Any], message: str, ours: Pipes
) -> None:
    pipe, calls = ours(face, name), []
    hooks = [m.register_forward_pre_hook(lambda m, args: calls.append(type(m).__name__)) for m in pipe.modules.values()]
    try:
        with pytest.raises(ValueError, match=message):
            pipe(**call({k: v() if callable(v) else v for k, v in inputs.items()}))
    finally:
        for hook in hooks:
            hook.remove()
    assert calls == []


def test_an_odd_size_is_rounded_down_with_a_warning(ours: Pipes, caplog: pytest.LogCaptureFixture) -> None:
    """The peer rounds it, too, and is silent."""
    pipe = ours(SD, "sd-control")
    assert pipe(**call(EDGES, height=35, num_inference_steps=1)).images.shape == (1, 4, 16, 16)
    assert "made 32 and 32" in caplog.text
    caplog.clear()
    assert pipe(**call({"image": picture(45)}, num_inference_steps=1)).images.shape == (1, 4, 20, 20)
    assert caplog.text == ""


# -- what control networks do --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("face", "name", "inputs"),
    [
        (SD, "sd-control", EDGES),
        (SD_I2I, "sd-control", REDO),
        (SD_INPAINT, "sd-control", PAINT),
        (XL, "xl-control", EDGES),
    ],
)
def test_the_picture_is_followed(face: str, name: str, inputs: dict[str, Any], ours: Pipes) -> None:
    pipe = ours(face, name)
    control = "image" if "control_image" not in inputs else "control_image"
    plain = pipe(**call(inputs)).images
    assert relative(pipe(**call(inputs, **{control: picture(seed=3)})).images, plain) > 30 * RELATIVE
    assert relative(pipe(**call(inputs, controlnet_conditioning_scale=0.1)).images, plain) > 30 * RELATIVE


def test_a_network_that_does_not_act_is_not_asked(ours: Pipes) -> None:
    pipe, steps = ours(SD, "sd-control"), []
    hook = pipe.controlnet.register_forward_pre_hook(lambda m, args: steps.append(int(args[1])))
    window = {"control_guidance_start": 0.25, "control_guidance_end": 0.75, "num_inference_steps": 8}
    try:
        pipe(**call(EDGES, **window))
        assert len(steps) == 4
        silent = pipe(**call(EDGES, controlnet_conditioning_scale=0.0)).images
        assert len(steps) == 4
    finally:
        hook.remove()
    plain = effusion.StableDiffusionPipeline.from_pipe(pipe)
    plain.set_progress_bar_config(disable=True)
    plain.scheduler = ours(SD, "sd-control").scheduler
    assert torch.equal(silent, plain(**call({}, height=32, width=32)).images)


def test_what_is_asked_once_is_kept_for_the_step_only() -> None:
    asked: list[Any] = []
    control = control_of(None, lambda inputs, scales: asked.append(scales) or {"n": len(asked)}, 1, 0.5, 0.0, 1.0)
    assert [control(None, 0.0, 0.5)["n"], control(None, 0.0, 0.5)["n"]] == [1, 2]  # type: ignore[arg-type]
    once = Control(control.call, [0.5], [0.0], [1.0], once=True)
    found = [once(None, at, at + 0.5)["n"] for at in (0.0, 0.0, 0.5)]  # type: ignore[arg-type]
    assert found == [3, 3, 4]


@pytest.mark.parametrize(
    ("face", "name", "inputs"),
    [
        (SD, "sd-control", EDGES),
        (SD, "sd-controls", BOTH),
        (SD_I2I, "sd-control", REDO),
        (SD_INPAINT, "sd9-control", PAINT),
    ],
)
def test_a_callback_gets_every_tensor_that_it_may_ask_for(
    face: str, name: str, inputs: dict[str, Any], ours: Pipes, theirs: Pipes
) -> None:
    names, found = getattr(effusion, face)._callback_tensor_inputs, []

    def shape(value: Any) -> Any:
        return [shape(v) for v in value] if isinstance(value, list) else None if value is None else tuple(value.shape)

    for pipes in (ours, theirs):
        seen: list[Any] = []

        def note(pipe: Any, index: int, timestep: Any, tensors: Any, seen: list[Any] = seen) -> Any:
            seen.append({k: shape(v) for k, v in tensors.items()})
            return {}

        options = {"callback_on_step_end": note, "callback_on_step_end_tensor_inputs": names}
        pipes(face, name)(**call(inputs, **options))
        found.append(seen)
    assert found[0] == found[1]


def test_a_callback_may_replace_the_control_picture(ours: Pipes) -> None:
    pipe = ours(SD, "sd-control")

    def other(pipe: Any, index: int, timestep: Any, tensors: Any) -> Any:
        return {"image": 1 - tensors["image"]}

    options = {"callback_on_step_end": other, "callback_on_step_end_tensor_inputs": ["latents", "image"]}
    assert relative(pipe(**call(EDGES, **options)).images, pipe(**call(EDGES)).images) > 30 * RELATIVE


def test_guidance_may_be_cut_off_in_guess_mode(ours: Pipes, theirs: Pipes) -> None:
    found = []
    for library, pipes in ((effusion, ours), (diffusers.callbacks, theirs)):
        callback = library.SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)
        options = {"callback_on_step_end": callback, "guess_mode": True, "num_inference_steps": 4}
        found.append(pipes(SD, "sd-control")(**call(EDGES, **options)).images)
    assert relative(*found) <= RELATIVE


# -- files and sharing ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("face", "name", "inputs"),
    [
        (SD, "sd-control", EDGES),
        (SD, "sd-controls", BOTH),
        (XL, "xl-controls", BOTH),
        (SD_INPAINT, "sd9-control", PAINT),
    ],
)
def test_what_we_save_the_peer_loads(
    face: str, name: str, inputs: dict[str, Any], ours: Pipes, theirs: Pipes, tmp_path: Path
) -> None:
    pipe = ours(face, name)
    pipe.save_pretrained(tmp_path)
    folders = sorted(p.name for p in tmp_path.iterdir() if p.name.startswith("controlnet"))
    assert folders == (["controlnet", "controlnet_1"] if name.endswith("s") else ["controlnet"])
    reloaded = getattr(diffusers, face).from_pretrained(tmp_path)
    reloaded.set_progress_bar_config(disable=True)
    compare(pipe, reloaded, Case(name, face, name, inputs))
    before, after = dict(theirs(face, name).config), dict(reloaded.config)
    assert {k: v for k, v in after.items() if k != "_name_or_path"} == {
        k: v for k, v in before.items() if k != "_name_or_path"
    }
    again = effusion.DiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert type(again) is type(pipe)
    assert torch.equal(again(**call(inputs)).images, pipe(**call(inputs)).images)


def test_several_networks_are_given_as_a_list(checkpoint: Checkpoints, ours: Pipes, tmp_path: Path) -> None:
    nets = list(ours(SD, "sd-controls").controlnet.nets)
    scheduler = ours(SD, "sd-controls").scheduler
    pipe = effusion.StableDiffusionControlNetPipeline.from_pretrained(
        checkpoint("sd"), controlnet=nets, scheduler=scheduler
    )
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe.controlnet) is effusion.MultiControlNetModel
    assert torch.equal(pipe(**call(BOTH)).images, ours(SD, "sd-controls")(**call(BOTH)).images)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["controlnet"] == ["diffusers", "MultiControlNetModel"]
    half = effusion.StableDiffusionControlNetPipeline.from_pretrained(tmp_path, torch_dtype=torch.float16)
    assert {net.dtype for net in half.controlnet.nets} == {torch.float16}
    assert half.controlnet.dtype == torch.float16
    (tmp_path / "controlnet_1" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(OSError, match="controlnet_1"):
        effusion.StableDiffusionControlNetPipeline.from_pretrained(tmp_path)


def test_of_several_networks_all_folders_are_fetched() -> None:
    several = {"controlnet": ["diffusers", "MultiControlNetModel"], "text_encoder": ["transformers", "CLIPTextModel"]}
    names = ("controlnet", "controlnet_1", "controlnet_2", "controlnet_old", "text_encoder", "text_encoder_2")
    files = [f"{name}/config.json" for name in names] + ["model_index.json", "controlnet_3"]
    assert folders_to_fetch(files, several, list(several)) == ["controlnet_1", "controlnet_2"]
    one = several | {"controlnet": ["diffusers", "ControlNetModel"]}
    assert folders_to_fetch(files, one, list(one)) == []


def test_a_pipeline_without_a_control_network_says_so(checkpoint: Checkpoints) -> None:
    with pytest.raises(ValueError, match=r"no \['controlnet'\]: pass them"):
        effusion.StableDiffusionControlNetPipeline.from_pretrained(checkpoint("sd"))


@pytest.mark.parametrize(
    ("base", "name", "face"), [("StableDiffusionPipeline", "sd", SD), ("StableDiffusionXLPipeline", "xl", XL)]
)
def test_from_pipe_adds_and_leaves_out_the_control_network(base: str, name: str, face: str, ours: Pipes) -> None:
    controlled = ours(face, f"{name}-control")
    parts = {"controlnet": controlled.controlnet, "scheduler": controlled.scheduler}
    made = getattr(effusion, face).from_pipe(ours(base, name), **parts)
    made.set_progress_bar_config(disable=True)
    assert torch.equal(made(**call(EDGES)).images, controlled(**call(EDGES)).images)
    other = getattr(effusion, face.replace("Pipeline", "Img2ImgPipeline")).from_pipe(made)
    assert other.controlnet is controlled.controlnet
    back = getattr(effusion, base).from_pipe(made)
    assert back.unet is made.unet
    assert "controlnet" not in back.components


def test_a_single_file_takes_a_control_network(ours: Pipes, tmp_path: Path, checkpoint: Checkpoints) -> None:
    pipe = ours(SD, "sd-control")
    pipe.save_single_file(tmp_path / "model.safetensors")
    made = effusion.StableDiffusionControlNetPipeline.from_single_file(
        tmp_path / "model.safetensors", controlnet=pipe.controlnet, config=checkpoint("sd")
    )
    made.set_progress_bar_config(disable=True)
    made.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    assert relative(made(**call(EDGES)).images, pipe(**call(EDGES)).images) <= RELATIVE


# -- memory --------------------------------------------------------------------------------------

POLICIES = {
    "model": lambda pipe, folder: pipe.enable_model_cpu_offload(device="cpu"),
    "sequential": lambda pipe, folder: pipe.enable_sequential_cpu_offload(device="cpu"),
    "group": lambda pipe, folder: pipe.enable_group_offload("cpu", num_blocks_per_group=1),
    "disk": lambda pipe, folder: pipe.enable_group_offload("cpu", use_stream=True, offload_to_disk_path=folder),
    "hoisting": lambda pipe, folder: pipe.enable_hoisting(),
    "plan": lambda pipe, folder: pipe.fit("1GB", height=32, width=32, num_inference_steps=3),
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("face", "name", "inputs"), [(SD, "sd-control", EDGES), (XL_INPAINT, "xl-controls", PAINT)])
def test_policies_give_the_same_bits(
    policy: str, face: str, name: str, inputs: dict[str, Any], checkpoint: Checkpoints, tmp_path: Path
) -> None:
    given = dict(inputs)
    if name == "xl-controls":
        given["control_image"] = lambda: [picture(seed=9), picture(seed=8)]
    pipe = getattr(effusion, face).from_pretrained(checkpoint(name))
    pipe.set_progress_bar_config(disable=True)
    wanted = pipe(**call(given)).images
    POLICIES[policy](pipe, tmp_path)
    assert torch.equal(pipe(**call(given)).images, wanted)
    assert torch.equal(pipe(**call(given)).images, wanted)


def test_a_plan_has_rows_for_control_networks(checkpoint: Checkpoints, ours: Pipes) -> None:
    for name in ("sd-control", "sd-controls"):
        size = {"height": 32, "width": 32, "num_inference_steps": 3}
        plan, early = (pipe.plan("1GB", **size) for pipe in (ours(SD, name), skeleton(checkpoint(name))))
        rows = {row.component: row for row in plan.rows}
        assert "controlnet" in rows
        assert not plan.notes
        assert {row.component for row in early.rows} == set(rows)
        assert abs(early.peak - plan.peak) < 0.02 * plan.peak


def test_generators_move_on_alike(ours: Pipes) -> None:
    states = []
    for inputs in (EDGES, {**EDGES, "controlnet_conditioning_scale": 0.0}):
        g = generator()
        ours(SD, "sd-control")(**call(inputs, generator=g))
        states.append(g.get_state())
    assert torch.equal(*states)
