"""Single files in their original layouts: round trips, the peer as reader, recognition at published sizes."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import diffusers
import pytest
import safetensors.torch
import torch
from tests.hub_server import HubServer
from tests.pipelines import tiny

import effusion
from effusion.cli import inspect
from effusion.core.errors import CheckpointError, MissingFile
from effusion.models import auto_model
from effusion.weights import single_file
from effusion.weights.checkpoint import from_dict, open_file
from effusion.weights.recognise import recognise
from effusion.weights.skeleton import Skeleton


def states(pipe: Any) -> dict[str, torch.Tensor]:
    """Weights by component; the prefix that versions of transformers put before names left out."""
    networks = {n: c for n, c in pipe.components.items() if isinstance(c, torch.nn.Module)}
    return {f"{n}.{k.removeprefix('text_model.')}": v for n, c in networks.items() for k, v in c.state_dict().items()}


def assert_same(x: dict[str, torch.Tensor], y: dict[str, torch.Tensor]) -> None:
    assert x.keys() == y.keys()
    for name in x:
        assert torch.equal(x[name], y[name]), name


def classic(kind: str, folder: Path, in_channels: int = 4, **unet: Any) -> Any:
    parts = tiny.stable_diffusion(folder, in_channels, **unet)
    return getattr(diffusers, f"StableDiffusion{kind}Pipeline")(**parts, requires_safety_checker=False)


def xl(folder: Path) -> Any:
    """The two text encoders have different widths: the peer tells them apart by that."""
    parts = tiny.stable_diffusion_xl(folder)
    wider = {"text_encoder_2": tiny.text_encoder(projection=True, hidden=64, seed=5), "unet": tiny.xl_unet(cross=96)}
    return diffusers.StableDiffusionXLPipeline(**parts | wider)


MAKERS: dict[str, tuple[Any, str]] = {
    "one": (lambda f: classic("", f), "Stable Diffusion 1.x"),
    "two": (lambda f: classic("", f, use_linear_projection=True), "Stable Diffusion 2.x"),
    "xl": (xl, "Stable Diffusion XL"),
    "inpaint": (lambda f: classic("Inpaint", f, 9), "Stable Diffusion 1.x"),
}


@pytest.fixture(scope="module", params=MAKERS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, str]:
    """(the peer's pipeline, the folder it is saved in, what we call its family)."""
    maker, family = MAKERS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    pipe = maker(folder / "t")
    pipe.save_pretrained(folder / "saved")
    return pipe, folder / "saved", family


def test_round_trip_and_the_peer_reads_it(pair: tuple[Any, Path, str], tmp_path: Path) -> None:
    theirs, folder, family = pair
    ours = effusion.DiffusionPipeline.from_pretrained(folder)
    ours.save_single_file(tmp_path / "all.safetensors")
    verdict = recognise(open_file(tmp_path / "all.safetensors"))
    assert (verdict.kind, verdict.name) == ("pipeline", family)
    whole, *parts = inspect.components(str(tmp_path / "all.safetensors"))
    assert family in whole.note
    assert {c.name: c.parameters for c in parts}["unet"] == sum(p.numel() for p in ours.unet.parameters())
    again = type(ours).from_single_file(tmp_path / "all.safetensors", config=folder)
    assert_same(states(again), states(ours))
    assert again.scheduler.config == ours.scheduler.config
    again.save_single_file(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "all.safetensors").read_bytes()
    read = type(theirs).from_single_file(str(tmp_path / "all.safetensors"), config=str(folder), local_files_only=True)
    assert_same(states(read), states(theirs))


def test_half_files_and_dtypes(pair: tuple[Any, Path, str], tmp_path: Path) -> None:
    _, folder, _ = pair
    ours = effusion.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float16)
    ours.save_single_file(tmp_path / "half.safetensors")
    full = type(ours).from_single_file(tmp_path / "half.safetensors", config=folder)
    assert full.unet.dtype == torch.float32
    assert torch.equal(full.unet.conv_in.weight, ours.unet.conv_in.weight.float())
    stored = type(ours).from_single_file(tmp_path / "half.safetensors", config=folder, torch_dtype="auto")
    assert_same(states(stored), states(ours))


def conv(theirs: Any) -> Any:
    ours = getattr(effusion, type(theirs).__name__).from_config(dict(theirs.config))
    ours.load_state_dict(theirs.state_dict())
    return ours.eval()


def controlnet() -> diffusers.ControlNetModel:
    torch.manual_seed(3)
    return diffusers.ControlNetModel(
        block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=32, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), conditioning_embedding_out_channels=(4, 8, 8, 8),
    )  # fmt: skip


def flux(**config: Any) -> diffusers.FluxTransformer2DModel:
    torch.manual_seed(4)
    base = {
        "in_channels": 8, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 32, "num_attention_heads": 2,
        "joint_attention_dim": 12, "pooled_projection_dim": 10, "axes_dims_rope": (4, 14, 14), "guidance_embeds": True,
    }  # fmt: skip
    return diffusers.FluxTransformer2DModel(**base | config)


def sd3(**config: Any) -> diffusers.SD3Transformer2DModel:
    torch.manual_seed(5)
    base = {
        "sample_size": 128, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 3,
        "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 12, "caption_projection_dim": 16,
        "pooled_projection_dim": 10, "pos_embed_max_size": 9,
    }  # fmt: skip
    return diffusers.SD3Transformer2DModel(**base | config)


NETWORKS: dict[str, Any] = {
    "vae": tiny.vae,
    "unet": tiny.unet,
    "unet9": lambda: tiny.unet(9),
    "xl": tiny.xl_unet,
    "controlnet": controlnet,
    "flux": flux,
    "flux schnell fill": lambda: flux(guidance_embeds=False, in_channels=24, out_channels=8),
    "sd3": lambda: sd3(attention_head_dim=64, num_attention_heads=1, caption_projection_dim=64),
    "sd3.5": lambda: sd3(qk_norm="rms_norm", dual_attention_layers=(0, 1)),
}


def as_lists(config: Any) -> dict[str, Any]:
    public = {k: v for k, v in config.items() if not k.startswith("_")}
    return {k: list(v) if isinstance(v, (list, tuple)) else v for k, v in public.items()}


@pytest.mark.parametrize("kind", NETWORKS)
def test_lone_networks(tmp_path: Path, kind: str) -> None:
    theirs = NETWORKS[kind]()
    ours = conv(theirs)
    ours.save_single_file(tmp_path / "f.safetensors")
    ours.save_config(tmp_path)
    cls = type(ours)
    for source in (tmp_path / "f.safetensors", safetensors.torch.load_file(tmp_path / "f.safetensors")):
        again = cls.from_single_file(source, config=tmp_path)
        assert_same(again.state_dict(), ours.state_dict())
    if kind.startswith("flux"):  # the peer reads the published width only
        state, block = open_file(tmp_path / "f.safetensors"), ours.single_transformer_blocks[1]
        parts = (block.attn.to_q, block.attn.to_k, block.attn.to_v, block.proj_mlp)
        assert torch.equal(state.tensor("single_blocks.1.linear1.weight"), torch.cat([p.weight for p in parts]))
    else:
        read = type(theirs).from_single_file(str(tmp_path / "f.safetensors"), config=str(tmp_path))
        assert_same(read.state_dict(), theirs.state_dict())
    loaded = effusion.load(tmp_path / "f.safetensors", config=tmp_path)
    assert type(loaded) is cls
    with pytest.raises(CheckpointError, match=f"holds no AutoencoderTiny; it is .*{cls.__name__}"):
        effusion.AutoencoderTiny.from_single_file(tmp_path / "f.safetensors")
    if kind.startswith(("flux", "sd3")):  # everything is told by the shapes
        plain = cls.from_single_file(tmp_path / "f.safetensors")
        assert as_lists(plain.config) == as_lists(ours.config)


def test_splitting_stays_in_the_mapped_file(pair: tuple[Any, Path, str], tmp_path: Path) -> None:
    ours = effusion.DiffusionPipeline.from_pretrained(pair[1])
    ours.save_single_file(tmp_path / "all.safetensors")
    checkpoint = open_file(tmp_path / "all.safetensors")
    for part in recognise(checkpoint).parts.values():
        inside = part.read(checkpoint)
        computed = [n for n, e in inside.items() if not hasattr(e, "offset")]
        assert computed in ([], ["text_projection.weight"])


# -- published sizes -----------------------------------------------------------------------------

COMMON = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
XL = {
    "sample_size": 128, "cross_attention_dim": 2048, "attention_head_dim": [5, 10, 20], "use_linear_projection": True,
    "block_out_channels": [320, 640, 1280], "transformer_layers_per_block": [1, 2, 10],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
PUBLISHED: dict[str, tuple[str, dict[str, Any], str]] = {
    "1.5": ("UNet2DConditionModel", COMMON, "Stable Diffusion 1.x"),
    "1.5 inpainting": ("UNet2DConditionModel", {**COMMON, "in_channels": 9}, "Stable Diffusion 1.x"),
    "2.1": (
        "UNet2DConditionModel",
        {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True, "sample_size": 96},
        "Stable Diffusion 2.x",
    ),
    "xl": ("UNet2DConditionModel", XL, "Stable Diffusion XL"),
    "refiner": (
        "UNet2DConditionModel",
        {
            **XL, "cross_attention_dim": 1280, "attention_head_dim": [6, 12, 24, 24], "transformer_layers_per_block": 4,
            "block_out_channels": [384, 768, 1536, 1536], "projection_class_embeddings_input_dim": 2560,
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        },
        "Stable Diffusion XL refiner",
    ),
    "controlnet": ("ControlNetModel", {"cross_attention_dim": 768}, "ControlNet"),
    "vae": (
        "AutoencoderKL",
        {
            "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "sample_size": 512,
            "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
        },
        "AutoencoderKL",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes_give_the_published_configuration(name: str) -> None:
    class_name, config, family = PUBLISHED[name]
    with Skeleton():
        model = getattr(effusion, class_name)(**config)
    verdict = recognise(from_dict(single_file.original_state(model)))
    assert family in verdict.name
    (part,) = verdict.parts.values()
    assert part.class_name == class_name

    def plain(value: Any) -> Any:
        return list(value) if isinstance(value, (list, tuple)) else value

    defaults = dict(getattr(effusion, class_name).from_config(part.config).config) if name == "vae" else None
    for key, value in part.config.items():
        assert plain(value) == plain(model.config[key]), key
    assert defaults is None or defaults["latent_channels"] == 4


def test_inspecting_a_file_of_24_gigabytes_takes_its_header_only(tmp_path: Path) -> None:
    with Skeleton():
        model = effusion.UNet2DConditionModel(**XL)
    state = single_file.original_state(model, "model.diffusion_model.")
    header, at = {}, 0
    for key, tensor in {**state, "filler": torch.empty(3 << 30, device="meta")}.items():
        size = tensor.numel() * 4
        header[key] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with (tmp_path / "big.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    start = time.process_time()
    verdict = recognise(open_file(tmp_path / "big.safetensors"))
    assert time.process_time() - start < 2
    assert "Stable Diffusion XL" in verdict.describe()


# -- load ----------------------------------------------------------------------------------------


def test_load_finds_out_what_a_folder_is(pair: tuple[Any, Path, str], tmp_path: Path) -> None:
    _, folder, _ = pair
    pipe = effusion.load(folder)
    assert type(pipe).__name__ == json.loads((folder / "model_index.json").read_text())["_class_name"]
    assert type(effusion.load(folder / "unet")) is effusion.UNet2DConditionModel
    assert type(effusion.load(folder, subfolder="vae")) is effusion.AutoencoderKL
    assert type(effusion.load(folder / "scheduler")) is type(pipe.scheduler)
    pipe.save_single_file(tmp_path / "x" / "all.safetensors")
    again = effusion.load(tmp_path / "x", config=folder, torch_dtype="auto")
    assert_same(states(again), states(pipe))
    with pytest.raises(MissingFile, match="neither model_index"):
        effusion.load(tmp_path)


def test_load_stays_in_its_folder(pair: tuple[Any, Path, str], tmp_path: Path) -> None:
    _, folder, _ = pair
    (tmp_path / "here").mkdir()
    (tmp_path / "beside").mkdir()
    safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / "beside" / "a.safetensors")
    for subfolder in ("../beside", f"{folder}/scheduler", "../../" + folder.name + "/scheduler"):
        with pytest.raises(CheckpointError, match="outside of its folder"):
            effusion.load(tmp_path / "here", subfolder=subfolder)
    (tmp_path / "here" / "link").symlink_to(tmp_path / "beside")
    with pytest.raises(CheckpointError, match="is a link to"):
        effusion.load(tmp_path / "here", subfolder="link")
    with pytest.raises(MissingFile, match="has no folder nowhere"):
        effusion.load(tmp_path / "here", subfolder="nowhere")
    assert type(effusion.load(folder, subfolder="scheduler")).__name__.endswith("Scheduler")


@pytest.mark.parametrize("ending", ["safetensors", "gguf", "pth", "ckpt"])
def test_the_only_file_of_a_folder(ending: str, tmp_path: Path) -> None:
    ours = conv(flux(num_layers=1, num_single_layers=1))
    state = single_file.original_state(ours)
    (tmp_path / "x").mkdir()
    if ending in ("pth", "ckpt"):
        torch.save(state, tmp_path / "x" / f"f.{ending}")
    else:
        ours.save_single_file(tmp_path / "x" / f"f.{ending}")
    assert_same(effusion.load(tmp_path, subfolder="x").state_dict(), ours.state_dict())


@pytest.mark.parametrize("name", ["a.safetensors", "models/a.safetensors", "models/a.gguf"])
def test_a_missing_file_is_no_repository(name: str, hub: HubServer) -> None:
    with pytest.raises(MissingFile, match="there is no such file here"):
        effusion.load(name)
    assert not hub.requests


def test_a_repository_that_moves_while_it_is_loaded(
    hub: HubServer, pair: tuple[Any, Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything is of the commit that was asked for first."""
    _, folder, _ = pair
    hub.add("us/vae", folder / "vae")
    read = auto_model.read_json

    def moving(path: Path) -> Any:
        hub.add("us/vae", {"config.json": path.read_bytes(), "diffusion_pytorch_model.safetensors": b"broken"})
        return read(path)

    monkeypatch.setattr(auto_model, "read_json", moving)
    assert type(effusion.AutoModel.from_pretrained("us/vae")) is effusion.AutoencoderKL


def test_an_encoder_alone_with_its_configuration(hub: HubServer, pair: tuple[Any, Path, str], tmp_path: Path) -> None:
    _, folder, _ = pair
    hub.add("us/pipe", folder)
    encoder = effusion.DiffusionPipeline.from_pretrained(folder).text_encoder
    state = {("" if n.startswith("text_") else "text_model.") + n: t for n, t in encoder.state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / "clip.safetensors")
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    for given in (
        {"config": config},
        {"config": folder / "text_encoder"},
        {"config": folder, "subfolder": "text_encoder"},
        {"config": "us/pipe", "subfolder": "text_encoder"},
    ):
        ours = effusion.load(tmp_path / "clip.safetensors", **given)
        assert ours.config.eos_token_id == config["eos_token_id"]
        assert ours.config.num_attention_heads == config["num_attention_heads"]
    with pytest.raises(CheckpointError, match="no repository on the hub"):
        effusion.load(tmp_path / "clip.safetensors", config="us/none")


def test_load_from_the_hub_and_by_link(hub: HubServer, pair: tuple[Any, Path, str], tmp_path: Path) -> None:
    _, folder, _ = pair
    hub.add("us/pipe", folder)
    hub.add("us/vae", folder / "vae")
    assert type(effusion.load("us/vae")) is effusion.AutoencoderKL
    pipe = effusion.load("us/pipe")
    pipe.save_single_file(tmp_path / "all.safetensors")
    hub.add("us/single", {"all.safetensors": (tmp_path / "all.safetensors").read_bytes(), "README.md": b""})
    for source in (
        "us/single",
        "us/single/all.safetensors",
        "https://huggingface.co/us/single/blob/main/all.safetensors",
        "https://huggingface.co/us/single/resolve/main/all.safetensors?download=true",
    ):
        assert_same(states(effusion.load(source, config=folder)), states(pipe))
    assert_same(states(effusion.load("us/single", config=folder, local_files_only=True)), states(pipe))
    hub.requests.clear()
    assert_same(states(effusion.load("us/single", config="us/pipe")), states(pipe))
    assert not [f for f in hub.fetched() if f.endswith("safetensors")], "only configurations are needed of `config`"


WIDE = torch.zeros(4, 768)
OTHERS: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "lora": (
        {"unet.down_blocks.1.attn2.to_k.lora_A.weight": WIDE},
        "LoRA for Stable Diffusion 1.x; adapters can't be loaded yet",
    ),
    "old lora": ({"unet.attn2.processor.to_k_lora.down.weight": WIDE}, "LoRA for Stable Diffusion 1.x"),
    "linear lora": ({"unet.attn2.to_k.lora_linear_layer.up.weight": WIDE}, "LoRA for an unknown family"),
    "xlabs lora": ({"double_blocks.0.processor.qkv_lora1.down.weight": WIDE}, "LoRA for FLUX.1"),
    "lycoris": ({"lora_unet_mid_block.hada_w1_a": WIDE}, "LoRA"),
    "kohya": ({"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": WIDE}, "LoRA for FLUX"),
    "embedding": ({"emb_params": WIDE}, "textual inversion of width 768; adapters can't"),
    "embedding by token": ({"<cat>": WIDE}, "textual inversion"),
    "embedding of a bare token": ({"a-cat": WIDE}, "textual inversion of width 768"),
    "a table": ({"weight": torch.zeros(99, 768)}, "unknown"),
    "ip adapter": ({"image_proj.x": WIDE, "ip_adapter.1.to_k_ip.weight": WIDE + 1}, "IP-Adapter; adapters can't"),
    "unknown": ({"foo.bar": WIDE}, "unknown: 1 tensors such as foo.bar"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_load_says_what_else_a_file_is(tmp_path: Path, case: str) -> None:
    state, says = OTHERS[case]
    safetensors.torch.save_file(state, tmp_path / "f.safetensors")
    with pytest.raises(CheckpointError, match=says):
        effusion.load(tmp_path / "f.safetensors")
    with pytest.raises(CheckpointError, match="is no pipeline; it is"):
        effusion.StableDiffusionPipeline.from_single_file(tmp_path / "f.safetensors")


def test_an_ip_adapter_in_a_torch_file(tmp_path: Path) -> None:
    torch.save({"image_proj": {"proj.weight": WIDE}, "ip_adapter": {"1.to_k_ip.weight": WIDE}}, tmp_path / "ip.bin")
    with pytest.raises(CheckpointError, match="is an IP-Adapter"):
        effusion.load(tmp_path / "ip.bin")


def test_what_a_file_lacks_is_said(pair: tuple[Any, Path, str], tmp_path: Path) -> None:
    _, folder, _ = pair
    pipe = effusion.DiffusionPipeline.from_pretrained(folder)
    pipe.save_single_file(tmp_path / "f.safetensors")
    state = safetensors.torch.load_file(tmp_path / "f.safetensors")
    with pytest.raises(CheckpointError, match="no single file carries its tokenizer.*pass `tokenizer=`"):
        effusion.load(tmp_path / "f.safetensors", local_files_only=True, tokenizer_2=None)
    no_vae = {k: v for k, v in state.items() if not k.startswith("first_stage_model.")}
    with pytest.raises(CheckpointError, match=r"without vae.* needs \['vae'\] too"):
        type(pipe).from_single_file(no_vae, config=folder)
    assert type(pipe).from_single_file(no_vae, config=folder, vae=pipe.vae).vae is pipe.vae
    state["first_stage_model.decoder.conv_in.weight"] = torch.zeros(3, 3)
    with pytest.raises(CheckpointError, match="named like those of a known network, but they are none"):
        type(pipe).from_single_file(
            {**state, "first_stage_model.encoder.conv_in.weight": torch.zeros(3)}, config=folder
        )
    with pytest.raises(CheckpointError, match=r"(?s)does not fit AutoencoderKL.*decoder\.conv_in\.weight is \[3, 3\]"):
        type(pipe).from_single_file(state, config=folder)


@pytest.mark.parametrize(
    "source", ["nothing.safetensors", "/no/such/file.ckpt", "https://example.com/a/b/c.safetensors"]
)
def test_sources_that_are_nothing(source: str) -> None:
    with pytest.raises(CheckpointError):
        effusion.AutoencoderKL.from_single_file(source, local_files_only=True)


def test_a_network_out_of_a_gguf_file(tmp_path: Path) -> None:
    import gguf

    theirs = flux(num_single_layers=1, num_layers=1)
    state = single_file.original_state(conv(theirs))
    writer = gguf.GGUFWriter(tmp_path / "f.gguf", "flux")
    expected = {}
    for name, tensor in state.items():
        values = tensor.numpy()
        kind = (
            gguf.GGMLQuantizationType.Q8_0
            if tensor.ndim == 2 and tensor.shape[1] % 32 == 0
            else gguf.GGMLQuantizationType.F32
        )
        raw = gguf.quants.quantize(values, kind)
        writer.add_tensor(name, raw, raw_dtype=kind)
        expected[name] = torch.from_numpy(gguf.quants.dequantize(raw, kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    config = effusion.GGUFQuantizationConfig(compute_dtype=torch.bfloat16)
    ours = effusion.FluxTransformer2DModel.from_single_file(tmp_path / "f.gguf", quantization_config=config)
    assert ours.dtype == torch.bfloat16
    full = effusion.load(tmp_path / "f.gguf")
    assert_same(single_file.original_state(full), expected)
    assert torch.equal(ours.x_embedder.weight, full.x_embedder.weight.bfloat16())
    with pytest.raises(ValueError, match="GGUFQuantizationConfig"):
        effusion.FluxTransformer2DModel.from_single_file(tmp_path / "f.gguf", quantization_config=object())
