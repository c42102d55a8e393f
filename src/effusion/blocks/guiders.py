"""What is done with the predictions of several guidance branches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..core.types import Cond

Predict = Callable[..., Sequence[Tensor]]  # (branches, **changes to the ModelInput) -> a prediction each


@dataclass
class ClassifierFree:
    """Classifier-free guidance (Ho & Salimans 2022), with the rescaling of Lin et al. 2023, section 3.4."""

    scale: float
    rescale: float = 0.0

    def __call__(self, predict: Predict, conds: dict[str, Cond], progress: float = 0.0) -> Tensor:
        """Predict each branch and combine: ``negative + scale * (positive - negative)``.

        ``progress`` is the part of the steps that is done, in 0..1.
        """
        if "negative" not in conds:
            return predict([conds["positive"]])[0]
        negative, positive = predict([conds["negative"], conds["positive"]])
        guided = negative + self.scale * (positive - negative)
        return rescale_noise(guided, positive, self.rescale) if self.rescale > 0 else guided


def rescale_noise(guided: Tensor, positive: Tensor, amount: float) -> Tensor:
    """Pull the standard deviation of ``guided`` towards that of ``positive`` by ``amount`` in 0..1."""
    axes = list(range(1, positive.ndim))
    matched = guided * (positive.std(dim=axes, keepdim=True) / guided.std(dim=axes, keepdim=True))
    return amount * matched + (1 - amount) * guided
