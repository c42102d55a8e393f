"""Every snippet that our user gave us runs after changing the import, or is listed here as not built yet."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from tests.pipelines.inputs import picture

import effusion
from effusion.blocks import pictures
from effusion.placement.engine import engine_of

from . import standins
from .snippets import SNIPPETS, Snippet

SEEDS = Path(__file__).parents[3] / "shared" / "seeds"
CODE = {s.place: s.code for s in SNIPPETS}
Names = dict[str, Any]
TRACED: list[bytes] = []  # what the tracing snippet saved, for the one that goes on with it


# a family that is not built yet, in the words of one that is
ANOTHER_FAMILY = {
    "CogVideoXPipeline": "FluxPipeline",
    "CogVideoXTransformer3DModel": "FluxTransformer2DModel",
    "THUDM/CogVideoX-5b": "black-forest-labs/FLUX.1-schnell",
    "from diffusers.utils import export_to_video": "",
    "num_inference_steps=50": "num_inference_steps=3, height=64, width=64",
    ".frames[0]": ".images[0]",
    'export_to_video(video, "output.mp4", fps=8)': 'video.save("output.png")',
}


# what a snippet imports and doesn't use
UNUSED = {"import cv2\n": ""}


# two GPUs, in the words of a machine that has none
OTHER_DEVICES = {r"(?<=': )0\b": "'cpu'", r"(?<=': )1\b": "'cpu'", r'\{0:"1GB", 1:"1GB"\}': '{"cpu": "1GB"}'}


def execute(code: str, names: Names | None = None) -> Names:
    """Run a script whose import was changed, as ``__main__``; ``names`` are there before and after."""
    if "CogVideoX" in code and not hasattr(effusion, "CogVideoXPipeline"):
        for theirs, ours in ANOTHER_FAMILY.items():
            code = code.replace(theirs, ours)
    if torch.cuda.device_count() < 2:
        for theirs, ours in OTHER_DEVICES.items():
            code = re.sub(theirs, ours, code)
    for theirs, ours in UNUSED.items():
        code = code.replace(theirs, ours)
    renamed = re.sub(r"^(\s*(?:from|import)\s+)diffusers\b", r"\1effusion", code, flags=re.MULTILINE)
    names = {} if names is None else names
    names["__name__"] = "__main__"
    exec(compile(renamed, "snippet", "exec"), names)
    return names


class Later:
    """Stands for ``names[name]``, which the snippet makes itself under another name."""

    def __init__(self, names: Names, name: str) -> None:
        self._names, self._name = names, name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._names[self._name], attribute)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._names[self._name](*args, **kwargs)


# -- what a snippet finds there: names of the snippets before it, files in the current folder -----


def torch_only(folder: Path) -> Names:
    return {"torch": torch}


def a_pipeline(folder: Path) -> Names:
    pipeline = effusion.StableDiffusionPipeline.from_pretrained("runwayml/stable-diffusion-v1-5")
    return {"torch": torch, "pipeline": pipeline, "prompt": "a photo of an astronaut"}


def a_local_model(folder: Path) -> Names:
    standins.write(standins.part(standins.stable_diffusion_variant("fp16"), "unet"), folder / "path/to/model")
    return {"torch": torch}


def a_local_plain_model(folder: Path) -> Names:
    standins.write(standins.part(standins.stable_diffusion(), "vae"), folder / "path/to/model")
    return {}


def a_local_pipeline(folder: Path) -> Names:
    standins.write(standins.stable_diffusion(), folder / "local/stable-diffusion-v1-5")
    return {"torch": torch}


def a_modular_pipeline(folder: Path) -> Names:
    standins.write(standins.stable_diffusion(), folder / "path/to/modular/model")
    return {"torch": torch}


def any_pipeline(folder: Path) -> Names:
    return {"DiffusionPipeline": effusion.DiffusionPipeline}


def a_local_custom_pipeline(folder: Path) -> Names:
    (folder / "pipeline_name").mkdir()
    (folder / "pipeline_name" / "pipeline.py").write_text(standins.CUSTOM)
    return any_pipeline(folder)


def a_balanced_pipeline(folder: Path) -> Names:
    return execute(CODE["000:74"])


def a_spread_transformer(folder: Path) -> Names:
    return execute(CODE["000:97"])


def a_transformer_to_offload(folder: Path) -> Names:
    from effusion.hooks import apply_group_offloading

    pipeline = effusion.FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-schnell", torch_dtype=torch.bfloat16)
    onload, offload = torch.device("cuda"), torch.device("cpu")
    names: Names = {"pipeline": pipeline, "onload_device": onload, "offload_device": offload}
    return {**names, "apply_group_offloading": apply_group_offloading}


def an_input_picture(folder: Path) -> Names:
    (folder / "path/to").mkdir(parents=True)
    picture(64).save(folder / "path/to/input.jpg")
    return {"torch": torch}


def a_control_picture(folder: Path) -> Names:
    (folder / "path/to").mkdir(parents=True)
    picture(64).save(folder / "path/to/control.jpg")
    return {"torch": torch}


def what_a_control_network_is_trained_with(folder: Path) -> Names:
    unet = effusion.UNet2DConditionModel.from_pretrained("runwayml/stable-diffusion-v1-5", subfolder="unet")
    names = {
        "torch": torch,
        "ControlNetModel": effusion.ControlNetModel,
        "unet": unet,
        "control_image_path": "control.png",
    }
    processor = effusion.VaeImageProcessor(do_normalize=False)
    return {**names, "controlnet_image_processor": processor, "load_control_image": lambda path: picture(64)}


def old_imports(folder: Path) -> Names:
    return {"torch": torch, "StableDiffusionPipeline": effusion.StableDiffusionPipeline}


def training_arguments(folder: Path) -> Names:
    names = ("UNet2DConditionModel", "AutoencoderKL", "FluxTransformer2DModel")
    vae = standins.write(standins.part(standins.stable_diffusion(), "vae"), folder / "vae")
    return {
        **{name: getattr(effusion, name) for name in names},
        "pretrained_model_name_or_path": "runwayml/stable-diffusion-v1-5",
        "pretrained_vae_model_name_or_path": str(vae),
        "variant": None,
        "revision": "main",
    }


def the_traced_unet(folder: Path) -> Names:
    if not TRACED:
        traced(execute(CODE["000:490"]))
    (folder / "unet_traced.pt").write_bytes(TRACED[0])
    names: Names = {"prompt": "a photo of an astronaut"}
    names["pipe"] = Later(names, "pipeline")
    return names


BEFORE: dict[str, Callable[[Path], Names]] = {
    "000:87": a_balanced_pipeline,
    "000:111": a_spread_transformer,
    "000:122": a_spread_transformer,
    "000:167": a_balanced_pipeline,
    "000:386": a_transformer_to_offload,
    "000:398": a_transformer_to_offload,
    "000:478": a_pipeline,
    "000:562": the_traced_unet,
    "000:624": a_pipeline,
    "001:37": old_imports,
    "002:92": torch_only,
    "002:104": a_local_model,
    "002:139": any_pipeline,
    "002:160": an_input_picture,
    "002:170": a_control_picture,
    "002:190": torch_only,
    "002:284": a_pipeline,
    "002:296": a_pipeline,
    "002:307": a_local_plain_model,
    "002:677": a_local_pipeline,
    "002:691": torch_only,
    "002:759": a_modular_pipeline,
    "002:836": torch_only,
    "002:862": a_local_custom_pipeline,
    "002:948": torch_only,
    "002:1220": training_arguments,
    "002:1287": what_a_control_network_is_trained_with,
    "002:1299": training_arguments,
    "002:1313": training_arguments,
    "002:1694": torch_only,
}


# -- what must be true afterwards ----------------------------------------------------------------


def half(name: str = "pipeline") -> Callable[[Names], None]:
    def check(names: Names) -> None:
        assert {m.dtype for m in names[name].modules.values()} == {torch.float16}

    return check


def a_picture(side: int = 64, name: str = "image") -> Callable[[Names], None]:
    def check(names: Names) -> None:
        image = names[name]
        assert isinstance(image, PIL.Image.Image)
        assert image.size == (side, side)

    return check


def sampler(class_name: str, **config: Any) -> Callable[[Names], None]:
    def check(names: Names) -> None:
        found = names["pipeline"].scheduler
        assert type(found) is getattr(effusion, class_name)
        assert config.items() <= dict(found.config).items()
        assert found.config.beta_start == 0.00085, "the checkpoint's noise schedule was lost"
        assert names["pipeline"]("a cat", num_inference_steps=2, output_type="latent").images.isfinite().all()

    return check


def sharded(names: Names) -> None:
    assert Path("sdxl-unet-sharded/config.json").is_file()
    again = effusion.UNet2DConditionModel.from_pretrained("sdxl-unet-sharded")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), names["unet"].parameters(), strict=True))


def from_shards(names: Names) -> None:
    half()(names)
    assert names["pipeline"].unet is names["unet"]
    assert len([f for f in standins.sharded_xl_unet() if f.endswith(".safetensors")]) > 1


def channels_last(names: Names) -> None:
    weight = names["pipeline"].unet.conv_out.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert names["pipeline"]("a cat", num_inference_steps=1, output_type="latent").images.isfinite().all()


def traced(names: Names) -> None:
    TRACED.append(Path("unet_traced.pt").read_bytes())
    inputs = names["generate_inputs"]()
    loaded = torch.jit.load("unet_traced.pt")
    assert torch.equal(loaded(*inputs)[0], names["unet"](*inputs)[0])


def the_traced_unet_ran(names: Names) -> None:
    assert type(names["pipeline"].unet).__name__ == "TracedUNet"
    assert tuple(names["pipeline"].config["unet"]) == ("__main__", "TracedUNet")
    a_picture(512)(names)


def sliced_attention(names: Names) -> None:
    half("pipe")(names)
    a_picture()(names)


def text_and_model(names: Names) -> None:
    import transformers

    assert type(names["model"]) is effusion.UNet2DConditionModel
    assert names["model"].dtype == torch.float16
    assert names["AutoTokenizer"] is transformers.AutoTokenizer


def of_class(name: str, class_name: str) -> Callable[[Names], None]:
    def check(names: Names) -> None:
        assert type(names[name]) is getattr(effusion, class_name)

    return check


def repainted(names: Names) -> None:
    a_picture(768)(names)


def modular(names: Names) -> None:
    half()(names)
    inputs = {"prompt": "a cat", "num_inference_steps": 2, "output_type": "pt"}
    assert names["pipeline"](output="images", **inputs).shape == (1, 3, 64, 64)


def still_the_same(names: Names) -> None:
    """After all of the switches the pipeline still runs, and gives what it gives without them."""
    inputs = {"prompt": "a cat", "num_inference_steps": 2, "output_type": "latent"}
    plain = a_pipeline(Path())["pipeline"]
    a, b = (p(**inputs, generator=torch.Generator().manual_seed(0)).images for p in (names["pipeline"], plain))
    assert (a - b).abs().max() < 1e-4


def balanced(names: Names) -> None:
    half()(names)
    assert set(names["pipeline"].hf_device_map) <= set(names["pipeline"].components)
    assert names["pipeline"].hf_device_map


def spread(names: Names) -> None:
    assert names["transformer"].dtype == torch.bfloat16
    assert names["transformer"].hf_device_map


def as_mapped(names: Names) -> None:
    transformer, placed = names["transformer"], names["device_map"]
    assert transformer.hf_device_map == placed
    assert len(transformer.single_transformer_blocks) == 38


def unmapped(names: Names) -> None:
    assert not names["pipeline"].hf_device_map
    names["pipeline"].enable_model_cpu_offload()


def offloaded(names: Names) -> None:
    assert {m.dtype for m in names["pipeline"].modules.values()} == {torch.bfloat16}


def policy_of(pipeline: Any, name: str) -> dict[str, Any]:
    engine = engine_of(pipeline.modules[name])
    assert engine is not None, f"nothing serves {name}"
    return engine.policy


def flux_picture(pipeline: Any) -> torch.Tensor:
    call = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "pt", "max_sequence_length": 16}
    return pipeline("a panda", generator=torch.Generator().manual_seed(0), **call).images


def grouped(**kinds: str) -> Callable[[Names], None]:
    """These components are offloaded so, and the picture is the one of everything resident, bit for bit."""

    def check(names: Names) -> None:
        pipeline = names["pipeline"]
        assert {n: policy_of(pipeline, n)["offload_type"] for n in kinds} == kinds
        found = flux_picture(pipeline)
        pipeline.to("cuda")
        assert torch.equal(flux_picture(pipeline), found)

    return check


def on_a_stream(names: Names) -> None:
    assert policy_of(names["pipeline"], "transformer")["use_stream"] is True
    grouped(transformer="leaf_level")(names)


def on_disk(names: Names) -> None:
    assert policy_of(names["pipeline"], "transformer")["home"] == "disk"
    assert policy_of(names["pipeline"], "text_encoder")["home"] == "disk"
    grouped(transformer="leaf_level", text_encoder="block_level")(names)
    assert not list(Path("path/to/disk").glob("*")), "what was written is removed with the policy"


def cast(names: Names) -> None:
    stored = {p.dtype for p in names["transformer"].parameters()}
    assert stored == {torch.float8_e4m3fn, torch.bfloat16}
    assert names["transformer"].dtype == torch.bfloat16
    if "pipeline" in names:
        assert names["pipeline"].transformer is names["transformer"]


def foreign(names: Names) -> None:
    assert names["pipeline"].sign == "mine"
    assert isinstance(names["pipeline"], effusion.StableDiffusionPipeline)


def controlled(names: Names) -> None:
    half()(names)
    of_class("controlnet", "ControlNetModel")(names)
    a_picture(64)(names)


def both_networks(names: Names) -> None:
    of_class("unet", "UNet2DConditionModel")(names)
    of_class("vae", "AutoencoderKL")(names)


AFTER: dict[str, Callable[[Names], None]] = {
    "000:37": sharded,
    "000:48": from_shards,
    "000:74": balanced,
    "000:97": spread,
    "000:129": as_mapped,
    "000:147": balanced,
    "000:167": unmapped,
    "000:179": half(),
    "000:201": of_class("pipeline", "StableDiffusionXLImg2ImgPipeline"),
    "000:237": offloaded,
    "000:266": offloaded,
    "000:307": grouped(transformer="leaf_level", text_encoder="leaf_level", vae="leaf_level"),
    "000:342": grouped(transformer="leaf_level", text_encoder="block_level", vae="leaf_level"),
    "000:386": on_a_stream,
    "000:398": on_disk,
    "000:420": cast,
    "000:451": cast,
    "000:478": channels_last,
    "000:490": traced,
    "000:562": the_traced_unet_ran,
    "001:21": a_picture(),
    "001:37": half("pipe"),
    "001:52": sliced_attention,
    "002:92": half(),
    "002:104": text_and_model,
    "002:139": foreign,
    "002:149": a_picture(),
    "002:160": repainted,
    "002:170": controlled,
    "002:190": sampler("DPMSolverMultistepScheduler", use_karras_sigmas=True, algorithm_type="dpmsolver++"),
    "002:231": of_class("pipeline", "StableDiffusionPipeline"),
    "002:296": still_the_same,
    "002:307": of_class("model", "AutoencoderKL"),
    "002:497": sampler("DDIMScheduler"),
    "002:677": of_class("pipeline", "StableDiffusionPipeline"),
    "002:691": of_class("pipeline", "StableDiffusionPipeline"),
    "002:725": foreign,
    "002:759": modular,
    "002:862": foreign,
    "002:791": a_picture(),
    "002:814": sampler("DPMSolverMultistepScheduler"),
    "002:948": modular,
    "002:1220": both_networks,
    "002:1287": of_class("controlnet", "ControlNetModel"),
    "002:1299": of_class("teacher_unet", "UNet2DConditionModel"),
    "002:1313": of_class("transformer", "FluxTransformer2DModel"),
    "002:1694": half(),
}

WITHOUT_XFORMERS = {"000:610", "002:836"}  # end with an error that names the package where it is missing


@pytest.fixture
def online(repositories: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pictures at published addresses come from the same local hub."""
    import io

    buffer = io.BytesIO()
    picture(64).save(buffer, "PNG")
    data = "datasets/huggingface/documentation-images"
    repositories.add(data, {"diffusers/img2img-sdxl-init.png": buffer.getvalue()})
    plain = pictures.read_url
    local = lambda url: plain(url.replace("https://huggingface.co", repositories.url))  # noqa: E731
    monkeypatch.setattr(pictures, "read_url", local)
    return repositories


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda s: f"{s.place} {s.title}")
def test_snippet(snippet: Snippet, request: pytest.FixtureRequest) -> None:
    if snippet.not_yet:
        pytest.skip(snippet.not_yet)
    request.getfixturevalue("online")
    names = BEFORE.get(snippet.place, lambda _: {})(Path.cwd())
    if snippet.place in WITHOUT_XFORMERS and importlib.util.find_spec("xformers") is None:
        with pytest.raises(ImportError, match="xformers"):
            execute(snippet.code, names)
        return
    AFTER.get(snippet.place, lambda _: None)(execute(snippet.code, names))


def test_every_snippet_is_listed_once_and_as_it_stands() -> None:
    """Where the documents lie beside the repository, the table is held against them."""
    places = [s.place for s in SNIPPETS]
    assert len(set(places)) == len(places)
    if not SEEDS.is_dir():
        pytest.skip("the documents are not here")
    for document in SEEDS.glob("*.txt"):
        lines = document.read_text().split("\n")
        for place, code in CODE.items():
            key, _, first = place.partition(":")
            if document.name.startswith(key) and code:
                body = code.strip("\n").split("\n")
                there = lines[int(first) - 1 : int(first) - 1 + len(body)]
                assert [b.split() for b in body] == [t.split() for t in there], place


def test_pictures_of_the_same_script_are_the_same_bits(repositories: Any) -> None:
    code = CODE["002:149"].replace("pipeline(prompt)", "pipeline(prompt, generator=torch.manual_seed(0))")
    first, second = (np.asarray(execute(code)["image"]) for _ in range(2))
    assert np.array_equal(first, second)
