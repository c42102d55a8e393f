"""Effusion: diffusion models in little memory, fast.

Every public name is imported when it is first used; ``import effusion`` itself costs ``torch`` at most.
"""

from .core import aliases, lazy, registry

__version__ = "0.1.0"

aliases.install()

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    {**registry.public_names(), **registry.BORROWED, **{name: f"{__name__}.{name}" for name in registry.SUBMODULES}},
)
