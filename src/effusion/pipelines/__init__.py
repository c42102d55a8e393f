"""Floor 5: typed faces over families and tasks."""

from ..core import lazy, registry

__getattr__, __dir__, __all__ = lazy.attach(__name__, registry.names_under(__name__))
