"""Floor 2: one file per network."""

from ..core import lazy, registry

__getattr__, __dir__, __all__ = lazy.attach(__name__, registry.names_under(__name__))
