"""Module paths of the ecosystem, for scripts that import from below the top: ``schedulers.scheduling_ddim``, ….

A few rules instead of a file each. Such a path is a view: its names are looked up where they live when they are used.
Files that exist come first; a path that no rule knows raises ``ModuleNotFoundError`` as usual.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import spec_from_file_location
from types import ModuleType
from typing import Any

from . import registry

ROOT = __name__.split(".")[0]

# where the functions are that modules of pipelines have beside their classes
STEPS: tuple[str, ...] = ("blocks.timesteps", "blocks.latents", "blocks.guiders")
STEPS += ("families.flux_tasks", "families.pixart", "families.qwen_image")

# path in the ecosystem, below the library -> modules that have its names; a package stands for all that the registry
# lists in it. The first rule that matches the whole path counts.
RULES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"configuration_utils", ("core.config",)),
    (r"image_processor", ("blocks.images", "blocks.processors")),
    (r"callbacks", ("pipelines.callbacks",)),
    (r"optimization", ("training.rates",)),
    (r"training_utils", ("training.ema", "training.helpers")),
    (r"hooks(\.(group_offloading|hooks|layerwise_casting))?", ("nn.hooks", "placement.policies", "placement.casting")),
    (r"utils\.deprecation_utils", ("utils.doc_utils",)),
    (r"utils\.export_utils", ("blocks.video",)),
    (r"utils\.loading_utils", ("blocks.pictures", "blocks.video")),
    (r"utils\.logging", ("core.log",)),
    (r"utils\.outputs", ("core.outputs",)),
    (r"utils\.pil_utils", ("blocks.pictures", "blocks.images")),
    (r"loaders(\.\w+)?", ("pipelines.loaders",)),
    (r"models\.lora", ("pipelines.loaders",)),
    (r"models\.modeling_utils", ("models.base",)),
    (
        r"models\.attention",
        ("nn.transformer_2d", "nn.feed_forward", "nn.attention", "nn.joint_attention", "models.transformer_sd3"),
    ),
    (r"models\.activations", ("nn.feed_forward",)),
    (r"models\.attention_dispatch", ("nn.dispatch", "nn.backend_names")),
    (r"models\.attention_processor", ("nn.attention", "nn.joint_attention", "nn.norms")),
    (r"models\.embeddings", ("nn.embeddings", "nn.conditioning", "nn.rotary", "nn.patch")),
    (r"models\.normalization", ("nn.norms", "nn.modulation", "nn.dit_blocks")),
    (r"models\.resnet", ("nn.resnet",)),
    (r"models\.autoencoders\.vae", ("nn.vae", "nn.tiling")),
    (r"models\.(unets\.)?unet_2d_blocks", ("nn.unet_blocks", "nn.unet_makers")),
    (r"models\.transformers\.transformer_flux", ("models.transformer_flux", "nn.joint_attention", "nn.rotary")),
    (r"models\.transformers\.transformer_qwenimage", ("models.transformer_qwenimage", "nn.joint_attention")),
    (r"models\.transformers\.transformer_sd3", ("models.transformer_sd3", "nn.joint_attention")),
    (r"models\.(autoencoders|controlnets|transformers|unets)(\.\w+)?", ("models",)),
    (r"models\.unet_2d(_condition)?", ("models",)),
    (r"pipelines\.stable_diffusion\.safety_checker", ("models.safety_checker",)),
    (r"pipelines\.stable_diffusion_xl\.watermark", ("blocks.watermark",)),
    (r"pipelines\.(auto_pipeline|pipeline_utils|ddim|ddpm|latent_consistency_models)", ("pipelines",)),
    (r"pipelines\.(controlnet_sd3|pixart_alpha|qwenimage)", ("pipelines",)),
    (r"pipelines\.controlnet(\.multicontrolnet)?", ("pipelines", "models")),
    (r"pipelines\.\w+\.(pipeline|modeling)_\w+", ("pipelines", "models", *STEPS)),
    (r"modular_pipelines(\.modular_pipeline)?", ("pipelines",)),
    (r"quantizers(\.quantization_config)?", ("quant.gguf",)),
    (r"schedulers\.scheduling_dpmsolver_sde", ("schedulers.heun", "schedulers.brownian")),
    (r"schedulers\.scheduling_\w+", ("schedulers",)),
)
_PACKAGES = re.compile(
    r"hooks|loaders|quantizers|models\.(autoencoders|controlnets|transformers|unets)|modular_pipelines|pipelines\.\w+"
)


def install() -> None:
    """Make the paths importable; once per process."""
    if not any(type(finder).__module__ == __name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, _Opener())
        sys.meta_path.append(_Finder())


def _homes(path: str) -> tuple[str, ...]:
    return next((homes for rule, homes in RULES if re.fullmatch(rule, path)), ())


class _Opener(MetaPathFinder):
    """A family's pipelines are one file here and a package there: lets paths below the file be asked for at all."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith(f"{ROOT}.pipelines.") or fullname.count(".") != 2:
            return None
        found = PathFinder.find_spec(fullname, path)
        if found is None or found.origin is None or found.submodule_search_locations is not None:
            return found
        return spec_from_file_location(fullname, found.origin, loader=_OpenLoader(fullname, found.origin))


class _OpenLoader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        module.__path__ = []


class _Finder(MetaPathFinder, Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        root, _, rest = fullname.partition(".")
        if root != ROOT or not _homes(rest):
            return None
        return ModuleSpec(fullname, self, is_package=bool(_PACKAGES.fullmatch(rest)))

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        homes = [f"{ROOT}.{home}" for home in _homes(module.__name__.partition(".")[2])]
        module.__doc__ = f"Names of {', '.join(homes)} under the ecosystem's path."

        def __getattr__(name: str) -> Any:
            if not name.startswith("__"):
                for home in _modules(homes, name):
                    if hasattr(found := importlib.import_module(home), name):
                        return getattr(found, name)
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

        def __dir__() -> list[str]:
            return sorted({name for home in homes for name in dir(importlib.import_module(home)) if name[0] != "_"})

        module.__dict__.update(__getattr__=__getattr__, __dir__=__dir__)


def _modules(homes: Sequence[str], name: str) -> Iterator[str]:
    """Where to look for ``name``: its registered module first, so that no other is imported for a public name.

    Modules that are named themselves come before all that are registered below another.
    """
    registered = [registry.names_under(home) for home in homes]
    yield from (names[name] for names in registered if name in names)
    yield from homes
    yield from dict.fromkeys(module for names in registered for module in names.values())
