"""Linear layers on the CPU by oneDNN, which applies the activation while the result is in the cache.

``F.linear`` copies the bias to fresh memory, adds the product, and leaves the activation to another pass.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def serves(layer: nn.Module, x: Tensor) -> bool:
    """Whether :func:`linear` may stand for a call of ``layer``: in single precision, and nobody would notice.

    Not where gradients are recorded, code is compiled or traced, operators are watched (shapes without values,
    counters), or ``layer`` is more than a linear layer (hooks, adapters, packed weights).
    """
    return bool(
        type(layer) is nn.Linear
        and type(x) is Tensor
        and x.device.type == "cpu"
        and x.dtype == layer.weight.dtype == torch.float32
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch._C._get_tracing_state()
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._len_torch_dispatch_stack()
        and not (layer._forward_hooks or layer._forward_pre_hooks)
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none", approximate: str = "") -> Tensor:
    """``activation(x W^T + b)``: ``(…, I), (O, I), (O) -> (…, O)``; ``"none"`` or ``"gelu"`` with its approximation."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], approximate)  # type: ignore[no-any-return]
