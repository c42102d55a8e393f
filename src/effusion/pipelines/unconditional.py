"""The classic faces of unconditional diffusion on pixels."""

from __future__ import annotations

from typing import Any

from ..families.unconditional import UNCONDITIONAL
from ..schedulers.ddim import DDIMScheduler
from .base import DiffusionPipeline
from .outputs import ImagePipelineOutput


class DDPMPipeline(DiffusionPipeline):
    """Unconditional pictures with the whole reverse process (Ho et al. 2020)."""

    family = UNCONDITIONAL
    output_class = ImagePipelineOutput
    model_cpu_offload_seq = "unet"

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


class DDIMPipeline(DDPMPipeline):
    """Unconditional pictures in fewer steps (Song et al. 2021); ``eta`` = 0 is deterministic."""

    def __init__(self, unet: Any, scheduler: Any) -> None:
        super().__init__(unet, DDIMScheduler.from_config(scheduler.config))

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
