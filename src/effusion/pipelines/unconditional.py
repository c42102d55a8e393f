"""The classic faces of unconditional diffusion on pixels."""

from __future__ import annotations

from typing import Any

from ..families.unconditional import UNCONDITIONAL
from ..schedulers.ddim import DDIMScheduler
from .base import DiffusionPipeline
from .outputs import ImagePipelineOutput


class UnconditionalBase(DiffusionPipeline):
    """What the faces of unconditional diffusion share."""

    family = UNCONDITIONAL
    output_class = ImagePipelineOutput
    model_cpu_offload_seq = "unet"


class DDPMPipeline(UnconditionalBase):
    """Unconditional pictures with the whole reverse process (Ho et al. 2020)."""

    def __init__(self, unet: Any, scheduler: Any) -> None:
        super().__init__()
        self._register(locals())

    def __call__(
        self,
        batch_size: int = 1,
        generator: Any = None,
        num_inference_steps: int = 1000,
        output_type: str | None = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Make ``batch_size`` pictures."""
        return self._generate(locals())


class DDIMPipeline(UnconditionalBase):
    """Unconditional pictures in fewer steps (Song et al. 2021); ``eta`` = 0 is deterministic."""

    def __init__(self, unet: Any, scheduler: Any) -> None:
        super().__init__()
        scheduler = DDIMScheduler.from_config(scheduler.config)
        self._register(locals())

    def __call__(
        self,
        batch_size: int = 1,
        generator: Any = None,
        eta: float = 0.0,
        num_inference_steps: int = 50,
        use_clipped_model_output: bool | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Make ``batch_size`` pictures."""
        return self._generate(locals())
