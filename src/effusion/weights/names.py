"""The names that files of weights have: made for one stem, variant and extension, and read again."""

from __future__ import annotations

import re
from dataclasses import dataclass

STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
PICKLES = ("bin", "ckpt", "pt", "pth")
EXTENSIONS = ("safetensors", *PICKLES, "gguf")
_NAME = re.compile(
    r"(?P<stem>[\w-]+?)(?:\.(?P<v>[\w-]+?))?(?:-\d{5}-of-\d{5})?(?:\.(?P<w>[\w-]+))?"
    rf"\.(?P<extension>{'|'.join(EXTENSIONS)})(?P<index>\.index(?:\.(?P<u>[\w-]+))?\.json)?"
)


@dataclass(frozen=True)
class WeightNames:
    """The file names that a checkpoint may have, for one stem, extension and variant."""

    stem: str
    extension: str
    variant: str | None = None

    @property
    def single(self) -> str:
        return f"{self.stem}{_dot(self.variant)}.{self.extension}"

    @property
    def index(self) -> str:
        return f"{self.stem}.{self.extension}.index{_dot(self.variant)}.json"

    def shard(self, number: int, count: int) -> str:
        return f"{self.stem}{_dot(self.variant)}-{number:05d}-of-{count:05d}.{self.extension}"


def _dot(text: str | None) -> str:
    return f".{text}" if text else ""


@dataclass(frozen=True)
class Named:
    """What the name of a file says: one of weights, a shard of one, or (``index``) the list of its shards."""

    stem: str
    extension: str
    variant: str | None
    index: bool


def parse(name: str) -> Named | None:
    """What ``name`` says; ``None`` if it is no name of weights. The variant may stand before or behind the shard."""
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    return Named(found["stem"], found["extension"], found["v"] or found["w"] or found["u"], found["index"] is not None)


def is_weights(name: str) -> bool:
    """Whether ``name`` ends as files of weights do, whatever else is in it."""
    return name.lower().rpartition(".")[2] in EXTENSIONS
