"""How the learning rate changes over a run: warmup, then constant, linear, cosine, polynomial or by rules."""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import Enum
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class SchedulerType(Enum):
    """The names that :func:`get_scheduler` knows."""

    LINEAR = "linear"
    COSINE = "cosine"
    COSINE_WITH_RESTARTS = "cosine_with_restarts"
    POLYNOMIAL = "polynomial"
    CONSTANT = "constant"
    CONSTANT_WITH_WARMUP = "constant_with_warmup"
    PIECEWISE_CONSTANT = "piecewise_constant"


def _warmed(after: Callable[[int], float], warmup: int, top: float = 1.0) -> Callable[[int], float]:
    """A line from 0 to ``top`` over ``warmup`` steps, then ``after(step)``."""
    return lambda step: top * float(step) / float(max(1, warmup)) if step < warmup else after(step)


def _share(step: int, warmup: int, total: int) -> float:
    """How much of the run after the warmup is over."""
    return float(step - warmup) / float(max(1, total - warmup))


def get_constant_schedule(optimizer: Optimizer, last_epoch: int = -1) -> LambdaLR:
    """Always the optimizer's rate."""
    return LambdaLR(optimizer, lambda _: 1.0, last_epoch=last_epoch)


def get_constant_schedule_with_warmup(optimizer: Optimizer, num_warmup_steps: int, last_epoch: int = -1) -> LambdaLR:
    """Up to the optimizer's rate, and stay there."""
    return LambdaLR(optimizer, _warmed(lambda _: 1.0, num_warmup_steps), last_epoch=last_epoch)


def get_piecewise_constant_schedule(optimizer: Optimizer, step_rules: str, last_epoch: int = -1) -> LambdaLR:
    """Factors by step: ``"1:10,0.1:20,0.005"`` is 1 before step 10, 0.1 before step 20, then 0.005.

    Raises:
        ValueError: rules that can't be read so.
    """
    *rules, last = step_rules.split(",")
    try:
        pairs = [rule.split(":") for rule in rules]
        ends = {int(end): float(factor) for factor, end in pairs}
        rest = float(last)
    except ValueError as error:
        raise ValueError(f"step_rules={step_rules!r}; expected 'factor:step,…,factor' as in '1:10,0.005'") from error

    def factor(step: int) -> float:
        return next((ends[end] for end in sorted(ends) if step < end), rest)

    return LambdaLR(optimizer, factor, last_epoch=last_epoch)


def get_linear_schedule_with_warmup(
    optimizer: Optimizer,
    num_warmup_steps: int,
    num_training_steps: int,
    last_epoch: int = -1,
    f_min: float = 0.0,
    f_max: float = 1.0,
) -> LambdaLR:
    """Up to ``f_max`` times the rate, then in a line down to ``f_min`` times at the last step."""

    def down(step: int) -> float:
        left = float(num_training_steps - step) / float(max(1, num_training_steps - num_warmup_steps))
        return f_min + (f_max - f_min) * max(0.0, left)

    return LambdaLR(optimizer, _warmed(down, num_warmup_steps, f_max), last_epoch)


def get_cosine_schedule_with_warmup(
    optimizer: Optimizer, num_warmup_steps: int, num_training_steps: int, num_cycles: float = 0.5, last_epoch: int = -1
) -> LambdaLR:
    """Up, then down along ``num_cycles`` waves of a cosine."""

    def wave(step: int) -> float:
        share = _share(step, num_warmup_steps, num_training_steps)
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * float(num_cycles) * 2.0 * share)))

    return LambdaLR(optimizer, _warmed(wave, num_warmup_steps), last_epoch)


def get_cosine_with_hard_restarts_schedule_with_warmup(
    optimizer: Optimizer, num_warmup_steps: int, num_training_steps: int, num_cycles: int = 1, last_epoch: int = -1
) -> LambdaLR:
    """Up, then ``num_cycles`` times from the full rate down half a cosine."""

    def wave(step: int) -> float:
        share = _share(step, num_warmup_steps, num_training_steps)
        if share >= 1.0:
            return 0.0
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((float(num_cycles) * share) % 1.0))))

    return LambdaLR(optimizer, _warmed(wave, num_warmup_steps), last_epoch)


def get_polynomial_decay_schedule_with_warmup(
    optimizer: Optimizer,
    num_warmup_steps: int,
    num_training_steps: int,
    lr_end: float = 1e-7,
    power: float = 1.0,
    last_epoch: int = -1,
) -> LambdaLR:
    """Up, then down to ``lr_end`` along a power of what is left of the run.

    Raises:
        ValueError: the optimizer's rate is not above ``lr_end``.
    """
    start = optimizer.defaults["lr"]
    if start <= lr_end:
        raise ValueError(f"lr_end={lr_end} must be below the optimizer's rate, {start}")

    def down(step: int) -> float:
        if step > num_training_steps:
            return float(lr_end / start)
        left = 1 - (step - num_warmup_steps) / (num_training_steps - num_warmup_steps)
        return float(((start - lr_end) * left**power + lr_end) / start)

    return LambdaLR(optimizer, _warmed(down, num_warmup_steps), last_epoch)


# name -> function, and which of get_scheduler's arguments it takes
_KINDS: dict[SchedulerType, tuple[Callable[..., LambdaLR], tuple[str, ...]]] = {
    SchedulerType.LINEAR: (get_linear_schedule_with_warmup, ("num_warmup_steps", "num_training_steps")),
    SchedulerType.COSINE: (get_cosine_schedule_with_warmup, ("num_warmup_steps", "num_training_steps")),
    SchedulerType.COSINE_WITH_RESTARTS: (
        get_cosine_with_hard_restarts_schedule_with_warmup,
        ("num_warmup_steps", "num_training_steps", "num_cycles"),
    ),
    SchedulerType.POLYNOMIAL: (
        get_polynomial_decay_schedule_with_warmup,
        ("num_warmup_steps", "num_training_steps", "power"),
    ),
    SchedulerType.CONSTANT: (get_constant_schedule, ()),
    SchedulerType.CONSTANT_WITH_WARMUP: (get_constant_schedule_with_warmup, ("num_warmup_steps",)),
    SchedulerType.PIECEWISE_CONSTANT: (get_piecewise_constant_schedule, ("step_rules",)),
}


def get_scheduler(
    name: str | SchedulerType,
    optimizer: Optimizer,
    step_rules: str | None = None,
    num_warmup_steps: int | None = None,
    num_training_steps: int | None = None,
    num_cycles: int = 1,
    power: float = 1.0,
    last_epoch: int = -1,
) -> LambdaLR:
    """The schedule called ``name``.

    Raises:
        ValueError: an unknown name, or one that needs an argument that was not given.
    """
    known = [kind.value for kind in SchedulerType]
    if not isinstance(name, SchedulerType) and name not in known:
        raise ValueError(f"no schedule of the learning rate is called {name!r}; there are {', '.join(known)}")
    kind = SchedulerType(name)
    make, needs = _KINDS[kind]
    given: dict[str, Any] = {
        "step_rules": step_rules,
        "num_warmup_steps": num_warmup_steps,
        "num_training_steps": num_training_steps,
        "num_cycles": num_cycles,
        "power": power,
    }
    if missing := [need for need in needs if given[need] is None]:
        raise ValueError(f"the schedule {kind.value!r} needs {' and '.join(f'`{need}`' for need in missing)}")
    return make(optimizer, last_epoch=last_epoch, **{need: given[need] for need in needs})
