"""What scripts read from a pipeline and assign to it: properties, facts, configuration entries, processors."""

from __future__ import annotations

import copy
import inspect
import pickle
import sys
import types
import warnings
from importlib.machinery import ModuleSpec
from typing import Any

import diffusers
import pytest
import torch

import effusion
from effusion.core import registry
from effusion.pipelines.faces import FACES
from effusion.pipelines.facts import fact

from .conftest import Pipes
from .inputs import generator, mask, picture, tensor
from .test_parity import RELATIVE, relative

NAMES = [name for tasks in FACES.values() for name in dict.fromkeys(tasks.values()) if hasattr(diffusers, name)]
NAMES = [*dict.fromkeys([*NAMES, "FluxPriorReduxPipeline"])]

# what the peer's pipelines have and ours don't, with the reason
ABSENT = {
    "lora_scale": "adapters are not there",
    "num_fused_loras": "adapters are not there",
    "fused_loras": "adapters are not there",
    "is_ip_adapter_active": "adapters are not there",
    "control_image_processor": "the control picture is read by `image_processor`",
}
CHECKPOINTS = {
    "StableDiffusionXLImg2ImgPipeline": "refiner",
    "StableDiffusion3ControlNetInpaintingPipeline": "sd3-controlnet-mask",
    "FluxPriorReduxPipeline": "flux-redux",
    "FluxFillPipeline": "flux-fill",
    "FluxKontextPipeline": "flux-kontext",
    "QwenImageEditPipeline": "qwen-edit",
    "PixArtAlphaPipeline": "pixart-alpha",
    "PixArtSigmaPipeline": "pixart-sigma",
}
# the first part of a class's name that is found here says which checkpoint it is loaded from
KINDS = {
    "FluxControlNet": "flux-controlnet", "FluxControl": "flux-control", "Flux": "flux",
    "StableDiffusion3ControlNet": "sd3-controlnet", "StableDiffusion3": "sd3", "StableDiffusionXL": "xl",
    "StableDiffusion": "sd", "LatentConsistency": "lcm", "QwenImage": "qwen", "DiT": "dit", "DDPM": "ddpm", "DDIM": "ddpm",
}  # fmt: skip


def checkpoint_of(name: str) -> str:
    found = CHECKPOINTS.get(name) or next((c for kind, c in KINDS.items() if name.startswith(kind)), None)
    if found is None or ("ControlNet" in name and "control" not in found):
        pytest.skip(f"no tiny checkpoint for {name}")
    return found


def properties(cls: type) -> set[str]:
    return {n for n, v in inspect.getmembers(cls) if isinstance(v, (property, fact)) and not n.startswith("_")}


@pytest.mark.parametrize("name", NAMES)
def test_every_property_of_the_peers_class_is_there(name: str) -> None:
    ours, theirs = registry.find_class("diffusers", name), getattr(diffusers, name)
    assert properties(theirs) - properties(ours) - set(ABSENT) == set()


@pytest.mark.parametrize("name", NAMES)
def test_what_the_peers_constructor_assigns_is_there_and_equal(name: str, ours: Pipes, theirs: Pipes) -> None:
    checkpoint = checkpoint_of(name)
    mine, peer = ours(name, checkpoint), theirs(name, checkpoint)
    facts = {k: v for k, v in vars(peer).items() if k[0] != "_" and k not in peer.components and k not in ABSENT}
    facts.pop("watermark", None)  # tested by itself
    for fact_name, value in facts.items():
        found = getattr(mine, fact_name)
        if isinstance(value, diffusers.VaeImageProcessor):
            # the peer leaves `vae_latent_channels` at 4 where it expects no latents; ours says what the VAE has
            names = [k for k in found.config if k[0] != "_" and k != "vae_latent_channels"]
            same = {k: (found.config[k], value.config[k]) for k in names}
            assert all(a == b for a, b in same.values()), (fact_name, same)
        else:
            assert found == value, fact_name


# -- facts that are assigned ---------------------------------------------------------------------


def test_assigned_facts_stay(ours: Pipes) -> None:
    pipe = ours("StableDiffusionInpaintPipeline", "sd9")
    processor = effusion.VaeImageProcessor(vae_scale_factor=4)
    assert pipe.image_processor is pipe.image_processor, "what a script sets in it would be lost"
    for name in ("image_processor", "mask_processor", "control_image_processor", "vae_scale_factor"):
        setattr(pipe, name, processor if "processor" in name else 16)
        assert getattr(pipe, name) == (processor if "processor" in name else 16)
        delattr(pipe, name)
    assert pipe.vae_scale_factor == 2


def test_a_subclass_may_assign_what_the_peers_constructor_does(ours: Pipes) -> None:
    class Mine(effusion.StableDiffusionPipeline):
        def __init__(self, vae: Any, text_encoder: Any, tokenizer: Any, unet: Any, scheduler: Any) -> None:
            effusion.DiffusionPipeline.__init__(self)
            self.register_modules(
                vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler
            )
            self.vae_scale_factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
            self.image_processor = effusion.VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    parts = ours("StableDiffusionPipeline", "sd").components
    mine = Mine(**{n: parts[n] for n in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")})
    mine.set_progress_bar_config(disable=True)
    assert len(mine("a cat", num_inference_steps=1).images) == 1


def call(pipe: Any, **inputs: Any) -> torch.Tensor:
    inputs = {"prompt": "a cat", "num_inference_steps": 4, "output_type": "latent", **inputs}
    found: torch.Tensor = pipe(**inputs, generator=generator()).images
    return found


def test_an_assigned_image_processor_is_used(ours: Pipes, theirs: Pipes) -> None:
    got = []
    for library, pipes in ((effusion, ours), (diffusers, theirs)):
        pipe = pipes("StableDiffusionImg2ImgPipeline", "sd")
        before = call(pipe, image=picture(48))
        assert before.shape[-1] == 24
        pipe.image_processor = library.VaeImageProcessor(vae_scale_factor=32, do_normalize=False)
        got.append(call(pipe, image=picture(48)))
        assert got[-1].shape[-1] == 16
    assert relative(*got) <= RELATIVE


def test_an_assigned_mask_processor_is_used(ours: Pipes, theirs: Pipes) -> None:
    got = []
    inputs = {"image": picture(), "mask_image": mask().rotate(45)}
    for library, pipes in ((effusion, ours), (diffusers, theirs)):
        pipe = pipes("StableDiffusionInpaintPipeline", "sd9")
        before = call(pipe, **inputs)
        pipe.mask_processor = library.VaeImageProcessor(
            vae_scale_factor=2, do_normalize=False, do_binarize=False, do_convert_grayscale=True, resample="nearest"
        )
        inputs_here = {**inputs, "mask_image": mask().point(lambda v: v // 3)}
        got.append(call(pipe, **inputs_here))
        assert relative(before, got[-1]) > 1e-3
    assert relative(*got) <= RELATIVE


def test_an_assigned_scale_factor_is_used(ours: Pipes, theirs: Pipes) -> None:
    shapes = []
    for pipes in (ours, theirs):
        pipe = pipes("StableDiffusionPipeline", "sd")
        pipe.vae_scale_factor = 4
        shapes.append(
            [call(pipe, num_inference_steps=1).shape, call(pipe, num_inference_steps=1, height=32, width=64).shape]
        )
    assert shapes[0] == shapes[1]
    assert shapes[0][1][-2] == 8


@pytest.mark.parametrize(
    ("face", "name", "inputs"),
    [("StableDiffusionXLPipeline", "xl", {}), ("FluxPipeline", "flux", {"max_sequence_length": 16})],
)
def test_an_assigned_default_size_is_used(
    face: str, name: str, inputs: dict[str, Any], ours: Pipes, theirs: Pipes
) -> None:
    shapes = []
    for pipes in (ours, theirs):
        pipe = pipes(face, name)
        pipe.default_sample_size = 24
        shapes.append(call(pipe, num_inference_steps=1, **inputs).shape)
    assert shapes[0] == shapes[1]


def test_an_assigned_template_is_used() -> None:
    asked: list[tuple[list[str], int]] = []

    class Stop(Exception):
        pass

    def tokenizer(texts: list[str], max_length: int, **options: Any) -> Any:
        asked.append((texts, max_length))
        raise Stop

    pipe = effusion.QwenImagePipeline(None, None, torch.nn.Identity(), tokenizer, torch.nn.Identity())
    pipe.prompt_template_encode, pipe.prompt_template_encode_start_idx = "Paint {}!", 5
    pipe.tokenizer_max_length = 20
    with pytest.raises(Stop):
        pipe.encode_prompt("a cat")
    assert asked == [(["Paint a cat!"], 25)]


# -- the configuration ---------------------------------------------------------------------------


def test_parameters_are_what_another_pipeline_is_built_with(ours: Pipes, theirs: Pipes) -> None:
    for face, name in (("StableDiffusionPipeline", "sd"), ("StableDiffusionXLImg2ImgPipeline", "refiner")):
        mine, peer = ours(face, name), theirs(face, name)
        found = {k: v for k, v in mine.parameters.items() if v is not None}
        assert {k: found[k] for k in peer.parameters} == peer.parameters
        to = getattr(effusion, face.replace("Img2Img", "").replace("Pipeline", "InpaintPipeline"))
        made = to(**mine.components, **mine.parameters)
        assert made.unet is mine.unet
        assert all(made.config[k] == v for k, v in mine.parameters.items())


@pytest.mark.parametrize("library", [diffusers, effusion], ids=lambda m: m.__name__)
def test_entries_of_the_configuration_can_be_read_from_the_object(library: Any, ours: Pipes, theirs: Pipes) -> None:
    scheduler = library.DDIMScheduler(num_train_timesteps=7)
    with pytest.warns(FutureWarning, match=r"num_train_timesteps.*config"):
        assert scheduler.num_train_timesteps == 7
    pipe = (ours if library is effusion else theirs)("StableDiffusionPipeline", "sd")
    with pytest.warns(FutureWarning, match="requires_safety_checker"):
        assert pipe.requires_safety_checker is True
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert scheduler.config.num_train_timesteps == 7
        assert not hasattr(scheduler, "no_such_entry")
        assert not hasattr(pipe, "no_such_entry")
        with pytest.raises(AttributeError, match="no_such_entry"):
            scheduler.no_such_entry  # noqa: B018


def test_objects_with_a_configuration_are_copied_and_pickled(ours: Pipes) -> None:
    scheduler = effusion.EulerDiscreteScheduler(num_train_timesteps=7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for other in (copy.copy(scheduler), copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):
            assert other.config == scheduler.config
        assert not hasattr(effusion.DDIMScheduler.__new__(effusion.DDIMScheduler), "num_train_timesteps")
        pipe = ours("StableDiffusionPipeline", "sd")
        pipe.image_processor = effusion.VaeImageProcessor(vae_scale_factor=2)
        other = copy.deepcopy(pipe)
        assert other.config == pipe.config
        assert other.image_processor.config == pipe.image_processor.config


def test_a_deleted_component_is_gone(ours: Pipes) -> None:
    pipe = ours("StableDiffusionPipeline", "sd")
    del pipe.unet
    assert pipe.components["unet"] is None
    with pytest.raises(AttributeError, match="unet"):
        pipe.unet  # noqa: B018


def test_an_entry_that_is_no_component_may_be_assigned(ours: Pipes) -> None:
    pipe = ours("StableDiffusionPipeline", "sd")
    pipe.requires_safety_checker = False
    pipe.requires_safety_checker = True
    assert pipe.config.requires_safety_checker is True


# -- the run -------------------------------------------------------------------------------------

RUNS: list[tuple[str, str, dict[str, Any]]] = [
    ("StableDiffusionPipeline", "sd", {"guidance_rescale": 0.2, "cross_attention_kwargs": {}}),
    ("StableDiffusionXLPipeline", "xl", {"denoising_end": 0.8}),
    ("StableDiffusionXLImg2ImgPipeline", "refiner", {"image": picture(), "denoising_start": 0.2}),
    ("FluxPipeline", "flux", {"height": 32, "width": 32, "max_sequence_length": 16, "joint_attention_kwargs": {}}),
    ("StableDiffusion3Pipeline", "sd3", {"height": 32, "width": 32, "skip_guidance_layers": [0]}),
    (
        "QwenImagePipeline", "qwen",
        {"height": 32, "width": 32, "prompt": None, "prompt_embeds": tensor(1, 7, 16), "attention_kwargs": {}},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("face", "name", "inputs"), RUNS, ids=[r[0] for r in RUNS])
def test_the_run_is_told_as_by_the_peer(
    face: str, name: str, inputs: dict[str, Any], ours: Pipes, theirs: Pipes
) -> None:
    names = [n for n, v in vars(getattr(diffusers, face)).items() if isinstance(v, property)]
    names = [n for n in names if n != "skip_guidance_layers"]  # the peer forgets to set it
    told: list[list[Any]] = []
    for pipes in (ours, theirs):
        seen: list[Any] = []

        def note(pipe: Any, index: int, timestep: Any, tensors: Any, seen: list[Any] = seen) -> dict[str, Any]:
            seen.append({n: getattr(pipe, n) for n in names})
            return {}

        pipe = pipes(face, name)
        call(pipe, callback_on_step_end=note, **inputs)
        seen.append({n: getattr(pipe, n) for n in names})
        told.append(seen)
    for mine, theirs_ in zip(*told, strict=True):
        assert mine == theirs_


def test_the_current_timestep_is_known_while_the_network_runs(ours: Pipes) -> None:
    pipe, seen = ours("FluxPipeline", "flux"), []
    assert pipe.current_timestep is None
    hook = pipe.transformer.register_forward_pre_hook(lambda *_: seen.append(pipe.current_timestep))
    call(pipe, height=32, width=32, max_sequence_length=16)
    hook.remove()
    assert seen == list(pipe.scheduler.timesteps)
    assert pipe.current_timestep is None


# -- a mark in the pictures ----------------------------------------------------------------------


class Encoder:
    """In place of the package's: adds the bits to the first pixels of the blue channel."""

    def set_watermark(self, kind: str, content: list[int]) -> None:
        assert kind == "bits"
        self.content = content

    def encode(self, picture: Any, method: str) -> Any:
        assert method == "dwtDct"
        marked = picture.copy()
        marked[0, : len(self.content), 0] += self.content
        return marked


def test_watermarks_equal_the_peers(monkeypatch: pytest.MonkeyPatch, ours: Pipes) -> None:
    package = types.ModuleType("imwatermark")
    package.WatermarkEncoder = Encoder  # type: ignore[attr-defined]
    package.__spec__ = ModuleSpec("imwatermark", None)
    monkeypatch.setitem(sys.modules, "imwatermark", package)
    from diffusers.pipelines.stable_diffusion_xl import watermark as theirs

    from effusion.pipelines.stable_diffusion_xl import watermarker

    monkeypatch.setattr(theirs, "WatermarkEncoder", Encoder, raising=False)
    watermarker.cache_clear()
    pixels = tensor(2, 3, 256, 256).clamp(-1, 1)
    mine, peer = watermarker(), theirs.StableDiffusionXLWatermarker()
    assert torch.equal(mine.apply_watermark(pixels), peer.apply_watermark(pixels))
    assert not torch.equal(mine.apply_watermark(pixels), pixels)
    assert mine.apply_watermark(pixels[..., :128]).shape[-1] == 128
    pipe = ours("StableDiffusionXLPipeline", "xl")
    assert pipe.watermark is mine, "the package is there, so pictures are marked"
    inputs = {"output_type": "pt", "num_inference_steps": 1, "height": 256, "width": 256}
    marked = call(pipe, **inputs)
    pipe.watermark = None
    plain = call(pipe, **inputs)
    assert not torch.equal(marked, plain)
    assert torch.allclose(marked[:, :2], plain[:, :2], atol=1e-6)
    without = effusion.StableDiffusionXLPipeline(**pipe.components, add_watermarker=False)
    assert without.watermark is None
    watermarker.cache_clear()


def test_a_watermark_without_the_package_is_refused(ours: Pipes) -> None:
    if effusion.utils.is_invisible_watermark_available():
        pytest.skip("the package is there")
    pipe = ours("StableDiffusionXLPipeline", "xl")
    assert pipe.watermark is None
    asked = effusion.StableDiffusionXLPipeline(**pipe.components, add_watermarker=True)
    with pytest.raises(ImportError, match=r"effusion\[watermark\]"):
        asked("a cat", num_inference_steps=1)


# -- switches ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("face", "name"), [("StableDiffusionPipeline", "sd"), ("StableDiffusionXLPipeline", "xl")])
def test_freeu_and_fused_projections_equal_the_peers(face: str, name: str, ours: Pipes, theirs: Pipes) -> None:
    mine, peer = ours(face, name), theirs(face, name)
    plain = call(mine)
    for pipe in (mine, peer):
        pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    free = call(mine)
    assert relative(free, call(peer)) <= RELATIVE
    assert not torch.equal(free, plain)
    for pipe in (mine, peer):
        pipe.disable_freeu()
        pipe.fuse_qkv_projections()
        assert (pipe.fusing_unet, pipe.fusing_vae) == (True, True)
    assert relative(call(mine), call(peer)) <= RELATIVE
    assert any("Fused" in type(p).__name__ for p in mine.unet.attn_processors.values()) or mine.fusing_unet
    for pipe in (mine, peer):
        pipe.unfuse_qkv_projections(vae=False)
        assert (pipe.fusing_unet, pipe.fusing_vae) == (False, True)
        pipe.unfuse_qkv_projections(unet=False)
        assert (pipe.fusing_unet, pipe.fusing_vae) == (False, False)
    assert torch.equal(call(mine), plain)


def test_switches_that_a_network_lacks_are_explained(ours: Pipes, caplog: pytest.LogCaptureFixture) -> None:
    pipe = ours("StableDiffusionPipeline", "sd-taesd")
    with pytest.raises(ValueError, match=r"`vae` that has it.*AutoencoderTiny"):
        pipe.fuse_qkv_projections()
    assert not pipe.fusing_unet, "half of it was done"
    pipe.unfuse_qkv_projections()
    assert "not fused" in caplog.text

    class Community(effusion.DiffusionPipeline, effusion.StableDiffusionMixin):
        pass

    with pytest.raises(ValueError, match="no such component"):
        Community().enable_freeu(1, 1, 1, 1)


# -- a pipeline without its VAE ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("face", "name", "inputs"),
    [
        ("StableDiffusionPipeline", "sd", {}),
        ("StableDiffusionXLPipeline", "xl", {}),
        ("StableDiffusion3Pipeline", "sd3", {}),
        ("FluxPipeline", "flux", {"max_sequence_length": 16}),
        ("QwenImagePipeline", "qwen", {"prompt": None, "prompt_embeds": tensor(1, 7, 16)}),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_latents_without_a_vae_equal_the_peers(
    face: str, name: str, inputs: dict[str, Any], ours: Pipes, theirs: Pipes
) -> None:
    """Denoising on one machine, decoding on another."""
    got = []
    for library, pipes in ((effusion, ours), (diffusers, theirs)):
        pipe = getattr(library, face)(**{**pipes(face, name).components, "vae": None})
        pipe.set_progress_bar_config(disable=True)
        got.append(call(pipe, height=64, width=48, **inputs))
        assert pipe.vae_scale_factor == 8
    assert relative(*got) <= RELATIVE


def test_pictures_without_a_vae_are_refused_before_any_step(ours: Pipes) -> None:
    pipe = effusion.StableDiffusionPipeline(**{**ours("StableDiffusionPipeline", "sd").components, "vae": None})
    with pytest.raises(ValueError, match=r"no `vae`.*output_type='latent'"):
        call(pipe, output_type="pil")
