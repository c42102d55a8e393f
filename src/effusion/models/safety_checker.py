"""The safety checker that ships with Stable Diffusion: CLIP similarity to a fixed list of concepts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..core import log
from ..core.optional import require

transformers = require("transformers", "the safety checker")

from transformers import CLIPConfig, CLIPVisionModel, PreTrainedModel  # noqa: E402

logger = log.get_logger(__name__)


class StableDiffusionSafetyChecker(PreTrainedModel):  # type: ignore[misc]
    """Flags pictures whose CLIP embedding is close to one of 17 concepts, and blacks them out.

    Each concept has a threshold; closeness to one of 3 special concepts lowers all of them by 0.01.
    """

    config_class = CLIPConfig
    main_input_name = "clip_input"
    _no_split_modules = ["CLIPEncoderLayer"]
    concept_embeds: Tensor
    special_care_embeds: Tensor
    concept_embeds_weights: Tensor
    special_care_embeds_weights: Tensor

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.vision_model = CLIPVisionModel(config.vision_config)
        self.visual_projection = nn.Linear(config.vision_config.hidden_size, config.projection_dim, bias=False)
        for name, shape in (
            ("concept_embeds", (17, config.projection_dim)),
            ("special_care_embeds", (3, config.projection_dim)),
            ("concept_embeds_weights", (17,)),
            ("special_care_embeds_weights", (3,)),
        ):
            setattr(self, name, nn.Parameter(nn.init.ones_(torch.empty(shape)), requires_grad=False))
        self.post_init()  # type: ignore[no-untyped-call]

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load; published checkpoints nest the vision model once more than transformers 5 does."""
        if int(transformers.__version__.split(".")[0]) >= 5:
            kwargs.setdefault("key_mapping", {r"^vision_model\.vision_model\.": "vision_model."})
        return super().from_pretrained(*args, **kwargs)

    @torch.no_grad()
    def forward(self, clip_input: Tensor, images: Any) -> tuple[Any, list[bool]]:
        """Pictures with the flagged ones black, and the flags.

        Args:
            clip_input: what the feature extractor made of the pictures; (B, 3, 224, 224).
            images: the pictures, a tensor (B, …), an array (B, …) or a list of either.
        """
        embeds = self.visual_projection(self.vision_model(clip_input)[1]).float()
        special = _closeness(embeds, self.special_care_embeds, self.special_care_embeds_weights)
        concepts = _closeness(embeds, self.concept_embeds, self.concept_embeds_weights)
        stricter = (special.round(decimals=3) > 0).any(dim=1, keepdim=True) * 0.01
        flags = ((concepts + stricter).round(decimals=3) > 0).any(dim=1).tolist()
        if any(flags):
            logger.warning("the safety checker blacked out a picture; try another prompt or seed")
            images = images.clone() if torch.is_tensor(images) else images.copy()
            for index, flagged in enumerate(flags):
                if flagged:
                    images[index] = images[index] * 0
        return images, flags


def _closeness(embeds: Tensor, concepts: Tensor, thresholds: Tensor) -> Tensor:
    """Cosine similarity above each concept's threshold; (B, N)."""
    unit = nn.functional.normalize
    return unit(embeds) @ unit(concepts.float()).T - thresholds.float()
