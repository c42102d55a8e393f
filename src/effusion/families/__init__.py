"""Floor 4: one record per family, binding networks to blocks."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .base import Family

# name on the command line and in tables -> (module, record)
FAMILIES: dict[str, tuple[str, str]] = {
    "stable-diffusion": ("stable_diffusion", "STABLE_DIFFUSION"),
    "stable-diffusion-xl": ("stable_diffusion_xl", "STABLE_DIFFUSION_XL"),
    "stable-diffusion-3": ("stable_diffusion_3", "STABLE_DIFFUSION_3"),
    "flux": ("flux", "FLUX"),
    "qwen-image": ("qwen_image", "QWEN_IMAGE"),
    "pixart": ("pixart", "PIXART"),
    "dit": ("dit", "DIT"),
    "lcm": ("latent_consistency", "LATENT_CONSISTENCY"),
    "unconditional": ("unconditional", "UNCONDITIONAL"),
}


def family(name: str) -> Family:
    """The record of a family.

    Raises:
        ValueError: no family has this name.
    """
    if name not in FAMILIES:
        raise ValueError(f"no family is called {name!r}; there are {sorted(FAMILIES)}")
    module, record = FAMILIES[name]
    found: Family = getattr(importlib.import_module(f"{__name__}.{module}"), record)
    return found
