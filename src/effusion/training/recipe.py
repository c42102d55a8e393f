"""A training run: steps, averages, logs and checkpoints that continue bit for bit, on ``accelerate``."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..core.errors import CheckpointError
from ..core.optional import require
from .ema import EMAModel
from .muon import Muon, matrices


@dataclass(frozen=True)
class Settings:
    """How to train.

    Attributes:
        steps: optimiser steps of the whole run.
        lr, matrix_lr: learning rates of AdamW, and of Muon for the weights of linear and convolution layers; with
            ``matrix_lr`` 0, AdamW has them all.
        warmup, cooldown: the learning rates rise for ``warmup`` steps, stay, and fall to zero along a half cosine
            over the last ``cooldown`` steps; so a run can be prolonged as long as it has not cooled down.
        accumulate: batches for one optimiser step.
        max_grad_norm: gradients are clipped to this norm.
        ema_decay: of the average of all trained weights.
        mixed_precision: ``no``, ``bf16`` or ``fp16``, as ``accelerate`` takes it.
        seed: everything random in a step depends on this and on the number of the step only.
        log_every, save_every: steps between lines of the log, and between checkpoints.
        max_minutes: stop, with a checkpoint, after that long; 0 for no limit.
    """

    steps: int
    lr: float = 1e-3
    matrix_lr: float = 0.0
    warmup: int = 100
    cooldown: int = 0
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    accumulate: int = 1
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    mixed_precision: str = "no"
    seed: int = 0
    log_every: int = 50
    save_every: int = 500
    max_minutes: float = 0.0

    def scale(self, step: int) -> float:
        """What the learning rates are multiplied with at ``step`` (0-based)."""
        rise = min(1.0, (step + 1) / max(1, self.warmup))
        left = self.steps - step
        fall = 0.5 - 0.5 * math.cos(math.pi * min(1.0, left / self.cooldown)) if self.cooldown else 1.0
        return rise * fall


class Trainer:
    """Trains an objective step by step; interrupted at any point, it goes on from its last checkpoint.

    Args:
        objective: a module that holds the networks that learn. ``objective(generator)`` draws a batch with the
            generator it is given, and with nothing else, and returns scalars: ``loss`` and others to be logged.
        settings: see :class:`Settings`.
        folder: where ``checkpoint.pt`` and ``log.jsonl`` are kept.
        on_save: called with the trainer in the main process after every checkpoint, e.g. to take a score; what it
            returns is logged.

    Raises:
        MissingExtra: ``accelerate`` is not installed.
    """

    def __init__(
        self,
        objective: nn.Module,
        settings: Settings,
        folder: str | os.PathLike[str],
        on_save: Callable[[Trainer], Mapping[str, Any] | None] | None = None,
    ) -> None:
        accelerate = require("accelerate", "training")
        self.objective, self.settings, self.on_save = objective, settings, on_save
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.accelerator = accelerate.Accelerator(mixed_precision=settings.mixed_precision)
        self.parameters = [p for p in objective.parameters() if p.requires_grad]
        self.prepared, *self.optimizers = self.accelerator.prepare(objective, *self._new_optimizers())
        self.ema = EMAModel(self.parameters, decay=settings.ema_decay, foreach=True)
        self.step = 0

    def _new_optimizers(self) -> list[torch.optim.Optimizer]:
        """AdamW for everything, or Muon for the matrices and AdamW for the rest; each group knows its full rate."""
        s = self.settings
        big = matrices(self.objective) if s.matrix_lr else []
        taken = {id(p) for p in big}
        rest = [p for p in self.parameters if id(p) not in taken]
        out: list[torch.optim.Optimizer] = []
        if rest:
            out.append(torch.optim.AdamW(rest, lr=s.lr, betas=s.betas, weight_decay=s.weight_decay, foreach=True))
        if big:
            out.append(Muon(big, lr=s.matrix_lr, weight_decay=s.weight_decay))
        for optimizer in out:
            for group in optimizer.param_groups:
                group["full_lr"] = group["lr"]
        return out

    @property
    def checkpoint(self) -> Path:
        """The file that :meth:`save` writes and :meth:`resume` reads."""
        return self.folder / "checkpoint.pt"

    def generator(self) -> torch.Generator:
        """The source of this step's random numbers: of the seed, the step and the process, nothing else."""
        mixed = (self.settings.seed * 1_000_003 + self.step) * 65_537 + self.accelerator.process_index
        return torch.Generator().manual_seed(mixed % 2**63)

    def run(self) -> None:
        """Train up to ``settings.steps``, or until the minutes are over; a checkpoint is written at the end."""
        started, first, over = time.monotonic(), self.step, False
        self.objective.train()
        while self.step < self.settings.steps and not over:
            values = self._one_step()
            last = self.step >= self.settings.steps
            if self.step % self.settings.log_every == 0 or last:
                seconds = time.monotonic() - started
                over = self._any(0 < self.settings.max_minutes * 60 <= seconds)
                speed = (self.step - first) / seconds
                self.log({**values, "lr_scale": self.settings.scale(self.step - 1), "steps_per_s": speed})
            if self.step % self.settings.save_every == 0 or last or over:
                self.save()

    def _any(self, yes: bool) -> bool:
        """Whether any process says yes: all of them must stop at the same step."""
        flag = torch.tensor(float(yes), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, reduction="sum") > 0)

    def _one_step(self) -> dict[str, float]:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["full_lr"] * self.settings.scale(self.step)
            optimizer.zero_grad()
        generator = self.generator()
        for _ in range(self.settings.accumulate):
            values = self.prepared(generator)
            self.accelerator.backward(values["loss"] / self.settings.accumulate)
        norm = self.accelerator.clip_grad_norm_(self.parameters, self.settings.max_grad_norm)
        for optimizer in self.optimizers:
            optimizer.step()
        self.ema.step(self.parameters)
        self.step += 1
        return {name: float(value.detach()) for name, value in {**values, "norm": norm}.items()}

    def log(self, values: Mapping[str, Any]) -> None:
        """Add a line of JSON to ``log.jsonl`` and print it."""
        if not self.accelerator.is_main_process:
            return
        shown = {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in values.items()}
        line = json.dumps({"step": self.step, "time": time.strftime("%H:%M:%S", time.gmtime()), **shown})
        with (self.folder / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        self.accelerator.print(line, flush=True)

    def save(self) -> None:
        """Write the checkpoint beside the last one and rename it: weights, optimiser, average, step, random state."""
        if not self.accelerator.is_main_process:
            return
        state = {
            "objective": self.objective.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "ema": self.ema.state_dict(),
            "step": self.step,
            "seed": self.settings.seed,
            "rng": torch.get_rng_state(),
        }
        beside = self.checkpoint.with_name(f".{self.checkpoint.name}.part")
        torch.save(state, beside)
        os.replace(beside, self.checkpoint)
        if self.on_save is not None and (extra := self.on_save(self)):
            self.log(extra)

    def resume(self) -> None:
        """Go on from the checkpoint in ``folder``, as if the run had never stopped.

        Raises:
            CheckpointError: there is none, or it belongs to other networks or another seed.
        """
        if not self.checkpoint.is_file():
            raise CheckpointError(f"{self.checkpoint}: no checkpoint to resume from; start without resuming")
        state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        if state["seed"] != self.settings.seed:
            raise CheckpointError(f"{self.checkpoint} is of seed {state['seed']}, this run of {self.settings.seed}")
        try:
            self.objective.load_state_dict(state["objective"])
        except RuntimeError as error:
            raise CheckpointError(f"{self.checkpoint} is of other networks: {error}") from error
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.ema.load_state_dict({**state["ema"], "decay": self.settings.ema_decay})
        self.step = state["step"]
        torch.set_rng_state(state["rng"])

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """The objective with averaged weights, in evaluation mode; as before afterwards."""
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        self.objective.eval()
        try:
            yield self.objective
        finally:
            self.ema.restore(self.parameters)
            self.objective.train()
