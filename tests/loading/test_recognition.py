"""What a file is, where it is easily taken for something else; and networks whose only layout is ours."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import safetensors.torch
import torch
from tests.pipelines import tiny

import effusion
from effusion.core.errors import CheckpointError
from effusion.weights import recognise, single_file
from effusion.weights.checkpoint import from_dict, open_file
from effusion.weights.skeleton import Skeleton

State = dict[str, torch.Tensor]
U, V = "model.diffusion_model.", "first_stage_model."


def conv(theirs: Any) -> Any:
    ours = getattr(effusion, type(theirs).__name__).from_config(dict(theirs.config))
    ours.load_state_dict(theirs.state_dict())
    return ours.eval()


def unet(in_channels: int = 4, **config: Any) -> State:
    return single_file.original_state(conv(tiny.unet(in_channels, **config)), U)


def xl(in_channels: int = 4, **config: Any) -> State:
    """With the width of cross attention that tells the base from the refiner."""
    return single_file.original_state(conv(tiny.unet(
        in_channels, 64, addition_embed_type="text_time", addition_time_embed_dim=8, use_linear_projection=True,
        projection_class_embeddings_input_dim=80, transformer_layers_per_block=(1, 2), **config,
    )), U)  # fmt: skip


def same(x: State, y: State) -> bool:
    return x.keys() == y.keys() and all(torch.equal(x[n], y[n]) for n in x)


# -- a VAE alone -----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["original", "ours"])
@pytest.mark.parametrize("prefix", ["", V, "vae."])
def test_a_vae_under_a_prefix(prefix: str, layout: str, tmp_path: Path) -> None:
    ours = conv(tiny.vae())
    state = single_file.original_state(ours, "") if layout == "original" else ours.state_dict()
    safetensors.torch.save_file({prefix + n: t for n, t in state.items()}, tmp_path / "vae.safetensors")
    for load in (effusion.AutoencoderKL.from_single_file, effusion.load):
        assert same(load(tmp_path / "vae.safetensors", norm_num_groups=4).state_dict(), ours.state_dict())
    if layout == "original":
        ours.save_config(tmp_path)
        read = diffusers.AutoencoderKL.from_single_file(str(tmp_path / "vae.safetensors"), config=str(tmp_path))
        assert same(read.state_dict(), ours.state_dict())


def small_vae(channels: int) -> State:
    vae = effusion.AutoencoderKL(
        block_out_channels=(8, 16), norm_num_groups=4, latent_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    return dict(vae.state_dict())


@pytest.mark.parametrize(
    ("channels", "scale", "shift", "family"), [(4, 0.18215, None, "1.x"), (16, 0.3611, 0.1159, "FLUX")]
)
def test_what_a_vae_alone_is_scaled_by_is_assumed_and_said(
    channels: int, scale: float, shift: float | None, family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "vae.safetensors"
    safetensors.torch.save_file(small_vae(channels), path)
    ours = effusion.AutoencoderKL.from_single_file(path, norm_num_groups=4)
    assert (ours.config.scaling_factor, ours.config.shift_factor) == (scale, shift)
    (said,) = [r.getMessage() for r in caplog.records if "is assumed" in r.getMessage()]
    assert f"scaling_factor={scale}" in said
    assert family in said
    caplog.clear()
    told = effusion.AutoencoderKL.from_single_file(path, norm_num_groups=4, scaling_factor=0.5)
    assert told.config.scaling_factor == 0.5
    config = {**dict(ours.config), "scaling_factor": 1.5305, "shift_factor": 0.0609}
    assert effusion.AutoencoderKL.from_single_file(path, config=config).config.scaling_factor == 1.5305
    assert "is assumed" not in caplog.text


def test_metadata_tell_what_a_vae_is_scaled_by(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, channels, scale in (
        ("stable-diffusion-xl-v1-base/vae", 4, 0.13025),
        ("stable-diffusion-v3-medium", 16, 1.5305),
    ):
        path = tmp_path / "vae.safetensors"
        safetensors.torch.save_file(small_vae(channels), path, {"modelspec.architecture": name})
        assert effusion.AutoencoderKL.from_single_file(path, norm_num_groups=4).config.scaling_factor == scale
    assert "is assumed" not in caplog.text


# -- UNets for other tasks ---------------------------------------------------------------------------


CROSS = {"only_cross_attention": (False, False), "num_class_embeds": 10, "use_linear_projection": True}
# kind -> (tensors, what the verdict says, its pipeline, its scheduler)
UNETS: dict[str, tuple[Callable[[], State], str, str | None, str]] = {
    "1.x": (unet, "Stable Diffusion 1.x", "StableDiffusionPipeline", "PNDM"),
    "instruct-pix2pix": (lambda: unet(8), "1.x for editing by instruction.*no pipeline here", None, "PNDM"),
    "depth": (
        lambda: unet(5, use_linear_projection=True), "2.x for depth to image.*no pipeline here", None, "DDIM",
    ),
    "upscaler": (lambda: unet(7, **CROSS), "2.x for upscaling by four.*no pipeline here", None, "DDIM"),
    "odd": (lambda: unet(6), "with 6 input channels", None, "PNDM"),
    "xl": (xl, "Stable Diffusion XL", "StableDiffusionXLPipeline", "Euler"),
    "xl instruct-pix2pix": (lambda: xl(8), "XL for editing by instruction", None, "Euler"),
    "xl inpainting": (lambda: xl(9), "Stable Diffusion XL", "StableDiffusionXLInpaintPipeline", "Euler"),
    "xl lcm": (lambda: xl(time_cond_proj_dim=6), "Stable Diffusion XL, LCM", "StableDiffusionXLPipeline", "LCM"),
    "lcm": (lambda: unet(time_cond_proj_dim=6), "LCM", "LatentConsistencyModelPipeline", "LCM"),
    "lcm inpainting": (lambda: unet(9, time_cond_proj_dim=6), "LCM for inpainting.*no pipeline here", None, "LCM"),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNETS)
def test_unets_of_every_task(kind: str, tmp_path: Path) -> None:
    make, says, pipeline, scheduler = UNETS[kind]
    state = make()
    vae = single_file.original_state(conv(tiny.vae()), V)
    verdict = recognise.recognise(from_dict({**state, **vae}))
    assert verdict.pipeline == pipeline
    assert verdict.settings["scheduler"]["_class_name"].startswith(scheduler)
    assert verdict.parts["vae"].config["scaling_factor"] == (
        0.13025 if "xl" in kind else 0.08333 if kind == "upscaler" else 0.18215
    )
    network = effusion.UNet2DConditionModel.from_single_file(
        {**state, **vae}, norm_num_groups=4, **({"addition_time_embed_dim": 8} if "xl" in kind else {})
    )
    assert same(single_file.original_state(network, U), state)
    assert re.search(says, verdict.describe())
    if pipeline is None:
        with pytest.raises(CheckpointError, match=says):
            effusion.load({**state, **vae})
        for cls in (effusion.StableDiffusionPipeline, effusion.DiffusionPipeline):
            with pytest.raises(CheckpointError, match=f"is no pipeline; it is .*{says}"):
                cls.from_single_file({**state, **vae})
        assert type(effusion.load(state, norm_num_groups=4)) is effusion.UNet2DConditionModel


def test_the_upscalers_network_at_its_published_size() -> None:
    """Class embeddings for the level of noise, and self-attention to the text in all but the last level."""
    config = {
        "in_channels": 7, "block_out_channels": [256, 512, 512, 1024], "cross_attention_dim": 1024,
        "attention_head_dim": 8, "num_class_embeds": 1000, "use_linear_projection": True, "sample_size": 128,
        "only_cross_attention": [True, True, True, False],
        "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 3],
        "up_block_types": [*["CrossAttnUpBlock2D"] * 3, "UpBlock2D"],
    }  # fmt: skip
    with Skeleton():
        model = effusion.UNet2DConditionModel(**config)
    part = recognise.recognise(from_dict(single_file.original_state(model, U))).parts["unet"]
    assert {n: part.config[n] for n in config if n != "only_cross_attention"} == {
        n: v for n, v in config.items() if n != "only_cross_attention"
    }
    assert list(part.config["only_cross_attention"])[1:] == [True, True, False]  # the first level has no attention
    with Skeleton():
        again = effusion.UNet2DConditionModel.from_config(dict(part.config))
    assert {n: t.shape for n, t in again.state_dict().items()} == {n: t.shape for n, t in model.state_dict().items()}


def test_playground(tmp_path: Path) -> None:
    """Its own scheduler, and latents normalised by numbers that are in the file, as the peer has it."""
    parts = tiny.stable_diffusion_xl(tmp_path / "t")
    wider = {"text_encoder_2": tiny.text_encoder(projection=True, hidden=64, seed=5), "unet": tiny.xl_unet(cross=96)}
    theirs = diffusers.StableDiffusionXLPipeline(**parts | wider)
    theirs.save_pretrained(tmp_path / "saved")
    ours = effusion.DiffusionPipeline.from_pretrained(tmp_path / "saved")
    ours.save_single_file(tmp_path / "xl.safetensors")
    state = safetensors.torch.load_file(tmp_path / "xl.safetensors")
    mean, std = torch.tensor([-1.5, 2.0, -1.25, 2.5]), torch.tensor([8.5, 6.0, 6.5, 5.25])
    state |= {"edm_mean": mean.view(1, 4, 1, 1), "edm_std": std.view(1, 4, 1, 1)}
    safetensors.torch.save_file(state, tmp_path / "playground.safetensors")
    verdict = recognise.recognise(open_file(tmp_path / "playground.safetensors"))
    assert verdict.name == "Playground 2.5"
    vae = effusion.AutoencoderKL.from_single_file(tmp_path / "playground.safetensors", norm_num_groups=4)
    assert vae.config.scaling_factor == 0.5
    assert vae.config.latents_mean == mean.tolist()
    assert vae.config.latents_std == std.tolist()
    scheduler = effusion.EDMDPMSolverMultistepScheduler.from_config(verdict.settings["scheduler"])
    published = diffusers.EDMDPMSolverMultistepScheduler()
    assert {k: v for k, v in scheduler.config.items() if k[0] != "_"} == {
        k: v for k, v in published.config.items() if k[0] != "_"
    }
    del state["edm_std"]
    assert recognise.recognise(from_dict(state)).name == "Stable Diffusion XL"
    state |= {"edm_std": torch.ones(3)}
    with pytest.raises(CheckpointError, match="one number for each channel"):
        recognise.recognise(from_dict(state))


def test_playground_paints_as_the_peer_does(tmp_path: Path) -> None:
    parts = tiny.stable_diffusion_xl(tmp_path / "t")
    vae = parts["vae"]
    vae.register_to_config(latents_mean=[-1.5, 2.0, -1.25, 2.5], latents_std=[8.5, 6.0, 6.5, 5.25], scaling_factor=0.5)
    parts["scheduler"] = diffusers.EDMDPMSolverMultistepScheduler()
    theirs = diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False)
    theirs.save_pretrained(tmp_path / "saved")
    ours = effusion.DiffusionPipeline.from_pretrained(tmp_path / "saved")
    images = []
    for pipe in (theirs, ours):
        pipe.set_progress_bar_config(disable=True)
        call = {"prompt": "a cat", "num_inference_steps": 3, "height": 32, "width": 32, "guidance_scale": 3.0}
        images.append(pipe(**call, generator=torch.Generator().manual_seed(0), output_type="pt").images)
    assert (images[0] - images[1]).abs().max() < 1e-4


# -- PixArt ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "sizes", "pipeline", "scale"),
    [
        (120, False, "Alpha", 0.18215),
        (120, True, "Alpha", 0.18215),
        (300, False, "Sigma", 0.13025),
        (0, True, "Alpha", 0.18215),
    ],
)
def test_pixart_alpha_and_sigma_are_told_by_the_length_of_text(
    rows: int, sizes: bool, pipeline: str, scale: float
) -> None:
    with Skeleton():
        model = effusion.PixArtTransformer2DModel(caption_channels=4096, use_additional_conditions=sizes, num_layers=1)
    state = single_file.original_state(model, U) | single_file.original_state(conv(tiny.vae()), V)
    if rows:
        state[f"{U}y_embedder.y_embedding"] = torch.empty(rows, 4096, device="meta")
    verdict = recognise.recognise(from_dict(state))
    assert verdict.pipeline == f"PixArt{pipeline}Pipeline"
    assert verdict.parts["vae"].config["scaling_factor"] == scale


# -- text encoders -------------------------------------------------------------------------------------


def test_a_merge_with_the_projection_of_clip_l(tmp_path: Path) -> None:
    theirs = diffusers.StableDiffusionPipeline(**tiny.stable_diffusion(tmp_path / "t"), requires_safety_checker=False)
    theirs.save_pretrained(tmp_path / "saved")
    ours = effusion.DiffusionPipeline.from_pretrained(tmp_path / "saved")
    ours.save_single_file(tmp_path / "f.safetensors")
    state = safetensors.torch.load_file(tmp_path / "f.safetensors")
    state["cond_stage_model.transformer.text_projection.weight"] = torch.zeros(32, 32)
    again = effusion.StableDiffusionPipeline.from_single_file(state, config=tmp_path / "saved")
    assert same(again.text_encoder.state_dict(), ours.text_encoder.state_dict())


@pytest.mark.parametrize(("width", "supplied"), [(768, True), (1280, False)])
def test_only_the_smaller_encoder_does_without_its_projection(width: int, supplied: bool) -> None:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        hidden_size=width, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, projection_dim=width
    )
    with torch.device("meta"):
        encoder = CLIPTextModelWithProjection(config).state_dict()
    with Skeleton():
        sd3 = effusion.SD3Transformer2DModel(num_layers=1)
    place = f"text_encoders.{'clip_l' if width == 768 else 'clip_g'}.transformer."
    named = {("" if n.startswith("text_") else "text_model.") + n: t for n, t in encoder.items()}
    named.pop("text_projection.weight")
    checkpoint = from_dict({**single_file.original_state(sd3, U), **{place + n: t for n, t in named.items()}})
    (part,) = [p for p in recognise.recognise(checkpoint).parts.values() if p.library == "transformers"]
    assert ("text_projection.weight" in part.read(checkpoint)) == supplied


# -- networks whose only layout is ours ------------------------------------------------------------------


def published_flux_controlnet() -> Any:
    return effusion.FluxControlNetModel(
        num_layers=2, num_single_layers=1, attention_head_dim=32, num_attention_heads=2, joint_attention_dim=12,
        pooled_projection_dim=10, guidance_embeds=True, axes_dims_rope=[4, 14, 14], in_channels=8, num_mode=3,
    )  # fmt: skip


def sd3_controlnet(**config: Any) -> Any:
    base = {
        "num_layers": 2, "attention_head_dim": 64, "num_attention_heads": 1, "joint_attention_dim": 12,
        "caption_projection_dim": 64, "pooled_projection_dim": 10, "pos_embed_max_size": 8, "sample_size": 16,
    }  # fmt: skip
    return effusion.SD3ControlNetModel(**{**base, **config})


OURS: dict[str, Callable[[], Any]] = {
    "tiny vae": lambda: effusion.AutoencoderTiny(latent_channels=16),
    "small tiny vae": lambda: conv(tiny.tiny_vae()),
    "asymmetric vae": lambda: effusion.AsymmetricAutoencoderKL(
        down_block_out_channels=(32, 64), up_block_out_channels=(64, 96), layers_per_up_block=2,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ),
    "flux controlnet": published_flux_controlnet,
    "sd3 controlnet": lambda: sd3_controlnet(extra_conditioning_channels=1, qk_norm="rms_norm"),
    "sd3.5 controlnet": lambda: sd3_controlnet(
        joint_attention_dim=None, use_pos_embed=False, pos_embed_type=None, pos_embed_max_size=None,
        force_zeros_for_pooled_projection=False,
    ),
    "redux": lambda: effusion.ReduxImageEncoder(redux_dim=6, txt_in_features=8),
    "qwen vae": lambda: effusion.AutoencoderKLQwenImage(base_dim=8),
    "pixart": lambda: effusion.PixArtTransformer2DModel(
        num_layers=1, caption_channels=8, num_attention_heads=16, attention_head_dim=8, cross_attention_dim=128,
        use_additional_conditions=True,
    ),
}  # fmt: skip
# what no shape tells, and is a fact for others only
UNTOLD = {"norm_num_groups", "sample_size", "scaling_factor", "block_out_channels", "dropout", "attn_scales"}


def plain(config: Any) -> dict[str, Any]:
    return {
        k: list(v) if isinstance(v, (list, tuple)) else v
        for k, v in config.items()
        if not k.startswith("_") and k not in UNTOLD
    }


@pytest.mark.parametrize("kind", OURS)
def test_networks_under_our_names(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    ours = OURS[kind]()
    cls, path = type(ours), tmp_path / "f.safetensors"
    safetensors.torch.save_file(ours.state_dict(), path)
    ours.save_config(tmp_path)
    for again in (cls.from_single_file(path), cls.from_single_file(path, config=tmp_path), effusion.load(path)):
        assert type(again) is cls
        assert same(again.state_dict(), ours.state_dict())
        assert plain(again.config) == plain(ours.config)


WITH_CONFIG: dict[str, Callable[[], Any]] = {
    "dit": lambda: effusion.DiTTransformer2DModel(num_layers=1, num_attention_heads=2, attention_head_dim=8),
    "transformer": lambda: effusion.Transformer2DModel(num_attention_heads=2, attention_head_dim=16, in_channels=32),
    "unet2d": lambda: conv(tiny.unconditional_unet()),
    "asymmetric vae": lambda: conv(tiny.asymmetric_vae()),
}


@pytest.mark.parametrize("kind", WITH_CONFIG)
def test_with_a_configuration_every_network_is_found(kind: str, tmp_path: Path) -> None:
    ours = WITH_CONFIG[kind]()
    cls, path = type(ours), tmp_path / "f.safetensors"
    safetensors.torch.save_file(ours.state_dict(), path)
    assert same(cls.from_single_file(path, config=dict(ours.config)).state_dict(), ours.state_dict())
    with pytest.raises(CheckpointError, match="it is a LoRA"):
        cls.from_single_file({"a.lora_A.weight": torch.ones(2, 2)}, config=dict(ours.config))
    with pytest.raises(CheckpointError, match="does not fit"):
        cls.from_single_file({"foo": torch.ones(2, 2)}, config=dict(ours.config))


def test_a_control_network_of_another_layout_is_said() -> None:
    state = {"controlnet_blocks.0.weight": torch.ones(2, 2), "double_blocks.0.img_attn.qkv.weight": torch.ones(6, 2)}
    with pytest.raises(CheckpointError, match="is a ControlNet for a transformer"):
        effusion.load(state)
