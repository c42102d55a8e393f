"""Small networks that do what real ones do to a memory engine: ties, peeks, views, buffers, channels-last weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.gate = nn.Parameter(torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gate * self.down(torch.relu(self.up(self.norm(x))))


class Net(nn.Module):
    """A transformer-like toy: ``(B, width) -> (B, width), (1, 4, B, width)``."""

    def __init__(self, width: int = 16, depth: int = 5) -> None:
        super().__init__()
        self.enter = nn.Linear(width, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.position = nn.Parameter(torch.randn(width))
        self.leave = nn.Linear(width, width)
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.register_buffer("shift", torch.randn(width), persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.enter(x) + self.position
        for block in self.blocks:
            x = block(x)
        x = self.leave(x) + self.shift
        return x, self.conv(torch.stack([x, x])[None])


class Tied(nn.Module):
    """Input and output embeddings are one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.body = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.body:
            x = layer(x)
        return self.head(x)


class Peeking(nn.Module):
    """Reads the weight of a child without calling it, as attention in torch and T5 in transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.last = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.inner.weight.dtype)
        x = nn.functional.linear(x, self.inner.weight, self.inner.bias)
        x, _ = self.attention(x, x, x)
        return self.last(x)


class Table(nn.Module):
    """Returns a view of its own weight."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(6, 4))

    def forward(self, n: int) -> Tensor:
        return self.table[:n]


class Views(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(Table() for _ in range(4))

    def forward(self, n: int) -> Tensor:
        views = [table(n) for table in self.tables]
        return torch.cat(views)


class Fails(nn.Module):
    """Raises in the middle when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(8) for _ in range(4))
        self.fail_at: int | None = None
        self.error: Any = RuntimeError("in the middle")

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i == self.fail_at:
                raise self.error
        return x


class Coder(nn.Module):
    """Used by methods, never called: an autoencoder, with a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(1))
        self.encoder = nn.Sequential(nn.Linear(6, 3), nn.SiLU(), nn.Linear(3, 3))
        self.decoder = nn.Sequential(nn.Linear(3, 6), nn.SiLU(), nn.Linear(6, 6))

    def encode(self, x: Tensor) -> Tensor:
        return self.encoder(x) * self.scale

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z / self.scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))
