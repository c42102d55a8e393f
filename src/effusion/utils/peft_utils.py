"""Layers of the package ``peft`` in a network: how much they weigh, which are on, without them.

A network that has such layers has imported ``peft``; so nothing here does.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from torch import nn

from .import_utils import is_version

Function = TypeVar("Function", bound=Callable[..., Any])


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    if tuners is not None:
        yield from ((name, m) for name, m in model.named_modules() if isinstance(m, tuners.BaseTunerLayer))


def scale_lora_layers(model: nn.Module, weight: float) -> None:
    """Multiply what LoRA layers add by ``weight``."""
    for _, layer in _layers(model) if weight != 1.0 else ():
        layer.scale_layer(weight)


def unscale_lora_layers(model: nn.Module, weight: float | None = None) -> None:
    """Undo :func:`scale_lora_layers`; with 0, which can't be divided by, set the layers to their own scale."""
    for _, layer in _layers(model) if weight not in (None, 1.0) else ():
        if weight:
            layer.unscale_layer(weight)
        else:
            for name in layer.active_adapters:
                layer.set_scale(name, 1.0)


def apply_lora_scale(kwargs_name: str = "joint_attention_kwargs") -> Callable[[Function], Function]:
    """Decorator of a ``forward``: ``scale`` in its argument ``kwargs_name`` weighs the LoRA layers during the call."""

    def decorate(forward: Function) -> Function:
        @functools.wraps(forward)
        def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            given, scale = kwargs.get(kwargs_name), 1.0
            if given is not None:
                scale = given.get("scale", 1.0)
                kwargs[kwargs_name] = {k: v for k, v in given.items() if k != "scale"}
            scale_lora_layers(self, scale)
            try:
                return forward(self, *args, **kwargs)
            finally:
                unscale_lora_layers(self, scale)

        return call  # type: ignore[return-value]

    return decorate


def recurse_remove_peft_layers(model: nn.Module) -> nn.Module:
    """Put the layers back that adapters were put around; returns ``model``."""
    for name, layer in list(_layers(model)):
        if hasattr(layer, "base_layer"):
            above, _, own = name.rpartition(".")
            setattr(model.get_submodule(above), own, layer.get_base_layer())
    return model


def get_adapter_name(model: nn.Module) -> str:
    """A name that the next adapter of ``model`` may have."""
    return next((f"default_{len(layer.r)}" for _, layer in _layers(model)), "default_0")


def set_adapter_layers(model: nn.Module, enabled: bool = True) -> None:
    """Switch all adapters on or off."""
    for _, layer in _layers(model):
        layer.enable_adapters(enabled=enabled)


def delete_adapter_layers(model: nn.Module, adapter_name: str) -> None:
    """Remove one adapter for good."""
    for _, layer in _layers(model):
        layer.delete_adapter(adapter_name)
    configs = getattr(model, "peft_config", None)
    if getattr(model, "_hf_peft_config_loaded", False) and configs is not None:
        configs.pop(adapter_name, None)
        if not configs:
            del model.peft_config
            model._hf_peft_config_loaded = None  # type: ignore[assignment]


def set_weights_and_activate_adapters(
    model: nn.Module, adapter_names: Sequence[str], weights: Sequence[float | Mapping[str, float]]
) -> None:
    """Use ``adapter_names``, each with its weight: one number, or one for each part of the layers' names."""
    for name, layer in _layers(model):
        layer.set_adapter(adapter_names)
        for adapter, weight in zip(adapter_names, weights, strict=False):
            layer.set_scale(adapter, weight if not isinstance(weight, Mapping) else _weight_of(weight, name))


def _weight_of(weights: Mapping[str, float], name: str) -> float:
    found = next((w for part, w in weights.items() if part in name), None)
    if found is not None:
        return found
    parts = name.split(".")
    return weights.get(f"{parts[0]}.{parts[1]}.attentions.{parts[3]}", 1.0) if len(parts) > 3 else 1.0


def check_peft_version(min_version: str) -> None:
    """Raise ``ValueError`` if ``peft`` is missing or older."""
    if not is_version("peft", ">=", min_version):
        raise ValueError(f"this needs the package peft, {min_version} or newer: pip install 'effusion[training]'")
