"""A whole family in one file: a network, a record and a face. The walk-through of CONTRIBUTING.md.

The "model" knows one thing, the colours of its palette: asked for a colour, its data set is the single
picture that is that colour everywhere. For such a data set the perfect denoiser is a formula, so the
family works without training, and everything else about it is as real as in FLUX: it loads, saves,
samples with any scheduler, does image2image and inpainting, and runs under every memory policy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from effusion import DDIMScheduler, DiffusionPipeline, ModelMixin
from effusion.blocks.decode import check_output_type
from effusion.blocks.text import as_list
from effusion.blocks.timesteps import check_strength
from effusion.core import registry
from effusion.core.config import ConfigMixin, register_to_config
from effusion.core.types import Cond, ModelInput
from effusion.families.base import Family, predict
from effusion.pipelines.outputs import ImagePipelineOutput

PALETTE = {"red": (1.0, -1.0, -1.0), "green": (-1.0, 1.0, -1.0), "blue": (-1.0, -1.0, 1.0)}


# 1. The network: a ModelMixin whose configuration is the arguments of __init__, whose forward predicts.
class ColourField(ModelMixin, ConfigMixin):
    """Predicts the noise in a picture that is one colour of the palette everywhere."""

    @register_to_config
    def __init__(self, in_channels: int = 3, num_colours: int = 3, sample_size: int = 16) -> None:
        super().__init__()
        self.palette = nn.Embedding(num_colours, in_channels)
        self.register_buffer("alphas", DDIMScheduler().alphas_cumprod.clone())

    def forward(self, sample: Tensor, timestep: Tensor, colour: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        """``(B, 3, H, W), (), (B,)`` -> the noise ``(x - sqrt(a) x0) / sqrt(1 - a)``, like ``sample``."""
        a = self.alphas[timestep.long()]
        x0 = self.palette(colour)[:, :, None, None]  # (B, 3, 1, 1)
        return ((sample - a.sqrt() * x0) / (1 - a).sqrt(),)


# 2. The record: how a call is checked, how a prompt becomes conditioning, how the network is called.
def check(
    components: Mapping[str, Any],
    prompt: str | list[str],
    height: int | None = None,
    width: int | None = None,
    strength: float | None = None,
    output_type: str = "pil",
) -> dict[str, Any]:
    """Every prompt is a colour of the palette; the size is the network's unless given."""
    unknown = [text for text in as_list(prompt) if text not in PALETTE]
    if unknown:
        raise ValueError(f"`prompt` has to be one of {list(PALETTE)}, got {unknown}")
    check_output_type(output_type)
    if strength is not None:
        check_strength(strength)
    side = components["field"].config.sample_size
    return {"batch": len(as_list(prompt)), "height": height or side, "width": width or side, "guide": False}


def encode(prompt: str | list[str], device: torch.device) -> dict[str, Any]:
    """The index of each prompt's colour."""
    indices = [list(PALETTE).index(text) for text in as_list(prompt)]
    return {"conds": {"positive": Cond(extras={"colour": torch.tensor(indices, device=device)})}}


def call(field: Any, inputs: ModelInput) -> Tensor:
    """The only place that knows the names of the network's arguments."""
    return predict(field, inputs.x, inputs.t, colour=inputs.cond.extras["colour"])


TOY = Family(
    name="Toy",
    denoiser="field",
    check=check,
    encode=encode,
    call=call,
    defaults={
        "text2image": {"num_inference_steps": 10},
        "image2image": {"strength": 0.5},
        "inpaint": {"strength": 1.0},
    },
)


# 3. The face: a real signature, no logic.
class ToyPipeline(DiffusionPipeline):
    """Pictures of one colour."""

    family = TOY
    output_class = ImagePipelineOutput
    model_cpu_offload_seq = "field"

    def __init__(self, field: Any, scheduler: Any) -> None:
        super().__init__()
        self._register(locals())

    def __call__(
        self,
        prompt: str | list[str],
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 10,
        generator: Any = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """A picture for each of ``prompt``."""
        return self._generate(locals())


# 4. The names, so that files can mention them.
registry.MODULES[__name__] = ("ColourField", "ToyPipeline")


def make() -> ToyPipeline:
    """The pipeline with its palette filled in."""
    field = ColourField()
    field.palette.weight.data = torch.tensor(list(PALETTE.values()))
    return ToyPipeline(field.eval(), DDIMScheduler(clip_sample=False, set_alpha_to_one=True))
