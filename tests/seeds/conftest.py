"""The machine that the snippets were written for, made of what is there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from . import standins


class Here(TorchFunctionMode):
    """``cuda`` means the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*map(_here, args), **{k: _here(v) for k, v in (kwargs or {}).items()})


def _here(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("cpu") if value.type == "cuda" else value
    return "cpu" if isinstance(value, str) and value.split(":")[0] == "cuda" else value


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty current folder, and a GPU or something that answers to its name."""
    monkeypatch.chdir(tmp_path)
    grad = torch.is_grad_enabled()
    if torch.cuda.is_available():
        yield tmp_path
    else:
        plain = torch.autocast

        class Autocast(plain):  # type: ignore[misc, valid-type]
            def __init__(self, device_type: str, dtype: torch.dtype | None = None, **kwargs: Any) -> None:
                dtype = torch.float16 if device_type == "cuda" and dtype is None else dtype  # a GPU's default
                super().__init__(_here(device_type), dtype, **kwargs)

        monkeypatch.setattr(torch, "autocast", Autocast)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
        with Here():
            yield tmp_path
    torch.set_grad_enabled(grad)


@pytest.fixture
def repositories(hub: Any, machine: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The repositories that the snippets name, on a hub on the loopback, and a token for `use_auth_token=True`."""
    monkeypatch.setenv("HF_TOKEN", hub.token)
    sd = standins.stable_diffusion()
    for name in (
        "runwayml/stable-diffusion-v1-5",
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "CompVis/stable-diffusion-v1-4",
    ):
        hub.add(name, sd)
    hub.add("CompVis/stable-diffusion-v1-4", standins.stable_diffusion_half(), ref="fp16")
    hub.add("lllyasviel/sd-controlnet-canny", standins.controlnet())
    hub.add("diffusers/community-pipeline", standins.stable_diffusion_variant("v1"))
    hub.add("stabilityai/stable-diffusion-xl-base-1.0", standins.stable_diffusion_xl())
    hub.add("username/sdxl-unet-sharded", standins.sharded_xl_unet())
    hub.add("black-forest-labs/FLUX.1-dev", standins.flux_transformer())
    hub.add("black-forest-labs/FLUX.1-schnell", standins.flux())
    hub.add("some/model-with-custom-code", standins.with_code())
    hub.add("owner/custom-pipeline", sd)
    hub.add("hf-internal-testing/diffusers-dummy-pipeline", {"pipeline.py": standins.CUSTOM.encode()})
    return hub
