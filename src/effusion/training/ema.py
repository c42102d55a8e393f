"""Exponential moving averages of weights: what a diffusion model is sampled with."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

_SETTINGS = ("decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup", "inv_gamma", "power")


class EMAModel:
    """Keeps ``shadow <- decay * shadow + (1 - decay) * parameter`` after every optimiser step.

    The decay grows with the number of steps: ``(1 + n) / (10 + n)``, or ``1 - (1 + n / inv_gamma) ** -power`` with
    ``use_ema_warmup``; always between ``min_decay`` and ``decay``, and 0 (a plain copy) up to ``update_after_step``.

    Args:
        parameters: the weights to follow; their order is how they are told apart later.
        foreach: run over all tensors in one call; the same numbers, quicker with many small ones.
        model_cls, model_config: class and configuration that :meth:`save_pretrained` saves the average as.
    """

    def __init__(
        self,
        parameters: Iterable[Parameter],
        decay: float = 0.9999,
        min_decay: float = 0.0,
        update_after_step: int = 0,
        use_ema_warmup: bool = False,
        inv_gamma: float | int = 1.0,
        power: float | int = 2 / 3,
        foreach: bool = False,
        model_cls: Any | None = None,
        model_config: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if kwargs:
            raise TypeError(f"EMAModel takes no {', '.join(sorted(kwargs))}")
        if isinstance(parameters, torch.nn.Module):
            parameters = parameters.parameters()
        self.shadow_params: list[Tensor] = [p.clone().detach() for p in parameters]
        self.temp_stored_params: list[Tensor] | None = None
        self.decay, self.min_decay, self.update_after_step = decay, min_decay, update_after_step
        self.use_ema_warmup, self.inv_gamma, self.power = use_ema_warmup, inv_gamma, power
        self.optimization_step = 0
        self.cur_decay_value: float | None = None
        self.foreach, self.model_cls, self.model_config = foreach, model_cls, model_config

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], model_cls: Any, foreach: bool = False) -> EMAModel:
        """Read what :meth:`save_pretrained` wrote: the average, its settings and its step."""
        model = model_cls.from_pretrained(path)
        ema = cls(model.parameters(), model_cls=model_cls, model_config=dict(model.config), foreach=foreach)
        config = model_cls.load_config(path)
        ema.load_state_dict({k: config[k] for k in _SETTINGS if k in config})
        return ema

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Save the average as a model of ``model_cls``, with the settings in its configuration.

        Raises:
            ValueError: no ``model_cls`` or ``model_config`` was given.
        """
        if self.model_cls is None or self.model_config is None:
            raise ValueError("save_pretrained needs EMAModel(…, model_cls=…, model_config=…)")
        model = self.model_cls.from_config(self.model_config)
        model.register_to_config(**{k: getattr(self, k) for k in _SETTINGS})
        self.copy_to(model.parameters())
        model.save_pretrained(path)

    def get_decay(self, optimization_step: int) -> float:
        """The decay at a step, between ``min_decay`` and ``decay``; 0 until the average begins."""
        step = optimization_step - self.update_after_step - 1
        if step <= 0:
            return 0.0
        grown = 1 - (1 + step / self.inv_gamma) ** -self.power if self.use_ema_warmup else (1 + step) / (10 + step)
        return max(min(grown, self.decay), self.min_decay)

    @torch.no_grad()
    def step(self, parameters: Iterable[Parameter]) -> None:
        """Take the parameters after an optimiser step into the average; frozen ones are copied."""
        if isinstance(parameters, torch.nn.Module):
            parameters = parameters.parameters()
        current = list(parameters)
        self.optimization_step += 1
        self.cur_decay_value = self.get_decay(self.optimization_step)
        rate = 1 - self.cur_decay_value
        pairs = list(zip(self.shadow_params, current, strict=True))
        learned = [(s, p.detach().to(s.device, s.dtype)) for s, p in pairs if p.requires_grad]
        if self.foreach and learned:
            shadows, values = [s for s, _ in learned], [p for _, p in learned]
            change = torch._foreach_sub(shadows, values)
            torch._foreach_mul_(change, rate)
            torch._foreach_sub_(shadows, change)
        else:
            for shadow, value in learned:
                shadow.sub_((shadow - value) * rate)
        for shadow, value in pairs:
            if not value.requires_grad:
                shadow.copy_(value)

    @torch.no_grad()
    def copy_to(self, parameters: Iterable[Parameter]) -> None:
        """Write the average into ``parameters``."""
        for shadow, parameter in zip(self.shadow_params, parameters, strict=True):
            parameter.data.copy_(shadow.to(parameter.device))

    @torch.no_grad()
    def store(self, parameters: Iterable[Parameter]) -> None:
        """Put a copy of ``parameters`` aside, for :meth:`restore` after :meth:`copy_to`."""
        self.temp_stored_params = [p.detach().cpu().clone() for p in parameters]

    @torch.no_grad()
    def restore(self, parameters: Iterable[Parameter]) -> None:
        """Write what :meth:`store` put aside back, and forget it.

        Raises:
            RuntimeError: nothing was put aside.
        """
        if self.temp_stored_params is None:
            raise RuntimeError("nothing to restore: call `store(parameters)` first")
        for stored, parameter in zip(self.temp_stored_params, parameters, strict=True):
            parameter.data.copy_(stored.to(parameter.device))
        self.temp_stored_params = None

    def pin_memory(self) -> None:
        """Move the average to page-locked host memory, from where copies to a device run beside it."""
        self.shadow_params = [p.pin_memory() for p in self.shadow_params]

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None, non_blocking: bool = False
    ) -> None:
        """Move the average; ``dtype`` for the floating-point tensors only."""
        self.shadow_params = [
            p.to(device=device, dtype=dtype if p.is_floating_point() else None, non_blocking=non_blocking)
            for p in self.shadow_params
        ]

    def state_dict(self) -> dict[str, Any]:
        """Settings, step and average; the tensors are the average's own, not copies."""
        return {**{name: getattr(self, name) for name in _SETTINGS}, "shadow_params": self.shadow_params}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state; entries that are missing keep their value.

        Raises:
            ValueError: a value out of range, or tensors that do not fit.
        """
        state = {**self.state_dict(), **state_dict}
        if not 0.0 <= state["decay"] <= 1.0:
            raise ValueError(f"decay={state['decay']}: must be between 0 and 1")
        for name, kind in (("min_decay", float), ("inv_gamma", (int, float)), ("power", (int, float))):
            if not isinstance(state[name], kind):
                raise ValueError(f"{name}={state[name]!r} is no number")
        for name, exact in (("optimization_step", int), ("update_after_step", int), ("use_ema_warmup", bool)):
            if not isinstance(state[name], exact):
                raise ValueError(f"{name}={state[name]!r} is no {exact.__name__}")
        shadows = state["shadow_params"]
        if not isinstance(shadows, list) or not all(isinstance(p, Tensor) for p in shadows):
            raise ValueError("shadow_params must be a list of tensors")
        if len(shadows) != len(self.shadow_params):
            raise ValueError(f"{len(shadows)} shadow_params for {len(self.shadow_params)} parameters")
        for name in _SETTINGS:
            setattr(self, name, state[name])
        self.shadow_params = shadows
