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


@dataclass
class SkipLayer(ClassifierFree):
    """Classifier-free guidance, and away from what the network predicts without some layers (SD 3.5, 2024).

    Between the parts ``start`` and ``stop`` of the steps the positive branch is predicted once more.
    """

    layers: tuple[int, ...] = ()
    skip_scale: float = 2.8
    start: float = 0.01
    stop: float = 0.2

    def __call__(self, predict: Predict, conds: dict[str, Cond], progress: float = 0.0) -> Tensor:
        if not self.start < progress < self.stop or "negative" not in conds:
            return super().__call__(predict, conds, progress)
        negative, positive = predict([conds["negative"], conds["positive"]])
        without = predict([conds["positive"]], skip_layers=self.layers)[0]
        return negative + self.scale * (positive - negative) + self.skip_scale * (positive - without)


@dataclass
class NormPreserving(ClassifierFree):
    """Classifier-free guidance whose result keeps the positive prediction's norm along the last axis."""

    def __call__(self, predict: Predict, conds: dict[str, Cond], progress: float = 0.0) -> Tensor:
        if "negative" not in conds:
            return predict([conds["positive"]])[0]
        positive, negative = predict([conds["positive"], conds["negative"]])
        guided = negative + self.scale * (positive - negative)
        return guided * (positive.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))  # type: ignore[no-any-return]


def rescale_noise(guided: Tensor, positive: Tensor, amount: float) -> Tensor:
    """Pull the standard deviation of ``guided`` towards that of ``positive`` by ``amount`` in 0..1."""
    axes = list(range(1, positive.ndim))
    matched = guided * (positive.std(dim=axes, keepdim=True) / guided.std(dim=axes, keepdim=True))
    return amount * matched + (1 - amount) * guided


def rescale_noise_cfg(noise_cfg: Tensor, noise_pred_text: Tensor, guidance_rescale: float = 0.0) -> Tensor:
    """:func:`rescale_noise` under the ecosystem's name."""
    return rescale_noise(noise_cfg, noise_pred_text, guidance_rescale)
