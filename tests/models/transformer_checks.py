"""What every transformer has to stand, beside giving the peer's numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from .parity import assert_close

Inputs = Mapping[str, Any]


def run(model: nn.Module, inputs: Inputs) -> Tensor:
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0]


def check_fusing(model: Any, inputs: Inputs) -> None:
    """Fused projections give the same, keep the names of the weights, and come apart bit for bit."""
    before, state = run(model, inputs), {k: v.clone() for k, v in model.state_dict().items()}
    model.fuse_qkv_projections()
    assert any(name.endswith("to_qkv.weight") for name, _ in model.named_parameters())
    assert not any(name.endswith("attn.to_q.weight") for name, _ in model.named_parameters())
    assert_close(run(model, inputs), before, 1e-6)
    assert model.state_dict().keys() == state.keys()
    model.load_state_dict(state, strict=True)
    model.unfuse_qkv_projections()
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(run(model, inputs), before)


def check_checkpointing(model: Any, inputs: Inputs) -> None:
    """Recomputing blocks in the backward pass gives the same gradients and keeps fewer activations."""

    def gradients() -> tuple[list[Tensor], int]:
        kept = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal kept
            kept += tensor.numel()
            return tensor

        model.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = model(**inputs, return_dict=False)[0]
        out.square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None], kept

    plain, much = gradients()
    model.enable_gradient_checkpointing()
    again, little = gradients()
    model.disable_gradient_checkpointing()
    assert len(plain) == len(again) > 10
    assert little < much / 2
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a, b)


def check_compiling(model: Any, inputs: Inputs) -> None:
    """Each repeated block is one graph, and so is the network; the numbers stay."""
    before = run(model, inputs)
    torch._dynamo.reset()
    assert_close(run(torch.compile(model, backend="eager", fullgraph=True), inputs), before, 1e-5)
    torch._dynamo.reset()
    compiled = 0
    for module in model.modules():
        if type(module).__name__ in (model._repeated_blocks or model._no_split_modules):
            module.compile(backend="aot_eager", fullgraph=True)
            compiled += 1
    assert compiled
    assert_close(run(model, inputs), before, 1e-5)
    for module in model.modules():
        module._compiled_call_impl = None


def check_fake(make: Callable[[], Any], inputs: Inputs, shape: torch.Size) -> None:
    """Runs without data, also when it ran with data before."""
    model = make()
    run(model, inputs)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fake_inputs = tree_map(lambda v: mode.from_tensor(v) if isinstance(v, Tensor) else v, dict(inputs))
        fake = make()
        assert run(fake, fake_inputs).shape == shape
    assert type(run(model, inputs)) is Tensor


class Hoist(TorchFunctionMode):
    """An operation with an argument on ``meta`` happens there, any other one really; counts real matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.real: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors: list[Tensor] = []
        tree_map(lambda v: tensors.append(v) if isinstance(v, Tensor) else None, (args, kwargs))
        if any(t.is_meta for t in tensors):
            args, kwargs = tree_map(lambda v: v.to("meta") if isinstance(v, Tensor) else v, (args, kwargs))
            kwargs = {k: "meta" if k == "device" else v for k, v in kwargs.items()}
        elif func is nn.functional.linear:
            self.real.add(id(args[1]))
        return func(*args, **kwargs)


def hoistable(model: nn.Module, inputs: Inputs, latents: str = "hidden_states") -> set[str]:
    """Names of the linear layers that do not depend on the latents."""
    names = {id(m.weight): name for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    with torch.no_grad(), Hoist() as mode:
        out = model(**{**inputs, latents: inputs[latents].to("meta")}, return_dict=False)[0]
    assert out.is_meta
    return {names[i] for i in mode.real if i in names}
