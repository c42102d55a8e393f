"""Every original layout both ways, bit for bit, with the peer as reader; every kind of file told by its header."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import safetensors.torch
import torch
from diffusers.loaders import single_file_utils as peer
from tests.pipelines import tiny, tiny_transformers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

import effusion
from effusion.core.errors import CheckpointError
from effusion.weights import single_file
from effusion.weights.checkpoint import from_dict, open_file
from effusion.weights.layouts import stable_diffusion, text
from effusion.weights.layouts.table import to_theirs
from effusion.weights.recognise import recognise
from effusion.weights.skeleton import Skeleton

State = dict[str, torch.Tensor]


def states(pipe: Any) -> State:
    networks = {n: c for n, c in pipe.components.items() if isinstance(c, torch.nn.Module)}
    return {f"{n}.{k.removeprefix('text_model.')}": v for n, c in networks.items() for k, v in c.state_dict().items()}


def assert_same(x: State, y: State) -> None:
    assert x.keys() == y.keys()
    for name in x:
        assert x[name].dtype == y[name].dtype, name
        assert torch.equal(x[name], y[name]), name


# -- whole pipelines: original -> ours -> original ------------------------------------------------


def lcm(folder: Path) -> Any:
    parts = tiny.stable_diffusion(folder, time_cond_proj_dim=6)
    parts["scheduler"] = diffusers.LCMScheduler.from_config(parts["scheduler"].config)
    return diffusers.LatentConsistencyModelPipeline(**parts, requires_safety_checker=False)


def refiner(folder: Path) -> Any:
    parts = tiny.stable_diffusion_xl(folder, refiner=True) | {"unet": tiny.xl_unet(cross=32, ids=5)}
    return diffusers.StableDiffusionXLImg2ImgPipeline(**parts, requires_aesthetics_score=True)


WHOLE: dict[str, Callable[[Path], Any]] = {
    "lcm": lcm,
    "refiner": refiner,
    "flux": tiny_transformers.MAKERS["flux-dev"],
    "flux fill": tiny_transformers.MAKERS["flux-fill"],
    "sd3": tiny_transformers.MAKERS["sd3"],
    "pixart": tiny_transformers.MAKERS["pixart-sigma"],
}


@pytest.mark.parametrize("kind", WHOLE)
def test_whole_files_both_ways(kind: str, tmp_path: Path) -> None:
    theirs = WHOLE[kind](tmp_path / "t")
    theirs.save_pretrained(tmp_path / "saved")
    ours = effusion.DiffusionPipeline.from_pretrained(tmp_path / "saved")
    ours.save_single_file(tmp_path / "a.safetensors")
    again = type(ours).from_single_file(tmp_path / "a.safetensors", config=tmp_path / "saved")
    assert_same(states(again), states(ours))
    again.save_single_file(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    if kind == "sd3":  # of the others, the peer reads published widths only, or nothing at all
        place, home = str(tmp_path / "a.safetensors"), str(tmp_path / "saved")
        for name in ("transformer", "vae"):
            cls = type(getattr(theirs, name))
            read = cls.from_single_file(place, config=home, subfolder=name)
            assert_same(read.state_dict(), getattr(theirs, name).state_dict())


def test_the_peers_names_of_text_encoders_in_a_file(tmp_path: Path) -> None:
    theirs = WHOLE["sd3"](tmp_path / "t")
    theirs.save_pretrained(tmp_path / "saved")
    effusion.DiffusionPipeline.from_pretrained(tmp_path / "saved").save_single_file(tmp_path / "a.safetensors")
    state = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert peer.is_clip_sd3_model(state)
    assert peer.is_open_clip_sd3_model(state)
    assert peer.is_t5_in_single_file(state)
    t5 = peer.convert_sd3_t5_checkpoint_to_diffusers(dict(state))
    expected = {n: t for n, t in theirs.text_encoder_3.state_dict().items() if n != "encoder.embed_tokens.weight"}
    assert_same(t5, expected)


def test_a_file_of_another_family_is_not_squeezed_into_a_class(tmp_path: Path) -> None:
    WHOLE["sd3"](tmp_path / "t").save_pretrained(tmp_path / "saved")
    effusion.DiffusionPipeline.from_pretrained(tmp_path / "saved").save_single_file(tmp_path / "a.safetensors")
    for cls in (effusion.StableDiffusionPipeline, effusion.FluxPipeline):
        with pytest.raises(CheckpointError, match="use StableDiffusion3Pipeline"):
            cls.from_single_file(tmp_path / "a.safetensors", config=tmp_path / "saved")


# -- lone networks --------------------------------------------------------------------------------


def random_state(shapes: dict[str, tuple[int, ...]]) -> State:
    torch.manual_seed(0)
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def pixart_shapes(width: int = 48, blocks: int = 2, alpha: bool = True) -> dict[str, tuple[int, ...]]:
    """Names and shapes as in the published PixArt-XL-2-1024-MS.pth."""
    found: dict[str, tuple[int, ...]] = {}

    def linear(name: str, out: int, into: int) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = (out, into), (out,)

    found |= {"x_embedder.proj.weight": (width, 4, 2, 2), "x_embedder.proj.bias": (width,)}
    for name in ("t_embedder", *(("csize_embedder", "ar_embedder") if alpha else ())):
        side = width // 3 if name != "t_embedder" else width
        linear(f"{name}.mlp.0", side, 256)
        linear(f"{name}.mlp.2", side, side)
    linear("t_block.1", 6 * width, width)
    linear("y_embedder.y_proj.fc1", width, 32)
    linear("y_embedder.y_proj.fc2", width, width)
    for i in range(blocks):
        found[f"blocks.{i}.scale_shift_table"] = (6, width)
        for name, out, into in (
            ("attn.qkv", 3 * width, width), ("attn.proj", width, width), ("cross_attn.q_linear", width, width),
            ("cross_attn.kv_linear", 2 * width, width), ("cross_attn.proj", width, width),
            ("mlp.fc1", 4 * width, width), ("mlp.fc2", width, 4 * width),
        ):  # fmt: skip
            linear(f"blocks.{i}.{name}", out, into)
    found["final_layer.scale_shift_table"] = (2, width)
    linear("final_layer.linear", 2 * 2 * 8, width)
    return found


@pytest.mark.parametrize("alpha", [True, False])
def test_pixart_from_its_original_file(alpha: bool, tmp_path: Path) -> None:
    state = random_state(pixart_shapes(alpha=alpha))
    left_out = random_state({"pos_embed": (1, 32 * 32, 48), "y_embedder.y_embedding": (120, 32)})
    torch.save({"state_dict": {**state, **left_out}}, tmp_path / "pixart.pth")
    ours = effusion.load(tmp_path / "pixart.pth")
    assert isinstance(ours, effusion.PixArtTransformer2DModel)
    assert ours.use_additional_conditions == alpha
    assert ours.config.sample_size == (128 if alpha else 64)
    assert_same(single_file.original_state(ours), state)
    q, k, v = (getattr(ours.transformer_blocks[1].attn1, f"to_{n}").weight for n in "qkv")
    assert torch.equal(torch.cat((q, k, v)), state["blocks.1.attn.qkv.weight"])
    assert torch.equal(ours.scale_shift_table, state["final_layer.scale_shift_table"])


def test_qwen_image_under_both_prefixes(tmp_path: Path) -> None:
    theirs = tiny_transformers.qwen_image()["transformer"]
    state = {**theirs.state_dict()}
    for prefix in ("", "model.diffusion_model."):
        safetensors.torch.save_file({prefix + n: t for n, t in state.items()}, tmp_path / "f.safetensors")
        ours = effusion.load(tmp_path / "f.safetensors", axes_dims_rope=[8, 4, 4])
        assert isinstance(ours, effusion.QwenImageTransformer2DModel)
        assert_same(single_file.original_state(ours), state)
    ours.save_single_file(tmp_path / "again.safetensors")
    read = diffusers.QwenImageTransformer2DModel.from_single_file
    theirs.save_config(tmp_path)
    assert_same(read(str(tmp_path / "again.safetensors"), config=str(tmp_path)).state_dict(), state)


def test_qwen_images_autoencoder_in_its_original_layout(tmp_path: Path) -> None:
    """At the published depth, because the peer's table (that of Wan) knows no other."""
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKLQwenImage(base_dim=8, z_dim=4, latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    ours = effusion.AutoencoderKLQwenImage.from_config(dict(theirs.config))
    ours.load_state_dict(theirs.state_dict())
    state = single_file.original_state(ours)
    assert_same(peer.convert_wan_vae_to_diffusers(dict(state)), theirs.state_dict())
    safetensors.torch.save_file(state, tmp_path / "vae.safetensors")
    again = effusion.load(tmp_path / "vae.safetensors", latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    assert isinstance(again, effusion.AutoencoderKLQwenImage)
    assert dict(again.config)["dim_mult"] == [1, 2, 4, 4]
    assert_same(single_file.original_state(again), state)


@pytest.mark.parametrize("name", ["UNet2DConditionModel", "ControlNetModel", "AutoencoderKL", "SD3Transformer2DModel",
                                  "FluxTransformer2DModel", "PixArtTransformer2DModel"])  # fmt: skip
def test_a_network_under_our_names_needs_no_configuration(name: str) -> None:
    """Published defaults, meta-size: the shapes tell the configuration."""
    with Skeleton():
        model = getattr(effusion, name)(**({"caption_channels": 4096} if name.startswith("PixArt") else {}))
    verdict = recognise(from_dict(dict(model.state_dict())))
    (part,) = verdict.parts.values()
    assert part.class_name == name
    with Skeleton():
        again = getattr(effusion, name).from_config(dict(part.config))
    assert {n: t.shape for n, t in again.state_dict().items()} == {n: t.shape for n, t in model.state_dict().items()}


def test_text_encoders_alone(tmp_path: Path) -> None:
    clip = tiny.text_encoder()
    named = {f"text_model.{n.removeprefix('text_model.')}": t for n, t in clip.state_dict().items()}
    safetensors.torch.save_file(named, tmp_path / "clip.safetensors")
    assert type(effusion.load(tmp_path / "clip.safetensors")).__name__ == "CLIPTextModel"
    config = T5Config(d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu")
    t5 = T5EncoderModel(config)
    state = {n: t for n, t in t5.state_dict().items() if n != "encoder.embed_tokens.weight"}
    llama = to_theirs(state, text.T5_LLAMA)
    assert {"enc.blk.1.ffn_down.weight", "token_embd.weight"} < set(llama)
    for names in (state, llama):
        safetensors.torch.save_file(names, tmp_path / "t5.safetensors")
        assert_same(effusion.load(tmp_path / "t5.safetensors").state_dict(), t5.state_dict())


# -- every kind, by its header --------------------------------------------------------------------


def meta(make: Callable[[], Any]) -> State:
    with torch.device("meta"):
        return dict(make().state_dict())


def clip(width: int, layers: int, projected: bool = False, prefix: str = "") -> State:
    config = CLIPTextConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=width // 64,
        projection_dim=width,
    )  # fmt: skip
    state = meta(lambda: (CLIPTextModelWithProjection if projected else CLIPTextModel)(config))
    return {prefix + ("" if n.startswith("text_") else "text_model.") + n: t for n, t in state.items()}


def open_clip(width: int, layers: int, prefix: str) -> State:
    return to_theirs(clip(width, layers, projected=True), stable_diffusion.OPEN_CLIP, prefix)


def t5xxl(prefix: str = "text_encoders.t5xxl.transformer.") -> State:
    config = T5Config(
        vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"
    )
    state = meta(lambda: T5EncoderModel(config))
    return {prefix + n: t for n, t in state.items() if n != "encoder.embed_tokens.weight"}


def network(class_name: str, prefix: str, **config: Any) -> State:
    with Skeleton():
        model = getattr(effusion, class_name)(**config)
    return {n: t.to("meta") for n, t in single_file.original_state(model, prefix).items()}


CLASSIC = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
TWO = {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True}
XL = {
    "sample_size": 128, "cross_attention_dim": 2048, "attention_head_dim": [5, 10, 20], "use_linear_projection": True,
    "block_out_channels": [320, 640, 1280], "transformer_layers_per_block": [1, 2, 10],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
REFINER = {
    **XL, "cross_attention_dim": 1280, "attention_head_dim": [6, 12, 24, 24], "transformer_layers_per_block": 4,
    "block_out_channels": [384, 768, 1536, 1536], "projection_class_embeddings_input_dim": 2560,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
}  # fmt: skip
U, V = "model.diffusion_model.", "first_stage_model."
BLOCKS = {
    "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}  # fmt: skip
SIXTEEN = {**BLOCKS, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}


def vae(prefix: str, **config: Any) -> State:
    return network("AutoencoderKL", prefix, **{**BLOCKS, **config})


def unet(**config: Any) -> State:
    return network("UNet2DConditionModel", U, **config)


def l_clip() -> State:
    return clip(768, 12, prefix="cond_stage_model.transformer.")


def flux(prefix: str = "", **config: Any) -> State:
    return network("FluxTransformer2DModel", prefix, **{"guidance_embeds": True, **config})


def three() -> State:
    place = "text_encoders.{}.transformer."
    return {**clip(768, 12, True, place.format("clip_l")), **clip(1280, 32, True, place.format("clip_g")), **t5xxl()}


SD3 = {"pos_embed_max_size": 192, "caption_projection_dim": 1536, "num_layers": 24, "num_attention_heads": 24}
LARGE = {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "qk_norm": "rms_norm"}
# kind of file -> (its tensors, what it is called, the class of its pipeline)
KINDS: dict[str, tuple[Callable[[], State], str, str | None]] = {
    "1.5": (lambda: unet(**CLASSIC) | vae(V) | l_clip(), "Stable Diffusion 1.x", "StableDiffusionPipeline"),
    "1.5 inpainting": (
        lambda: unet(**CLASSIC, in_channels=9) | vae(V) | l_clip(), "Stable Diffusion 1.x", "StableDiffusionInpaintPipeline",
    ),
    "lcm": (lambda: unet(**CLASSIC, time_cond_proj_dim=256) | vae(V) | l_clip(), "LCM", "LatentConsistencyModelPipeline"),
    "2.1": (
        lambda: unet(**TWO) | vae(V) | open_clip(1024, 24, "cond_stage_model.model."),
        "Stable Diffusion 2.x", "StableDiffusionPipeline",
    ),
    "2 inpainting": (
        lambda: unet(**TWO, in_channels=9) | vae(V) | open_clip(1024, 24, "cond_stage_model.model."),
        "Stable Diffusion 2.x", "StableDiffusionInpaintPipeline",
    ),
    "xl": (
        lambda: unet(**XL) | vae(V) | clip(768, 12, prefix="conditioner.embedders.0.transformer.")
        | open_clip(1280, 32, "conditioner.embedders.1.model."),
        "Stable Diffusion XL", "StableDiffusionXLPipeline",
    ),
    "refiner": (
        lambda: unet(**REFINER) | vae(V) | open_clip(1280, 32, "conditioner.embedders.0.model."),
        "Stable Diffusion XL refiner", "StableDiffusionXLImg2ImgPipeline",
    ),
    "controlnet": (lambda: network("ControlNetModel", "control_model.", cross_attention_dim=768), "ControlNet", None),
    "vae": (lambda: vae(""), "AutoencoderKL", None),
    "flux vae": (lambda: vae("", **SIXTEEN), "AutoencoderKL", None),
    "flux dev": (flux, "transformer of FLUX.1", "FluxPipeline"),
    "flux schnell": (lambda: flux(guidance_embeds=False), "transformer of FLUX.1", "FluxPipeline"),
    "flux fill": (lambda: flux(in_channels=384, out_channels=64), "transformer of FLUX.1", "FluxFillPipeline"),
    "flux depth": (lambda: flux(in_channels=128, out_channels=64), "transformer of FLUX.1", "FluxControlPipeline"),
    "flux comfy": (
        lambda: flux(U) | vae("vae.", **SIXTEEN) | clip(768, 12, prefix="text_encoders.clip_l.transformer.") | t5xxl(),
        "FLUX.1", "FluxPipeline",
    ),
    "sd3 medium": (
        lambda: network("SD3Transformer2DModel", U, **SD3) | vae(V, **SIXTEEN) | three(),
        "Stable Diffusion 3", "StableDiffusion3Pipeline",
    ),
    "sd3.5 large": (
        lambda: network("SD3Transformer2DModel", U, **SD3 | LARGE) | vae(V, **SIXTEEN),
        "Stable Diffusion 3", "StableDiffusion3Pipeline",
    ),
    "sd3.5 medium": (
        lambda: network("SD3Transformer2DModel", U, **SD3, qk_norm="rms_norm", dual_attention_layers=tuple(range(13))),
        "transformer of Stable Diffusion 3", "StableDiffusion3Pipeline",
    ),
    "pixart alpha": (
        lambda: network("PixArtTransformer2DModel", "", caption_channels=4096), "transformer of PixArt", "PixArtAlphaPipeline",
    ),
    "pixart sigma": (
        lambda: network("PixArtTransformer2DModel", "", caption_channels=4096, use_additional_conditions=False),
        "transformer of PixArt", "PixArtSigmaPipeline",
    ),
    "qwen-image": (
        lambda: network("QwenImageTransformer2DModel", U, num_layers=60), "transformer of Qwen-Image", "QwenImagePipeline",
    ),
    "qwen-image vae": (lambda: network("AutoencoderKLQwenImage", ""), "autoencoder of Qwen-Image", None),
    "t5": (lambda: t5xxl(""), "text encoder", None),
    "clip l": (lambda: clip(768, 12), "text encoder", None),
    "clip g": (lambda: clip(1280, 32, projected=True), "text encoder", None),
}  # fmt: skip


def write_sparse(path: Path, state: State) -> int:
    """A safetensors file with the header of ``state`` and a hole for the data; returns its length."""
    header, at = {}, 0
    for name, tensor in state.items():
        size = 2 * tensor.numel()
        header[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    return at


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_told_by_its_header(kind: str, tmp_path: Path) -> None:
    make, name, pipeline = KINDS[kind]
    state = make()
    write_sparse(tmp_path / "f.safetensors", state)
    checkpoint = open_file(tmp_path / "f.safetensors")
    verdict = recognise(checkpoint)
    assert name in verdict.name
    assert verdict.pipeline == pipeline
    assert verdict.kind == ("pipeline" if len(verdict.parts) > 1 else "model")
    taken = sum(len(part.read(checkpoint)) for part in verdict.parts.values())
    assert taken >= len([n for n in state if "position_ids" not in n]) - 20  # fused ones count several times
    for part in verdict.parts.values():
        if part.library == "diffusers":  # the configuration read off the shapes builds a network of these shapes
            with Skeleton():
                model = getattr(effusion, part.class_name).from_config(dict(part.config))
            found = {n: tuple(e.shape) for n, e in part.read(checkpoint).items()}
            assert found == {n: tuple(t.shape) for n, t in model.state_dict().items()}
    assert (tmp_path / "f.safetensors").stat().st_blocks * 512 < 8 << 20, "nothing but the header is on the disk"


def test_the_peer_names_flux_as_we_do() -> None:
    """At its published width, on ``meta``: the peer reads no other."""
    config = {"num_layers": 1, "num_single_layers": 1, "guidance_embeds": True}
    state = flux("", **config)
    with Skeleton():
        ours = effusion.FluxTransformer2DModel(**config)
    read = peer.convert_flux_transformer_checkpoint_to_diffusers(state)
    assert {n: t.shape for n, t in read.items()} == {n: t.shape for n, t in ours.state_dict().items()}
