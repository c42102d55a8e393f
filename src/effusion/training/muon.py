"""Muon (Jordan et al., 2024): momentum whose matrices are made orthogonal before they are applied."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

_QUINTIC = (3.4445, -4.7750, 2.0315)  # steep at 0, so that five rounds bring all singular values near 1


def orthogonalise(matrix: Tensor, rounds: int = 5) -> Tensor:
    """About ``U Vᵀ`` of the singular value decomposition of ``matrix`` (m, n), by Newton-Schulz rounds in bfloat16."""
    a, b, c = _QUINTIC
    x = matrix.bfloat16()
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / (x.norm() + 1e-7)
    for _ in range(rounds):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if tall else x).to(matrix.dtype)


def orthogonalised(tensors: list[Tensor]) -> list[Tensor]:
    """:func:`orthogonalise` of each, as a matrix in bfloat16; processes, whose gradients agree, do a share each."""
    flat = [t.flatten(1).bfloat16() for t in tensors]
    processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if processes == 1:
        return [orthogonalise(m) for m in flat]
    here = torch.distributed.get_rank()
    parts = [orthogonalise(m) if i % processes == here else torch.zeros_like(m) for i, m in enumerate(flat)]
    together = torch.cat([part.flatten() for part in parts])
    torch.distributed.all_reduce(together)  # each entry is one process's own, zero in the others
    return [t.view_as(m) for t, m in zip(together.split([m.numel() for m in flat]), flat, strict=True)]


def matrices(module: nn.Module) -> list[nn.Parameter]:
    """The trainable weights of linear and convolution layers of ``module``: what Muon is for."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    found = [m.weight for m in module.modules() if isinstance(m, kinds)]
    return [p for p in found if isinstance(p, nn.Parameter) and p.requires_grad]


class Muon(torch.optim.Optimizer):
    """Steps of equal size in every direction of each weight matrix; convolutions count as ``(out, in * kernel)``.

    Args:
        params: weights of two or more axes; give vectors and embeddings to another optimiser.
        lr: size of a step; 0.02 suits most networks.
        momentum: Nesterov's.
        weight_decay: decoupled, times ``lr``.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float = 0.02, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        params = list(params)
        if any(p.ndim < 2 for p in params):
            raise ValueError("Muon is for weights of two or more axes; give the others to AdamW")
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step on the gradients at hand."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            gradients = [self._averaged(p, group["momentum"]) for p in params]
            for p, push in zip(params, orthogonalised(gradients), strict=True):
                rate = group["lr"] * max(1.0, push.shape[0] / push.shape[1]) ** 0.5
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(push.view_as(p), alpha=-rate)
        return loss

    def _averaged(self, p: Tensor, beta: float) -> Tensor:
        """Nesterov's momentum, with the gradient at hand taken in."""
        assert p.grad is not None
        state = self.state[p]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(p)
        state["momentum"].lerp_(p.grad, 1 - beta)
        return p.grad.lerp(state["momentum"], beta)
