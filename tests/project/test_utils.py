"""``effusion.utils`` and the other small paths that scripts import from, against the peer's."""

from __future__ import annotations

import importlib
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers.utils.state_dict_utils as peer_names
import diffusers.utils.torch_utils as peer_torch
import numpy as np
import pytest
import torch
from PIL import Image

import effusion
from effusion.core import log
from effusion.core.errors import MissingExtra, UntrustedCode

SUBMODULES = ("hooks", "callbacks", "training_utils", "optimization", "loaders", "modular_pipelines", "quantizers")


def test_submodules_are_attributes_and_nothing_is_imported_for_it() -> None:
    code = "import effusion, sys\n"
    code += "".join(f"assert effusion.{name}.__name__ == 'effusion.{name}'\n" for name in SUBMODULES)
    code += "from effusion import logging\nassert logging.get_logger('x') and logging.INFO == 20\n"
    code += "assert 'torch' not in sys.modules, 'the paths are views: names are looked up when used'"
    subprocess.run([sys.executable, "-c", code], check=True)


TOP = """EMAModel HookRegistry InpaintProcessor PixArtImageProcessor FromOriginalModelMixin get_scheduler
    OptionalDependencyNotAvailable is_torch_available is_onnx_available is_transformers_version"""


@pytest.mark.parametrize("name", TOP.split())
def test_names_at_the_top(name: str) -> None:
    import diffusers

    assert hasattr(diffusers, name)
    assert getattr(effusion, name).__name__ == getattr(diffusers, name).__name__ if "is_" not in name else True


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("hooks", "HookRegistry ModelHook apply_group_offloading apply_layerwise_casting"),
        ("hooks.hooks", "HookRegistry ModelHook"),
        ("training_utils", "EMAModel set_seed compute_snr cast_training_params free_memory offload_models"),
        ("image_processor", "VaeImageProcessor PixArtImageProcessor InpaintProcessor"),
        ("utils.deprecation_utils", "deprecate"),
        ("utils.hub_utils", "extract_commit_hash http_user_agent _add_variant"),
        ("utils.dynamic_modules_utils", "get_class_from_dynamic_module"),
        ("utils.peft_utils", "scale_lora_layers unscale_lora_layers recurse_remove_peft_layers apply_lora_scale"),
        ("utils.state_dict_utils", "convert_state_dict_to_diffusers convert_unet_state_dict_to_peft"),
        ("utils.testing_utils", "enable_full_determinism torch_device floats_tensor slow require_torch_gpu"),
        ("utils.import_utils", "is_compel_available is_optimum_quanto_version OptionalDependencyNotAvailable"),
        ("utils.loading_utils", "load_image load_video"),
        ("models", "ImageProjection AttentionBackendName attention_backend"),
        ("models.activations", "get_activation GELU GEGLU SwiGLU FP32SiLU"),
        ("models.attention", "JointTransformerBlock BasicTransformerBlock FeedForward AttentionMixin"),
        ("models.attention_processor", "Attention AttentionProcessor SpatialNorm JointAttnProcessor2_0"),
        ("models.attention_processor", "FluxAttnProcessor2_0 FusedFluxAttnProcessor2_0 FusedJointAttnProcessor2_0"),
        ("models.attention_processor", "ADDED_KV_ATTENTION_PROCESSORS CROSS_ATTENTION_PROCESSORS"),
        ("models.embeddings", "apply_rotary_emb get_1d_rotary_pos_embed FluxPosEmbed"),
        ("models.normalization", "AdaLayerNormZeroSingle AdaLayerNormSingle AdaLayerNormContinuous RMSNorm"),
        ("models.autoencoders.vae", "AutoencoderMixin DecoderOutput"),
        ("models.lora", "adjust_lora_scale_text_encoder"),
        (
            "models.unets.unet_2d_blocks",
            "get_down_block get_mid_block get_up_block CrossAttnDownBlock2D UNetMidBlock2D",
        ),
        ("models.unet_2d_blocks", "CrossAttnUpBlock2D"),
        ("models.transformers.transformer_flux", "FluxAttnProcessor FluxAttention FluxPosEmbed FluxTransformerBlock"),
        ("models.transformers.transformer_qwenimage", "QwenDoubleStreamAttnProcessor2_0 QwenImageTransformerBlock"),
        ("pipelines.stable_diffusion", "StableDiffusionSafetyChecker StableDiffusionPipelineOutput"),
        ("pipelines.stable_diffusion.pipeline_stable_diffusion", "rescale_noise_cfg retrieve_timesteps"),
        ("pipelines.flux.pipeline_flux", "calculate_shift retrieve_timesteps FluxPipelineOutput"),
        ("schedulers.scheduling_utils", "SCHEDULER_CONFIG_NAME SchedulerMixin"),
        ("schedulers.scheduling_dpmsolver_sde", "BrownianTreeNoiseSampler"),
    ],
)
def test_names_under_the_ecosystems_paths(path: str, names: str) -> None:
    ours, theirs = importlib.import_module(f"effusion.{path}"), None
    try:
        theirs = importlib.import_module(f"diffusers.{path}")
    except ImportError:
        assert path in ("models.unet_2d_blocks",), "the peer has this path no more, or never had"
    for name in names.split():
        found = getattr(ours, name)
        assert theirs is None or hasattr(theirs, name), f"{path}.{name} is no name of the peer's"
        if isinstance(found, type):
            assert found.__name__ == name or name.endswith("Output")


def test_questions_about_packages() -> None:
    peer, ours = importlib.import_module("diffusers.utils.import_utils"), effusion.utils.import_utils
    for name in ours.questions():
        if name.endswith("_available"):
            assert getattr(ours, name)() == bool(getattr(peer, name)()), name
        elif getattr(peer, name.replace("_version", "_available"), bool)():
            assert getattr(ours, name)(">", "0.0.1") == getattr(peer, name)(">", "0.0.1"), name
    for name in ("DIFFUSERS_DYNAMIC_MODULE_NAME", "HF_MODULES_CACHE", "GGUF_FILE_EXTENSION", "USE_PEFT_BACKEND"):
        assert getattr(effusion.utils, name) == getattr(importlib.import_module("diffusers.utils"), name)


def test_required_packages() -> None:
    effusion.utils.requires_backends(test_required_packages, "torch")
    with pytest.raises(MissingExtra, match=r"Thing needs note_seq, bitsandbytes.*effusion\[bitsandbytes\]"):
        effusion.utils.requires_backends(type("Thing", (), {}), ["torch", "note_seq", "bitsandbytes"])
    with pytest.raises(ValueError, match="unknown packages"):
        effusion.utils.requires_backends(object(), "no_such_package")
    assert not issubclass(effusion.utils.OptionalDependencyNotAvailable, Exception)


# -- logging -------------------------------------------------------------------------------------------


@pytest.fixture
def restored() -> Iterator[logging.Logger]:
    root = log.get_logger()
    before = (root.level, root.propagate, list(root.handlers))
    yield root
    root.setLevel(before[0])
    root.propagate = before[1]
    root.handlers[:] = before[2]
    log.reset_format()


class Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(self.format(record))


def test_handlers_and_formats(restored: logging.Logger) -> None:
    kept = Kept()
    log.disable_default_handler()
    assert restored.handlers == [h for h in restored.handlers if h is not log._default_handler]
    log.add_handler(kept)
    logger = log.get_logger("effusion.somewhere")
    logger.warning("one")
    log.enable_explicit_format()
    logger.warning("two")
    log.reset_format()
    logger.warning("three")
    log.remove_handler(kept)
    logger.warning("four")
    assert [t.rpartition(" ")[2] for t in kept.texts] == ["one", "two", "three"]
    assert kept.texts[1].startswith("[WARNING|test_utils.py:")
    log.enable_default_handler()
    assert log._default_handler in restored.handlers
    with pytest.raises(ValueError, match="none of the handlers"):
        log.remove_handler(kept)


def test_propagation(restored: logging.Logger) -> None:
    kept = Kept()
    logging.getLogger().addHandler(kept)
    try:
        log.disable_propagation()
        log.get_logger().warning("inside")
        log.enable_propagation()
        log.get_logger().warning("outside")
    finally:
        logging.getLogger().removeHandler(kept)
    assert kept.texts == ["outside"]


def test_advice_can_be_switched_off(monkeypatch: pytest.MonkeyPatch, restored: logging.Logger) -> None:
    kept = Kept()
    log.add_handler(kept)
    logger: Any = log.get_logger("effusion.advice")
    logger.warning_advice("do %s", "this")
    monkeypatch.setenv("DIFFUSERS_NO_ADVISORY_WARNINGS", "1")
    logger.warning_advice("do that")
    assert kept.texts == ["do this"]


@pytest.mark.parametrize(
    ("variables", "level"),
    [
        ({}, 30),
        ({"DIFFUSERS_VERBOSITY": "error"}, 40),
        ({"DIFFUSERS_VERBOSITY": "nonsense"}, 30),
        ({"DIFFUSERS_VERBOSITY": "error", "EFFUSION_VERBOSITY": "debug"}, 10),
    ],
)
def test_verbosity_of_the_environment(variables: dict[str, str], level: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DIFFUSERS_VERBOSITY", "EFFUSION_VERBOSITY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    code = "from effusion.utils import logging; import logging as l; print(logging.get_verbosity())\n"
    code += "print(l.getLogger('effusion').propagate, sorted(logging.get_log_levels_dict()))"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.splitlines()[0] == str(level)
    assert run.stdout.splitlines()[1] == "False ['critical', 'debug', 'error', 'info', 'warning']"
    assert ("nonsense" in run.stderr) == ("nonsense" in variables.values())


# -- torch ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (1, 6, 5, 12)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_freeu_functions(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    from effusion.utils.torch_utils import apply_freeu, fourier_filter

    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.allclose(fourier_filter(x, 1, 0.3), peer_torch.fourier_filter(x, 1, 0.3), atol=1e-6)
    options = {"s1": 0.9, "s2": 0.2, "b1": 1.2, "b2": 1.4}
    for index in (0, 1, 2):
        ours = apply_freeu(index, x, x, **options)
        theirs = peer_torch.apply_freeu(index, x.clone(), x.clone(), **options)
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours, theirs, strict=True))


def test_devices() -> None:
    from effusion.utils import torch_utils

    for name in dir(peer_torch):
        if name.startswith("backend_") or name in ("empty_device_cache", "get_torch_cuda_device_capability"):
            assert callable(getattr(torch_utils, name))
    torch_utils.backend_manual_seed("cpu", 3)
    a = torch.rand(2)
    torch.manual_seed(3)
    assert torch.equal(a, torch.rand(2))
    for name in ("empty_cache", "synchronize", "reset_peak_memory_stats", "reset_max_memory_allocated"):
        getattr(torch_utils, f"backend_{name}")("cpu")
    assert torch_utils.backend_max_memory_allocated("cpu") == 0
    assert torch_utils.backend_supports_training("cpu") and not torch_utils.backend_supports_training("mps:0")
    assert torch_utils.backend_device_count("cpu") == peer_torch.backend_device_count("cpu")
    assert torch_utils.get_torch_cuda_device_capability() == peer_torch.get_torch_cuda_device_capability()
    assert torch_utils.get_module_execution_device(torch.nn.Linear(1, 1)) == torch.device("cpu")
    torch_utils.empty_device_cache()


def test_determinism() -> None:
    code = "import torch, os; from effusion.utils.torch_utils import enable_full_determinism as on\n"
    code += "from effusion.utils.torch_utils import disable_full_determinism as off\non()\n"
    code += "assert torch.are_deterministic_algorithms_enabled() and os.environ['CUBLAS_WORKSPACE_CONFIG'] == ':16:8'\n"
    code += "off()\nassert not torch.are_deterministic_algorithms_enabled()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_remembered_but_not_in_traces() -> None:
    from effusion.utils.torch_utils import lru_cache_unless_export

    calls = []

    @lru_cache_unless_export(maxsize=4)
    def double(x: int) -> int:
        calls.append(x)
        return 2 * x

    assert (double(2), double(2), double(3)) == (4, 4, 6)
    assert calls == [2, 3]


# -- names of LoRA weights -------------------------------------------------------------------------------

TEXT_PEFT = [f"text_model.encoder.layers.0.self_attn.{p}.lora_{x}.weight" for p in ("q_proj", "out_proj") for x in "AB"]
TEXT_NEW = [
    f"layers.0.self_attn.{p}.lora_linear_layer.{s}.weight" for p in ("q_proj", "v_proj") for s in ("up", "down")
]
TEXT_OLD = [f"layers.0.self_attn.{p}_lora.{s}.weight" for p in ("to_q", "to_out", "to_k") for s in ("up", "down")]
UNET_OLD = [f"mid.attn1.processor.{p}_lora.{s}.weight" for p in ("to_q", "to_out") for s in ("up", "down")]
UNET_NEW = [f"mid.attn1.{p}.lora.{s}.weight" for p in ("to_q", "to_out.0", "to_v") for s in ("up", "down")]
UNET_PEFT = [f"unet.mid.attn1.{p}.lora_{x}.weight" for p in ("to_q", "to_out.0", "proj") for x in "AB"]
KOHYA = [*UNET_PEFT, *(f"text_encoder_2.{n}" for n in TEXT_PEFT), "unet.mid.to_q.lora_magnitude_vector.weight"]


@pytest.mark.parametrize(
    "names", [TEXT_PEFT, TEXT_NEW, TEXT_OLD, UNET_OLD, UNET_NEW, UNET_PEFT, KOHYA, ["a.b.weight"], []], ids=str
)
@pytest.mark.parametrize(
    "function",
    ["convert_state_dict_to_diffusers", "convert_state_dict_to_peft", "convert_unet_state_dict_to_peft",
     "convert_all_state_dict_to_peft", "convert_state_dict_to_kohya", "state_dict_all_zero"],
)  # fmt: skip
def test_names_of_lora_weights(names: list[str], function: str) -> None:
    state = {name: torch.full((2, 3), float(i)) for i, name in enumerate(names)}
    try:
        expected = getattr(peer_names, function)(dict(state))
    except ValueError:
        with pytest.raises(ValueError):
            getattr(effusion.utils, function)(state)
        return
    found = getattr(effusion.utils, function)(state)
    if isinstance(expected, bool):
        assert found is expected
        return
    assert list(found) == list(expected)
    assert all(torch.equal(found[k], expected[k]) for k in expected)


def test_layers_of_peft() -> None:
    import peft

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
    x = torch.randn(2, 4)
    plain = model(x)
    effusion.utils.scale_lora_layers(model, 0.5)  # nothing to weigh
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False), model)
    full = model(x)
    assert effusion.utils.get_adapter_name(model) == "default_1"
    effusion.utils.scale_lora_layers(model, 0.5)
    half = model(x)
    effusion.utils.unscale_lora_layers(model, 0.5)
    assert torch.allclose(model(x), full)
    assert not torch.allclose(half, full) and not torch.allclose(half, plain)
    effusion.utils.set_adapter_layers(model, enabled=False)
    assert torch.allclose(model(x), plain)
    assert type(effusion.utils.recurse_remove_peft_layers(model)[0]) is torch.nn.Linear
    effusion.utils.check_peft_version("0.1")
    with pytest.raises(ValueError, match=r"99\.0 or newer"):
        effusion.utils.check_peft_version("99.0")


def test_the_scale_of_a_call() -> None:
    seen = []

    class Net(torch.nn.Module):
        @effusion.utils.apply_lora_scale("kwargs")
        def forward(self, kwargs: dict[str, Any] | None = None) -> None:
            seen.append(kwargs)

    given = {"scale": 0.5, "other": 1}
    Net()(kwargs=given)
    Net()(kwargs=None)
    assert seen == [{"other": 1}, None]
    assert given == {"scale": 0.5, "other": 1}


# -- files -----------------------------------------------------------------------------------------------


def test_videos(tmp_path: Path) -> None:
    from diffusers.utils import load_video as peer

    frames = [Image.fromarray(np.full((8, 8, 3), v, dtype=np.uint8)) for v in (0, 90, 200)]
    path = effusion.utils.export_to_gif(frames, str(tmp_path / "a.gif"), fps=10)
    ours, fps = effusion.utils.load_video(path, return_fps=True)
    theirs, peer_fps = peer(path, return_fps=True)
    assert fps == peer_fps
    assert len(ours) == len(theirs) == 3
    assert all(np.array_equal(a.convert("RGB"), b.convert("RGB")) for a, b in zip(ours, theirs, strict=True))
    assert len(effusion.utils.load_video(path, convert_method=lambda f: f[:1])) == 1
    with pytest.raises(ValueError, match="neither a file"):
        effusion.utils.load_video(str(tmp_path / "none.mp4"))


def test_foreign_classes_pass_the_gate(tmp_path: Path) -> None:
    from effusion.utils import get_class_from_dynamic_module

    (tmp_path / "mine.py").write_text("import diffusers\nclass Mine(diffusers.ModelMixin):\n    value = 3\n")
    with pytest.raises(UntrustedCode, match="trust_remote_code=True"):
        get_class_from_dynamic_module(str(tmp_path), "mine.py", class_name="Mine")
    found = get_class_from_dynamic_module(str(tmp_path), "mine.py", class_name="Mine", trust_remote_code=True)
    assert found.value == 3 and issubclass(found, effusion.ModelMixin)
    with pytest.raises(UntrustedCode):
        get_class_from_dynamic_module("owner/repository", "mine.py", class_name="Mine")


def test_small_questions_about_the_hub() -> None:
    from diffusers.utils import hub_utils as peer

    from effusion.utils import hub_utils

    commit = "0" * 40
    for path in (None, f"/cache/snapshots/{commit}/config.json", "/cache/snapshots/main/config.json", "/plain/file"):
        assert hub_utils.extract_commit_hash(path) == peer.extract_commit_hash(path)
    assert hub_utils._add_variant("a.b.safetensors", "fp16") == peer._add_variant("a.b.safetensors", "fp16")
    assert hub_utils.http_user_agent({"a": 1}).startswith("effusion/")


def test_helpers_for_tests() -> None:
    from effusion.utils import testing_utils

    assert testing_utils.floats_tensor((2, 3)).shape == (2, 3)
    assert testing_utils.torch_all_close(torch.ones(2), torch.ones(2))
    with pytest.raises(AssertionError, match="largest difference"):
        testing_utils.torch_all_close(torch.ones(2), torch.zeros(2))
    assert testing_utils.numpy_cosine_similarity_distance(np.ones(3), np.ones(3)) == pytest.approx(0)

    @testing_utils.require_torch_multi_gpu
    class Needs:
        pass

    assert getattr(Needs, "__unittest_skip__", False) == (torch.cuda.device_count() < 2)
    with testing_utils.CaptureLogger(log.get_logger("effusion.captured")) as captured:
        log.get_logger("effusion.captured").warning("heard")
    assert captured.out == "heard\n"
