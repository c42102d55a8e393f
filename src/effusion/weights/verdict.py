"""What recognising a file answers with: the parts that are in it, and what they are together."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..core import log
from .entries import Checkpoint, Entry
from .layouts.table import Row, to_ours

logger = log.get_logger(__name__)


@dataclass(frozen=True)
class Part:
    """One component inside a file: its class, how to read it, and a configuration from its shapes.

    Attributes:
        defaults: what files may leave out, under our names.
        facts: entries of the configuration that are values of tensors: entry -> the tensor's name in the file.
        assumed: what of the configuration nothing in the file tells, for people.
    """

    class_name: str
    prefix: str
    table: Sequence[Row] | None  # None: our own names
    config: Mapping[str, Any]
    library: str = "diffusers"
    defaults: Mapping[str, Entry] = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)
    assumed: str = ""

    def read(self, checkpoint: Checkpoint) -> Checkpoint:
        """The part's tensors under our names."""
        if self.table is not None:
            found = to_ours(checkpoint, self.table, self.prefix)
        else:
            found = checkpoint.renamed({n: n[len(self.prefix) :] for n in checkpoint if n.startswith(self.prefix)})
        return found.replaced({**self.defaults, **found}) if self.defaults else found

    def configuration(self, checkpoint: Checkpoint, changes: Collection[str] = ()) -> dict[str, Any]:
        """What its shapes, and the tensors that hold facts, say; warns of what is assumed, unless it is in ``changes``."""
        if self.assumed and "scaling_factor" not in changes:
            logger.warning("%s: %s", checkpoint.label, self.assumed)
        facts = {entry: checkpoint.tensor(name).flatten().tolist() for entry, name in self.facts.items()}
        return {**self.config, **facts}


@dataclass(frozen=True)
class Verdict:
    """What a file is.

    Attributes:
        kind: ``"pipeline"`` (a model with companions), ``"model"`` (one network), ``"lora"``, ``"embedding"``,
            ``"ip_adapter"`` or ``"unknown"``.
        name: for people, as in *Stable Diffusion XL*.
        parts: components by their name in a pipeline.
        pipeline: the class of the pipeline that they belong to.
        missing: components of it that the file does not have and no table can give.
        family: the name of the family, where there is one.
    """

    kind: str
    name: str
    parts: Mapping[str, Part] = field(default_factory=dict)
    pipeline: str | None = None
    missing: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)  # scheduler and pipeline configuration
    family: str = ""

    def describe(self) -> str:
        """One line: what it is, what is in it and what is not."""
        inside = ", ".join(f"{n} ({p.class_name})" for n, p in self.parts.items())
        text = f"{self.name}: {inside}" if inside else self.name
        return f"{text}; without {', '.join(self.missing)}" if self.missing else text
