"""Floor 2: the memory engine. Where weights rest, how they travel, and what that costs."""

from ..core import lazy

_PUBLIC = {
    "casting": ("apply_layerwise_casting", "apply_layerwise_casting_hook", "uncast"),
    "device_map": ("apply_device_map",),
    "engine": ("engine_of",),
    "machine": ("available_ram", "rates"),
    "patches": ("LowRank", "add_patch", "patch_names", "remove_patch", "scale_patch"),
    "plan": ("Plan", "Row", "Stage"),
    "policies": (
        "apply_group_offloading",
        "cpu_offload",
        "cpu_offload_with_hook",
        "execution_device",
        "free",
        "model_offload",
        "remove",
        "resident",
    ),
}
__getattr__, __dir__, __all__ = lazy.attach(
    __name__, {name: f"{__name__}.{module}" for module, names in _PUBLIC.items() for name in names}
)
