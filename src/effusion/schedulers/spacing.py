"""Which noise levels a run visits: timestep spacings and transforms of the noise levels.

Arrays are NumPy's, in float64 unless the levels come from a float32 table; descending in noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from ..core.optional import require
from .noise import Array

SPACINGS = ("linspace", "leading", "trailing")


def timesteps(spacing: str, steps: int, train: int, offset: int = 0, *, last: int | None = None, extra: int = 0,
              rounded: bool = True) -> Array:  # fmt: skip
    """``steps`` descending timesteps out of ``train``, as in table 2 of Lin et al. (2024). Float64, ``(steps,)``.

    Args:
        last: timesteps from here on are not visited (the noisy end is clipped).
        extra: points to lay out beyond the clean end and leave out again.
        rounded: whether ``linspace`` keeps to whole timesteps.

    Raises:
        ValueError: the spacing has another name, or there are too few timesteps.
    """
    last = train if last is None else last
    if not 1 <= steps <= train:
        raise ValueError(
            f"num_inference_steps={steps!r}: the network knows num_train_timesteps={train} noise levels; "
            f"choose 1 to {train}"
        )
    extra = min(extra, max(last - steps, 0))  # a timestep is visited once
    if steps > last:
        raise ValueError(f"num_inference_steps={steps}: lambda_min_clipped leaves {last} timesteps; take fewer steps")
    if spacing == "linspace":
        spread = np.linspace(0, last - 1, steps + extra)
        return np.asarray((spread.round() if rounded else spread)[::-1][:steps])
    if spacing == "leading":
        return np.asarray((np.arange(steps + extra) * (last // (steps + extra)))[::-1][:steps] + float(offset))
    if spacing == "trailing":
        return np.round(np.arange(last, 0, -train / steps))[:steps] - 1.0
    raise ValueError(f"timestep_spacing={spacing!r}: choose one of {', '.join(SPACINGS)}")


def rising(spacing: str, steps: int, train: int, noisiest: int, offset: int = 0) -> Array:
    """``steps`` rising timesteps up to below ``noisiest``, for inversion. Float64, ``(steps,)``."""
    if not 1 <= steps <= noisiest:
        raise ValueError(f"num_inference_steps={steps!r}: an inverted run of {train} timesteps has 1 to {noisiest}")
    if spacing == "linspace":
        return np.asarray(np.linspace(0, noisiest, steps + 1).round()[:-1])
    if spacing == "leading":
        return np.asarray(np.arange(steps) * ((noisiest + 1) // (steps + 1)) + float(offset))
    if spacing == "trailing":
        return np.asarray(np.arange(noisiest + 1, 0, -train / steps).round()[:steps][::-1] - 1.0)
    raise ValueError(f"timestep_spacing={spacing!r}: choose one of {', '.join(SPACINGS)}")


def karras(sigma_min: float, sigma_max: float, steps: int, rho: float = 7.0) -> Array:
    """Karras et al. (2022), "Elucidating the Design Space of Diffusion-Based Generative Models", eq. 5."""
    ramp = np.linspace(0, 1, steps)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return np.asarray((high + ramp * (low - high)) ** rho)


def exponential(sigma_min: float, sigma_max: float, steps: int) -> Array:
    """Noise levels evenly spaced in their logarithm."""
    return np.exp(np.linspace(math.log(sigma_max), math.log(sigma_min), steps))


def beta(sigma_min: float, sigma_max: float, steps: int, alpha: float = 0.6, beta: float = 0.6) -> Array:
    """Noise levels at the quantiles of a Beta distribution: Lee et al. (2024), "Beta Sampling is All You Need"."""
    quantile = require("scipy.stats", "the option use_beta_sigmas").beta.ppf
    return np.asarray(sigma_min + quantile(1 - np.linspace(0, 1, steps), alpha, beta) * (sigma_max - sigma_min))


def lu(log_sigma_min: float, log_sigma_max: float, steps: int) -> Array:
    """Evenly spaced half log-SNR: Lu et al. (2022), "DPM-Solver", section 4.2 (ρ = 1)."""
    return np.exp(log_sigma_max + np.linspace(0, 1, steps) * (log_sigma_min - log_sigma_max))


def flow(sigma_max: float, sigma_min: float, steps: int) -> Array:
    """Evenly spaced flow-matching levels."""
    return np.linspace(sigma_max, sigma_min, steps)


def shift(sigmas: Any, by: float) -> Any:
    """Static shift of flow-matching levels: Esser et al. (2024), "Scaling Rectified Flow Transformers", eq. 23."""
    return by * sigmas / (1 + (by - 1) * sigmas)


def shift_exponential(mu: float, sigma: float, t: Any) -> Any:
    """Resolution-dependent shift with ``exp(mu)``; the limit at ``t = 0`` is 0."""
    return math.exp(mu) / (math.exp(mu) + (1 / t - 1) ** sigma)


def shift_linear(mu: float, sigma: float, t: Any) -> Any:
    """Resolution-dependent shift with ``mu`` itself."""
    return mu / (mu + (1 / t - 1) ** sigma)


def stretch_to_terminal(t: Any, terminal: float) -> Any:
    """Stretch flow levels so that the last of them is ``terminal``: the LTX-Video schedule."""
    rest = 1 - t
    return 1 - rest / (rest[-1] / (1 - terminal))


def sigma_to_t(sigmas: Any, log_sigmas: Array) -> Array:
    """The (fractional) timesteps that have these noise levels, by interpolation in ``log σ`` of the training table."""
    logs = np.log(np.maximum(np.asarray(sigmas, dtype=np.float64), 1e-10))
    return np.interp(logs, log_sigmas.astype(np.float64), np.arange(len(log_sigmas)))


def check_descending(name: str, values: Sequence[float] | Array, below: float | None = None) -> None:
    """Raise :class:`ValueError` unless ``values`` fall strictly and stay below ``below``."""
    listed = [float(v) for v in values]
    if not listed:
        raise ValueError(f"`{name}` is empty; give at least one value")
    for i, (a, b) in enumerate(pairwise(listed)):
        if not b < a:
            raise ValueError(f"`{name}` must be in descending order, but entry {i + 1} ({b:g}) follows {a:g}")
    if below is not None and listed[0] >= below:
        raise ValueError(f"`{name}` starts at {listed[0]:g}, but must stay below num_train_timesteps={below:g}")
