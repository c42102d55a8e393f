"""Floor 2: one file per network."""

from ..core import lazy, registry

# what the ecosystem has under this path, and here is a part of networks
_PARTS = {
    "AttentionBackendName": "effusion.nn.backend_names",
    "ImageProjection": "effusion.nn.conditioning",
    "attention_backend": "effusion.nn.dispatch",
}
__getattr__, __dir__, __all__ = lazy.attach(__name__, registry.names_under(__name__) | _PARTS)
