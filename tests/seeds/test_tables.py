"""The tables of the documents: every option that they list is taken, every class that they list is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import effusion

NAME = "runwayml/stable-diffusion-v1-5"

# "Pipeline Loading Options" and "Loading Parameters": option -> a value beside its default
OPTIONS: dict[str, Any] = {
    "torch_dtype": torch.float16,
    "variant": None,
    "use_safetensors": True,
    "local_files_only": False,
    "force_download": True,
    "token": "hf_" + "t" * 34,
    "revision": "main",
    "trust_remote_code": True,
    "use_flash_attention_2": False,
    "device_map": None,
    "max_memory": None,
    "offload_folder": None,
    "low_cpu_mem_usage": True,
    "disable_mmap": True,
}


def test_every_loading_option_is_taken(repositories: Any, tmp_path: Path) -> None:
    pipe = effusion.DiffusionPipeline.from_pretrained(NAME, cache_dir=tmp_path / "elsewhere", **OPTIONS)
    assert pipe.dtype == torch.float16
    assert (tmp_path / "elsewhere").is_dir()


def test_every_loading_option_of_a_model_is_taken(repositories: Any, tmp_path: Path) -> None:
    options = {k: v for k, v in OPTIONS.items() if k != "trust_remote_code"}
    unet = effusion.UNet2DConditionModel.from_pretrained(NAME, subfolder="unet", cache_dir=tmp_path / "c", **options)
    assert unet.dtype == torch.float16


@pytest.mark.parametrize(
    "name",
    [
        # "Key pipeline characteristics", "Common model architectures", "Scheduler Integration", "Model Components"
        "DiffusionPipeline",
        "StableDiffusionPipeline",
        "StableDiffusionXLPipeline",
        "AutoPipeline",
        "UNet2DConditionModel",
        "AutoencoderKL",
        "AutoencoderTiny",
        "Transformer2DModel",
        "ControlNetModel",
        "StableDiffusionSafetyChecker",
        "ConfigMixin",
        "ModelMixin",
        "SchedulerMixin",
        "KarrasDiffusionSchedulers",
        "DDPMScheduler",
        "DDIMScheduler",
        "PNDMScheduler",
        "LMSDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "EulerDiscreteScheduler",
        "EulerAncestralDiscreteScheduler",
        "UniPCMultistepScheduler",
    ],
)
def test_a_class_of_the_tables_is_there(name: str) -> None:
    assert getattr(effusion, name).__name__ == name


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"pretrained_model_name_or_path": "no/such-repository"}, "no/such-repository"),
        ({"pretrained_model_name_or_path": NAME, "revision": "nowhere"}, "nowhere"),
        ({"pretrained_model_name_or_path": NAME, "variant": "fp8"}, "fp8"),
    ],
    ids=["Repository not found", "Revision not found", "Variant not found"],
)
def test_a_failure_of_the_table_names_its_cause(call: dict[str, Any], message: str, repositories: Any) -> None:
    with pytest.raises(OSError, match=message):
        effusion.DiffusionPipeline.from_pretrained(**call)
