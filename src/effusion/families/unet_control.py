"""How control networks of UNets are asked at each step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.types import ModelInput, State


@dataclass
class Ask:
    """Asks control networks of UNets; the pictures are those of the state, where callbacks may replace them.

    Attributes:
        name: of the pictures in the state.
        several: whether there is a list of pictures.
        guess: whether only the positive branch is asked about; the other one gets zeros.
        batch: images of a branch.
    """

    network: Any
    state: State
    name: str
    several: bool
    guess: bool
    batch: int

    def __call__(self, inputs: ModelInput, scales: float | list[float]) -> dict[str, Any]:
        total, cond = inputs.x.shape[0], inputs.cond
        rows = min(total, self.batch) if self.guess else total
        pictures = self.state.get(self.name)
        seen = [_last(p, rows) for p in (pictures if self.several else [pictures])]
        added = None
        if "time_ids" in cond.extras:
            added = {"text_embeds": _last(cond.pooled, rows), "time_ids": _last(cond.extras["time_ids"], rows)}
        down, mid = self.network(
            _last(inputs.x, rows),
            inputs.t,
            encoder_hidden_states=_last(cond.tokens, rows),
            controlnet_cond=seen if self.several else seen[0],
            conditioning_scale=scales,
            guess_mode=self.guess,
            added_cond_kwargs=added,
            return_dict=False,
        )
        if rows < total:
            down, mid = tuple(_after_zeros(d, total) for d in down), _after_zeros(mid, total)
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}


def _last(x: Any, rows: int) -> Any:
    """The last ``rows`` of ``x``, which are the positive branch's; ``x`` itself where that is all."""
    return x if x is None or x.shape[0] == rows else x[-rows:]


def _after_zeros(x: Tensor, rows: int) -> Tensor:
    return torch.cat([x.new_zeros(rows - x.shape[0], *x.shape[1:]), x])
