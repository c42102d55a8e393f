"""The noise of one Brownian path: a step that is cut in halves gets noise that adds up to the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.optional import require


class BrownianNoise:
    """Standard normal noise between noise levels, from a Brownian path in σ that the seed determines.

    A list of seeds gives each item of the batch its own path.

    Raises:
        MissingExtra: ``torchsde`` is not installed.
        ValueError: as many seeds as the batch has items are needed.
    """

    def __init__(
        self, like: Tensor, sigma_min: float, sigma_max: float, seed: int | Sequence[int] | None = None
    ) -> None:
        torchsde = require("torchsde", "a sampler with Brownian noise")
        self.batched = isinstance(seed, Sequence)
        if seed is None:
            seed = int(torch.randint(0, 2**63 - 1, []).item())
        seeds = list(seed) if isinstance(seed, Sequence) else [seed]
        if self.batched and len(seeds) != like.shape[0]:
            raise ValueError(f"{len(seeds)} noise seeds for a batch of {like.shape[0]}: give one, or one for each item")
        self.paths = [
            torchsde.BrownianInterval(
                t0=torch.as_tensor(sigma_min),
                t1=torch.as_tensor(sigma_max),
                size=like.shape[1:] if self.batched else like.shape,
                dtype=like.dtype,
                device=like.device,
                entropy=entropy,
                tol=1e-6,
                pool_size=24,
                halfway_tree=True,
                cache_size=100,  # a path down the tree and its turns: with fewer, most noise is drawn twice
            )
            for entropy in seeds
        ]

    def __call__(self, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        """Noise of the step from ``sigma`` to ``sigma_next`` (0-d); shaped as the sample."""
        low, high = (sigma, sigma_next) if sigma < sigma_next else (sigma_next, sigma)
        scale = 1 / float((high - low).sqrt())
        steps = [path(low, high) * (scale if sigma < sigma_next else -scale) for path in self.paths]
        return torch.stack(steps) if self.batched else steps[0]


class BrownianTreeNoiseSampler(BrownianNoise):
    """:class:`BrownianNoise` under the ecosystem's name and arguments, along ``transform(σ)``."""

    def __init__(
        self,
        x: Tensor,
        sigma_min: float,
        sigma_max: float,
        seed: int | list[int] | None = None,
        transform: Callable[[Any], Any] = lambda x: x,
    ) -> None:
        self.transform = transform
        ends = sorted(float(transform(torch.as_tensor(sigma))) for sigma in (sigma_min, sigma_max))
        super().__init__(x, ends[0], ends[1], seed)

    def __call__(self, sigma: Any, sigma_next: Any) -> Tensor:
        """Noise of the step from ``sigma`` to ``sigma_next``; shaped as ``x``."""
        return super().__call__(*(self.transform(torch.as_tensor(s)) for s in (sigma, sigma_next)))
