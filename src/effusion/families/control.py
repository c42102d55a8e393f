"""Control networks (ControlNet, Zhang et al. 2023) beside a denoiser: what they add to its blocks, step by step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..blocks.latents import encode_pixels
from ..core.random import Generators
from ..core.types import ModelInput

Residuals = Mapping[str, Any]


@dataclass
class Control:
    """One or several control networks during a run; the ``control`` of :class:`~effusion.core.types.State`.

    Where none of them acts they are not asked: what they would give is multiplied by zero.

    Attributes:
        call: ``(ModelInput, strengths) -> residuals``, the family's way to ask its network.
        scales: strength of each network.
        starts, ends: the part of the steps, in 0..1, during which each acts.
        several: whether the network is a list of networks, whose strengths are a list.
        once: whether all branches of a step get what the first of them was given.
    """

    call: Callable[[ModelInput, Any], Residuals]
    scales: list[float]
    starts: list[float]
    ends: list[float]
    several: bool = False
    once: bool = False
    _last: tuple[float, Residuals] | None = field(default=None, repr=False)

    def __call__(self, inputs: ModelInput, begins: float, ends: float) -> Residuals:
        if self.once and self._last is not None and self._last[0] == begins:
            return self._last[1]
        rows = zip(self.scales, self.starts, self.ends, strict=True)
        scales = [scale * float(not (begins < start or ends > end)) for scale, start, end in rows]
        found = self.call(inputs, scales if self.several else scales[0]) if any(scales) else {}
        if self.once:
            self._last = (begins, found)
        return found


def control_of(
    model: Any,
    call: Callable[[ModelInput, Any], Residuals],
    images: int,
    scale: float | list[float],
    start: float | list[float],
    end: float | list[float],
    once: bool = False,
) -> Control:
    """A :class:`Control` from the arguments of a call, single values standing for every network.

    Raises:
        ValueError: lists of something else than numbers, or whose length is not the number of networks, or a range that
            ends before it starts.
    """
    several = hasattr(model, "nets")
    count = images if several else 1
    lists = [list(v) if isinstance(v, (list, tuple)) else [v] * count for v in (scale, start, end)]
    names = "`controlnet_conditioning_scale`, `control_guidance_start` and `control_guidance_end`"
    if any(len(values) != count for values in lists):
        raise ValueError(
            f"{count} control networks: {names} have {[len(v) for v in lists]} values; give one, or one for each"
        )
    if strange := [v for values in lists for v in values if not isinstance(v, Real)]:
        raise ValueError(f"{names} are numbers or lists of numbers, not {strange}")
    for first, last in zip(lists[1], lists[2], strict=True):
        if not 0 <= first < last <= 1:
            raise ValueError(f"a control network can't act from {first} to {last}; give 0 <= start < end <= 1")
    return Control(call, lists[0], lists[1], lists[2], several=several, once=once)


def pictures_by_network(model: Any, image: Any, name: str) -> list[Any]:
    """The control picture(s) of each network; rows with a picture for each of them become columns.

    Raises:
        ValueError: ``image``, which callers know as ``name``, is missing, or is not as many pictures as networks.
    """
    if image is None:
        raise ValueError(f"`{name}` is missing: the picture to follow, a tensor, or a list of them")
    nets = getattr(model, "nets", None)
    if nets is None:
        return [image]
    if not isinstance(image, (list, tuple)):
        given = type(image).__name__
        raise ValueError(
            f"{len(nets)} control networks: `{name}` has to be a list with a picture for each, got {given}"
        )
    if len(image) and all(isinstance(row, (list, tuple)) and len(row) == len(nets) for row in image):
        return [list(column) for column in zip(*image, strict=True)]
    if len(image) != len(nets) or any(isinstance(row, (list, tuple)) for row in image):
        raise ValueError(
            f"{len(nets)} control networks, `{name}` is a list of {len(image)}: give a picture for each network, or a "
            "list of these for each prompt"
        )
    return list(image)


def control_pixels(
    image: Any, image_processor: Any, height: int, width: int, batch: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """One control picture (or one per prompt) as pixels for the whole batch; (B, 3, H, W)."""
    if image is None:
        raise ValueError("`control_image` is missing: a picture, a tensor, or a list of them")
    pixels = image if torch.is_tensor(image) else image_processor.preprocess(image, height=height, width=width)
    repeats = batch if pixels.shape[0] == 1 else batch // pixels.shape[0]
    return pixels.repeat_interleave(repeats, dim=0).to(device=device, dtype=dtype)


def control_latents(family: Any, vae: Any, pixels: Tensor, generator: Generators) -> Tensor:
    """The latents of a control picture, of the whole batch by one generator."""
    return encode_pixels(family, vae, pixels, generator[0] if isinstance(generator, (list, tuple)) else generator)
