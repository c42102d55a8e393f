"""Hooks around ``forward``, in the order and with the results of the peer's."""

from __future__ import annotations

from typing import Any

import diffusers.hooks as peer
import effusion.hooks as ours
import pytest
import torch
from torch import nn

LIBRARIES = [ours, peer]


def hooks(library: Any) -> dict[str, Any]:
    class Add(library.ModelHook):  # type: ignore[misc, name-defined]
        def __init__(self, amount: float) -> None:
            super().__init__()
            self.amount = amount

        def pre_forward(self, module: nn.Module, x: torch.Tensor, **kwargs: Any) -> Any:
            return (x + self.amount,), kwargs

    class Scale(Add):
        _is_stateful = True
        calls = 0

        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return args, kwargs

        def post_forward(self, module: nn.Module, output: Any) -> Any:
            self.calls += 1
            return output * self.amount

        def reset_state(self, module: nn.Module) -> nn.Module:
            self.calls = 0
            return module

    class Twice(library.ModelHook):  # type: ignore[misc, name-defined]
        def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return self.fn_ref.original_forward(*args, **kwargs) + self.fn_ref.original_forward(*args, **kwargs)

    class Tracked(library.ModelHook):  # type: ignore[misc, name-defined]
        def initialize_hook(self, module: nn.Module) -> nn.Module:
            module.log = ["on"]
            return module

        def deinitalize_hook(self, module: nn.Module) -> nn.Module:
            module.log.append("off")
            return module

    return {"add": Add(1.0), "scale": Scale(3.0), "twice": Twice(), "tracked": Tracked(), "more": Add(0.25)}


def run(library: Any, order: list[str], removed: list[str]) -> list[torch.Tensor]:
    model = nn.Linear(2, 2)
    nn.init.constant_(model.weight, 0.5)
    nn.init.constant_(model.bias, 0.1)
    x, made = torch.ones(1, 2), hooks(library)
    registry = library.HookRegistry.check_if_exists_or_initialize(model)
    assert library.HookRegistry.check_if_exists_or_initialize(model) is registry
    results = [model(x)]
    for name in order:
        registry.register_hook(made[name], name)
        results.append(model(x))
    for name in removed:
        registry.remove_hook(name)
        assert registry.get_hook(name) is None
        results.append(model(x))
    return results


@pytest.mark.parametrize(
    "order", [["add", "scale"], ["scale", "add", "more"], ["twice", "add"], ["add", "twice", "scale"]]
)
def test_chains_give_what_the_peers_give(order: list[str]) -> None:
    for removed in (order, order[::-1], order[1:2]):
        if order[:2] == ["add", "twice"] and removed[0] == "add":
            continue  # there the peer takes the replacement out too
        a, b = (run(library, order, removed) for library in LIBRARIES)
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_hook_below_a_replacement_can_be_removed() -> None:
    start, _, both, without = run(ours, ["add", "twice"], ["add"])
    assert torch.equal(without, 2 * start)
    assert not torch.equal(both, without)


def test_the_module_is_as_before_once_all_are_removed() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    made = hooks(ours)
    registries = [ours.HookRegistry.check_if_exists_or_initialize(m) for m in (model, model[0])]
    for registry in registries:
        registry.register_hook(made["tracked"], "tracked")
    assert "tracked" in repr(registries[0])
    with pytest.raises(ValueError, match="remove it first"):
        registries[0].register_hook(made["add"], "tracked")
    registries[0].remove_hook("tracked", recurse=True)
    assert model.log == model[0].log == ["on", "off"]
    assert "forward" not in vars(model) and "forward" not in vars(model[0])


def test_states_are_reset_below_too() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    above = ours.HookRegistry.check_if_exists_or_initialize(model)
    below, hook = ours.HookRegistry.check_if_exists_or_initialize(model[0]), hooks(ours)["scale"]
    below.register_hook(hook, "scale")
    model(torch.ones(1, 2))
    assert hook.calls == 1
    above.reset_stateful_hooks()
    assert hook.calls == 0

    class Forgetful(ours.ModelHook):  # type: ignore[misc, name-defined]
        _is_stateful = True

    above.register_hook(Forgetful(), "forgetful")
    with pytest.raises(NotImplementedError, match="Forgetful"):
        above.reset_stateful_hooks()
