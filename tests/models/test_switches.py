"""Switches and class methods that every network has: what is built works, the rest says what to use."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from effusion.models.autoencoders.vae import AutoencoderMixin

import effusion
from effusion.core.errors import NotBuilt

TINY = {"block_out_channels": (8,), "norm_num_groups": 4, "down_block_types": ("DownEncoderBlock2D",)}
TINY |= {"up_block_types": ("UpDecoderBlock2D",)}


@pytest.fixture
def model() -> effusion.AutoencoderKL:
    return effusion.AutoencoderKL(**TINY)


def test_kernels_of_other_devices(model: effusion.AutoencoderKL) -> None:
    model.disable_npu_flash_attention()
    model.disable_xla_flash_attention()
    for switch, said in (
        (model.enable_npu_flash_attention, "torch_npu"),
        (model.enable_xla_flash_attention, "torch_xla"),
    ):
        with pytest.raises(NotBuilt, match=rf"{said}.*not built yet; .*set_attention_backend"):
            switch()
    with pytest.raises(NotBuilt, match="device_map"):
        model.enable_parallelism(config=None)
    with pytest.raises(TypeError):
        model.enable_parallelism(None)


def test_autoencoders_have_the_mixin(model: effusion.AutoencoderKL) -> None:
    assert isinstance(model, AutoencoderMixin)
    model.enable_tiling()
    model.enable_slicing()
    assert model.use_tiling and model.use_slicing
    qwen = effusion.AutoencoderKLQwenImage(base_dim=4, z_dim=2, dim_mult=[1], temperal_downsample=[])
    qwen.clear_cache()
    assert isinstance(qwen, AutoencoderMixin)


def test_a_class_is_registered_for_the_auto_class(tmp_path: Path) -> None:
    code = "import diffusers\nfrom diffusers.configuration_utils import register_to_config\n\n\n"
    code += "class Mine(diffusers.ModelMixin):\n    @register_to_config\n    def __init__(self, a: int = 1):\n"
    code += "        super().__init__()\n        import torch\n        self.lin = torch.nn.Linear(a, a)\n"
    (tmp_path / "mine.py").write_text(code)
    from effusion.utils import get_class_from_dynamic_module

    cls = get_class_from_dynamic_module(str(tmp_path), "mine.py", class_name="Mine", trust_remote_code=True)
    cls.register_for_auto_class()
    cls(a=2).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == {"AutoModel": "mine.Mine"}
    loaded = effusion.AutoModel.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(loaded).__name__ == "Mine" and loaded.config.a == 2
    with pytest.raises(ValueError, match="AutoModel only"):
        cls.register_for_auto_class("AutoPipeline")
    assert effusion.AutoencoderKL._auto_class is None
