"""What control networks share (Zhang et al., 2023): layers that start at zero, and the picture that controls."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn


def zero_module(module: nn.Module) -> nn.Module:
    """``module`` with all weights set to zero: at first it adds nothing."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def copy_weights(target: nn.Module, source: nn.Module) -> None:
    """Fill ``target`` from ``source``, which may have more blocks."""
    state = source.state_dict()
    target.load_state_dict({name: state[name] for name in target.state_dict()})


def scaled(layers: Iterable[nn.Module], samples: Iterable[Tensor], scale: float) -> list[Tensor] | None:
    """Each sample through its layer, times ``scale``; ``None`` if there are none."""
    return [layer(sample) * scale for layer, sample in zip(layers, samples, strict=True)] or None


def summed(parts: Iterable[Sequence[Tensor] | None]) -> list[Tensor] | None:
    """Samples of several networks added up; ``None`` if none of them has any."""
    given = [part for part in parts if part is not None]
    return [sum(same[1:], same[0]) for same in zip(*given, strict=True)] or None


class ControlNetConditioningEmbedding(nn.Module):
    """A picture as features of an eighth of its size: ``(B, C, H, W) -> (B, C', H / 8, W / 8)``.

    Args:
        block_out_channels: widths; height and width are halved between two of them.
    """

    def __init__(
        self,
        conditioning_embedding_channels: int,
        conditioning_channels: int = 3,
        block_out_channels: Sequence[int] = (16, 32, 96, 256),
    ) -> None:
        super().__init__()
        widths = block_out_channels
        self.conv_in = nn.Conv2d(conditioning_channels, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for before, after in pairwise(widths):
            self.blocks.append(nn.Conv2d(before, before, 3, padding=1))
            self.blocks.append(nn.Conv2d(before, after, 3, padding=1, stride=2))
        self.conv_out = zero_module(nn.Conv2d(widths[-1], conditioning_embedding_channels, 3, padding=1))

    def forward(self, conditioning: Tensor) -> Tensor:
        x = F.silu(self.conv_in(conditioning))
        for block in self.blocks:
            x = F.silu(block(x))
        return self.conv_out(x)  # type: ignore[no-any-return]
