"""A face's parameters are the peer's, with the same defaults."""

from __future__ import annotations

import inspect

import diffusers
import pytest

from effusion.core import registry
from effusion.pipelines.faces import FACES

NAMES = [name for tasks in FACES.values() for name in tasks.values() if hasattr(diffusers, name)]


def parameters(function: object) -> list[tuple[str, object, object]]:
    return [(p.name, p.default, p.kind) for p in inspect.signature(function).parameters.values()]  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", ["__init__", "__call__"])
def test_parameters_equal_the_peers(name: str, method: str) -> None:
    ours, theirs = registry.find_class("diffusers", name), getattr(diffusers, name)
    assert parameters(getattr(ours, method)) == parameters(getattr(theirs, method))


@pytest.mark.parametrize("name", NAMES)
def test_encode_prompt_equals_the_peers(name: str) -> None:
    ours, theirs = registry.find_class("diffusers", name), getattr(diffusers, name)
    if hasattr(theirs, "encode_prompt"):
        assert parameters(ours.encode_prompt) == parameters(theirs.encode_prompt)


@pytest.mark.parametrize("name", NAMES)
def test_class_facts_equal_the_peers(name: str) -> None:
    ours, theirs = registry.find_class("diffusers", name), getattr(diffusers, name)
    for fact in ("model_cpu_offload_seq", "_exclude_from_cpu_offload", "config_name"):
        assert getattr(ours, fact) == getattr(theirs, fact)
    assert sorted(ours._optional_components) == sorted(theirs._optional_components)
    if hasattr(theirs, "_callback_tensor_inputs"):
        assert sorted(ours._callback_tensor_inputs) == sorted(theirs._callback_tensor_inputs)
