"""The feed-forward half of a transformer block, with the activations and gates in use (Shazeer, 2020)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import fresh, host

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "swish": nn.SiLU,
    "silu": nn.SiLU,
    "mish": nn.Mish,
    "gelu": nn.GELU,
    "relu": nn.ReLU,
}


def activation(name: str) -> nn.Module:
    """The activation called ``name`` in a configuration.

    Raises:
        ValueError: an unknown name.
    """
    if name.lower() not in ACTIVATIONS:
        raise ValueError(f"activation {name!r} is unknown; there are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name.lower()]()


def get_activation(act_fn: str) -> nn.Module:
    """:func:`activation` under the ecosystem's name."""
    return activation(act_fn)


class FP32SiLU(nn.Module):
    """SiLU in float32."""

    def forward(self, inputs: Tensor) -> Tensor:
        return F.silu(inputs.float()).to(inputs.dtype)


class GELU(nn.Module):
    """Linear, then GELU (Hendrycks & Gimpel, 2016), exact or with ``approximate="tanh"``."""

    def __init__(self, dim_in: int, dim_out: int, approximate: str = "none", bias: bool = True) -> None:
        super().__init__()
        self.proj = nn.Linear(dim_in, dim_out, bias=bias)
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        if host.serves(self.proj, x):
            return host.linear(x, self.proj.weight, self.proj.bias, "gelu", self.approximate)
        x = self.proj(x)
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return F.gelu(x, approximate=self.approximate)
        return torch.ops.aten.gelu_(x, approximate=self.approximate)  # type: ignore[no-any-return]  # x is nobody else's


def gelu_beside(x: Tensor, y: Tensor) -> Tensor:
    """``x`` and behind it the tanh-approximate GELU of ``y`` as one tensor: ``(…, D), (…, E) -> (…, D + E)``."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return torch.cat((x, F.gelu(y, approximate="tanh")), dim=-1)
    width = x.shape[-1]
    both = y.new_empty(*y.shape[:-1], width + y.shape[-1])
    both[..., :width] = x
    torch.ops.aten.gelu.out(y, approximate="tanh", out=both[..., width:])
    return both


class ApproximateGELU(nn.Module):
    """Linear, then ``x * sigmoid(1.702 x)``, the cheap GELU of the same paper."""

    def __init__(self, dim_in: int, dim_out: int, bias: bool = True) -> None:
        super().__init__()
        self.proj = nn.Linear(dim_in, dim_out, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x)
        return x * torch.sigmoid(1.702 * x)


class LinearActivation(nn.Module):
    """Linear, then an activation without parameters."""

    def __init__(self, dim_in: int, dim_out: int, bias: bool = True, activation: str = "silu") -> None:
        super().__init__()
        self.proj = nn.Linear(dim_in, dim_out, bias=bias)
        self.activation = nn.SiLU() if activation == "silu" else nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.proj(x))  # type: ignore[no-any-return]


class GEGLU(nn.Module):
    """GELU-gated linear unit; one projection makes values and gates."""

    def __init__(self, dim_in: int, dim_out: int, bias: bool = True) -> None:
        super().__init__()
        self.proj = nn.Linear(dim_in, dim_out * 2, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        if host.serves(self.proj, x):
            (value, gate), bias = self.proj.weight.chunk(2), self.proj.bias
            of_value, of_gate = (None, None) if bias is None else bias.chunk(2)
            return host.linear(x, gate, of_gate, "gelu", "none").mul_(host.linear(x, value, of_value))
        value, gate = self.proj(x).chunk(2, dim=-1)
        return fresh.mul(F.gelu(gate), value)


class SwiGLU(nn.Module):
    """SiLU-gated linear unit."""

    def __init__(self, dim_in: int, dim_out: int, bias: bool = True) -> None:
        super().__init__()
        self.proj = nn.Linear(dim_in, dim_out * 2, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return fresh.mul(F.silu(gate), value)


_FIRST: dict[str, Callable[[int, int, bool], nn.Module]] = {
    "gelu": lambda i, o, b: GELU(i, o, bias=b),
    "gelu-approximate": lambda i, o, b: GELU(i, o, approximate="tanh", bias=b),
    "geglu": lambda i, o, b: GEGLU(i, o, bias=b),
    "geglu-approximate": lambda i, o, b: ApproximateGELU(i, o, bias=b),
    "swiglu": lambda i, o, b: SwiGLU(i, o, bias=b),
    "linear-silu": lambda i, o, b: LinearActivation(i, o, bias=b),
    "relu": lambda i, o, b: LinearActivation(i, o, bias=b, activation="relu"),
}


class FeedForward(nn.Module):
    """Projection with activation, dropout, projection: ``(…, dim) -> (…, dim_out)``.

    Raises:
        ValueError: an unknown ``activation_fn``.
    """

    def __init__(
        self,
        dim: int,
        dim_out: int | None = None,
        mult: int = 4,
        dropout: float = 0.0,
        activation_fn: str = "geglu",
        final_dropout: bool = False,
        inner_dim: int | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if activation_fn not in _FIRST:
            raise ValueError(f"activation_fn {activation_fn!r} is unknown; there are {', '.join(_FIRST)}")
        inner = int(dim * mult) if inner_dim is None else inner_dim
        out = dim if dim_out is None else dim_out
        layers = [_FIRST[activation_fn](dim, inner, bias), nn.Dropout(dropout), nn.Linear(inner, out, bias=bias)]
        self.net = nn.ModuleList(layers + [nn.Dropout(dropout)] * final_dropout)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.net:
            x = layer(x)
        return x


def chunked(ff: nn.Module, x: Tensor, size: int | None, dim: int = 1) -> Tensor:
    """``ff(x)``, computed for ``size`` positions along ``dim`` at a time (all at once if ``None``)."""
    if size is None:
        return ff(x)  # type: ignore[no-any-return]
    return torch.cat([ff(part) for part in x.split(size, dim=dim)], dim=dim)
