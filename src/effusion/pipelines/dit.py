"""The classic face of DiT."""

from __future__ import annotations

from typing import Any

from ..families.dit import DIT
from .base import DiffusionPipeline
from .outputs import ImagePipelineOutput


class DiTPipeline(DiffusionPipeline):
    """Pictures of ImageNet classes."""

    family = DIT
    output_class = ImagePipelineOutput
    model_cpu_offload_seq = "transformer->vae"

    def __init__(
        self, transformer: Any, vae: Any, scheduler: Any, id2label: dict[int | str, str] | None = None
    ) -> None:
        super().__init__()
        self._register(locals())
        self.labels: dict[str, int] = {}
        for index, names in (id2label or {}).items():
            self.labels |= {name.strip(): int(index) for name in names.split(",")}
        self.labels = dict(sorted(self.labels.items()))

    def get_label_ids(self, label: str | list[str]) -> list[int]:
        """The class indices of names such as ``"white shark"``.

        Raises:
            ValueError: a name that the checkpoint doesn't list.
        """
        names = [label] if isinstance(label, str) else list(label)
        unknown = [name for name in names if name not in self.labels]
        if unknown:
            raise ValueError(f"no class is called {unknown}; the classes are {sorted(self.labels)[:20]}, …")
        return [self.labels[name] for name in names]

    def __call__(
        self,
        class_labels: Any,
        guidance_scale: float = 4.0,
        generator: Any = None,
        num_inference_steps: int = 50,
        output_type: str | None = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Make one picture for each of ``class_labels``."""
        return self._generate(locals())
