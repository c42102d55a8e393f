"""Which files of a repository a pipeline needs."""

from __future__ import annotations

import re
from collections.abc import Iterable

# classes that the packages have renamed since files named them
CLASS_ALIASES = {
    "CLIPFeatureExtractor": "CLIPImageProcessor",
    "ChineseCLIPFeatureExtractor": "ChineseCLIPImageProcessor",
}
_STEMS = "diffusion_pytorch_model|model|pytorch_model"
_WEIGHTS = re.compile(
    rf"(?P<stem>{_STEMS})(?:\.(?P<v>[\w-]+?))?(?:-\d{{5}}-of-\d{{5}})?(?:\.(?P<w>[\w-]+))?\.(?P<ext>safetensors|bin)"
    rf"(?:\.index(?:\.(?P<u>[\w-]+))?\.json)?"
)
_SMALL = (".json", ".txt", ".model", ".jinja", ".vocab", ".merges")


def _kind(name: str) -> tuple[str, str | None] | None:
    """(extension, variant) of the name of a weights or index file, ``None`` of any other."""
    found = _WEIGHTS.fullmatch(name)
    return (found["ext"], found["v"] or found["w"] or found["u"]) if found else None


def has_variant(names: Iterable[str], variant: str) -> bool:
    """Whether some of the file ``names`` are weights of ``variant``."""
    return any(kind[1] == variant for name in names if (kind := _kind(name)))


def choose_files(
    files: Iterable[str], component: str, variant: str | None = None, use_safetensors: bool | None = None
) -> list[str]:
    """The files of the folder ``component`` to fetch: all small ones, and one form of the weights."""
    inside = [f for f in files if f.rpartition("/")[0] == component]
    kinds = {f: _kind(f.rpartition("/")[2]) for f in inside}
    small = [f for f in inside if kinds[f] is None and f.endswith(_SMALL)]
    extensions = {True: ("safetensors",), False: ("bin",), None: ("safetensors", "bin")}[use_safetensors]
    for wanted in dict.fromkeys((variant, None)):
        for extension in extensions:
            weights = [f for f in inside if kinds[f] == (extension, wanted)]
            if weights:
                return small + weights
    return small
