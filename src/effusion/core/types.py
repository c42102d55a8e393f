"""The types that flow between networks, blocks, families and pipelines.

Shapes: ``B`` batch, ``L`` tokens, ``D`` width, ``C`` channels, ``F`` frames, ``H``/``W`` latent height and width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Cond:
    """The text or image conditioning of one guidance branch, batched."""

    tokens: Tensor | None = None  # (B, L, D)
    pooled: Tensor | None = None  # (B, D)
    mask: Tensor | None = None  # (B, L)
    extras: Mapping[str, Tensor] = field(default_factory=dict)  # each (B, …)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, ``extras`` under their own."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "extras"}
        return {k: v for k, v in {**own, **self.extras}.items() if v is not None}

    def map(self, function: Any) -> Cond:
        """A copy with ``function`` applied to every tensor."""
        own = {k: None if (v := getattr(self, k)) is None else function(v) for k in ("tokens", "pooled", "mask")}
        return Cond(**own, extras={k: function(v) for k, v in self.extras.items()})

    def to(self, *args: Any, **kwargs: Any) -> Cond:
        return self.map(lambda t: t.to(*args, **kwargs))

    def repeat(self, n: int) -> Cond:
        """Each item ``n`` times in a row: ``(B, …) -> (B * n, …)``."""
        return self.map(lambda t: t.repeat_interleave(n, dim=0)) if n != 1 else self

    @staticmethod
    def cat(conds: Sequence[Cond]) -> Cond:
        """Several branches as one batch, in order."""
        if len(conds) == 1:
            return conds[0]
        names = ("tokens", "pooled", "mask")
        own = {k: None if getattr(conds[0], k) is None else torch.cat([getattr(c, k) for c in conds]) for k in names}
        return Cond(**own, extras={k: torch.cat([c.extras[k] for c in conds]) for k in conds[0].extras})


@dataclass(frozen=True)
class LatentFormat:
    """How pixels and latents of a family relate: a value, not code."""

    channels: int
    downscale: int = 8
    temporal_downscale: int = 1
    scale: float = 1.0
    shift: float = 0.0
    mean: tuple[float, ...] | None = None  # per channel, instead of `shift`
    std: tuple[float, ...] | None = None  # per channel, with `mean`
    frames: bool = False  # whether the VAE's tensors have a frame axis, (B, C, F, h, w), also for pictures

    def normalize(self, z: Tensor) -> Tensor:
        """What the VAE gave -> what the denoiser sees; ``(B, C, …)`` both."""
        if self.mean is not None and self.std is not None:
            mean, std = self._per_channel(z)
            return (z - mean) * self.scale / std
        return (z - self.shift) * self.scale if self.shift else z * self.scale

    def denormalize(self, z: Tensor) -> Tensor:
        """What the denoiser made -> what the VAE decodes; ``(B, C, …)`` both."""
        if self.mean is not None and self.std is not None:
            mean, std = self._per_channel(z)
            return z * std / self.scale + mean
        return z / self.scale + self.shift if self.shift else z / self.scale

    def _per_channel(self, z: Tensor) -> tuple[Tensor, Tensor]:
        shape = (1, -1, *([1] * (z.ndim - 2)))
        return torch.tensor(self.mean).view(shape).to(z), torch.tensor(self.std).view(shape).to(z)


@dataclass(frozen=True)
class Schedule:
    """The noise levels of one run: ``sigmas`` has one more entry than ``timesteps`` (the end)."""

    sigmas: Tensor  # (S + 1,)
    timesteps: Tensor  # (S,)
    prediction_type: str = "epsilon"


@dataclass(frozen=True)
class ModelInput:
    """Everything that a denoising network may be given; a family's ``call`` takes what it has ports for."""

    x: Tensor  # (B, C, H, W), (B, C, F, H, W) or packed (B, L, C)
    t: Tensor  # () or (B,)
    cond: Cond
    channels: Tensor | None = None  # concatenated to x's channels by the family: inpaint, Fill, depth
    tokens: Tensor | None = None  # concatenated to x's tokens: Kontext, edit, reference
    residuals: Mapping[str, Any] = field(default_factory=dict)  # ControlNet, T2I-Adapter
    image_tokens: Any = None  # IP-Adapter
    guidance: Tensor | None = None  # (B,) or (B, D): guidance as an input of a distilled network
    positions: Mapping[str, Any] = field(default_factory=dict)  # where tokens are; the same objects all run
    skip_layers: tuple[int, ...] | None = None  # blocks to leave out: skip-layer guidance
    attention: Mapping[str, Any] | None = None  # `cross_attention_kwargs` / `joint_attention_kwargs`

    def replace(self, **changes: Any) -> ModelInput:
        return replace(self, **changes)


@dataclass
class State:
    """What passes from block to block during one run.

    Arguments of the call that share a name with a field start in that field; every other argument,
    and what other people's blocks return, is in ``user``.
    """

    batch: int | None = None  # images to make: prompts x images per prompt
    height: int | None = None  # pixels
    width: int | None = None  # pixels
    guide: bool | None = None  # whether there is a negative branch
    conds: dict[str, Cond] | None = None  # guidance branch -> its conditioning, in batch order
    timesteps: Any = None  # (S,)
    image: Any = None  # what the caller gave, then pixels (B, 3, H, W) in [-1, 1]
    mask: Tensor | None = None  # (B, 1, h, w) at the size of the latents; 1 = paint here
    latents: Tensor | None = None  # (B, C, h, w)
    noise: Tensor | None = None  # like latents
    image_latents: Tensor | None = None  # like latents
    channels: Tensor | None = None  # extra input channels of the network (B, C', h, w)
    tokens: Tensor | None = None  # extra input tokens of the network (B, L', C)
    guidance: Tensor | None = None  # embedded guidance of a distilled network
    positions: dict[str, Any] | None = None  # ids or shapes of tokens, for rotary embeddings
    guider: Any = None  # combines the predictions of the branches
    control: Any = None  # (ModelInput, part of the steps done, part done after this one) -> residuals
    denoised: Tensor | None = None  # the last step's estimate of the clean latents
    images: Any = None  # the result, in the form that was asked for
    interrupted: bool = False  # set by a consumer to stop denoising after the current step
    user: dict[str, Any] = field(default_factory=dict)

    def update(self, values: Mapping[str, Any]) -> None:
        """Store ``values``, each in its field or in ``user``."""
        for name, value in values.items():
            if name in _STATE_FIELDS:
                setattr(self, name, value)
            else:
                self.user[name] = value

    def get(self, name: str, default: Any = None) -> Any:
        """The value called ``name``, or ``default``."""
        return getattr(self, name) if name in _STATE_FIELDS else self.user.get(name, default)


_STATE_FIELDS = frozenset(f.name for f in fields(State)) - {"user"}


@dataclass
class Step:
    """One finished denoising step, as the loop hands it to its consumers; they may change ``state``."""

    index: int
    timestep: Tensor
    total: int
    state: State
