"""The demo's data: captioned pictures of coloured shapes, rendered on the fly, the same for the same seed.

A :class:`Scenes` is a batch of what is to be seen (which shapes, colours, sizes, relation, background);
:func:`render` paints it, :func:`captions` says it. Some (colour, shape) pairs and a tenth of all other
scenes are never sampled for training, so that a score can be taken on captions the model has not met.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

IMAGE_SIZE = 64
COLOURS = {
    "red": (220, 30, 30),
    "orange": (255, 140, 20),
    "yellow": (250, 225, 40),
    "green": (30, 160, 50),
    "cyan": (60, 215, 230),
    "blue": (30, 60, 220),
    "purple": (130, 40, 170),
    "pink": (255, 130, 190),
}
BACKGROUNDS = {"white": (255, 255, 255), "black": (12, 12, 12), "gray": (128, 128, 128), "brown": (105, 65, 30)}
SHAPES = ("circle", "square", "triangle", "star", "cross")
SIZES = ("small", "large")
RELATIONS = ("above", "below", "left of", "right of")
HELD_OUT_PAIRS = (
    ("red", "cross"),
    ("blue", "triangle"),
    ("green", "star"),
    ("yellow", "square"),
    ("pink", "circle"),
)

_RADII = torch.tensor([[6.5, 8.0], [11.0, 13.0]])  # pixels: the least and the greatest of small, of large
_GAP = 4.0  # least pixels between two shapes
_EDGE = 2.0  # least pixels between a shape and the border


@dataclass(frozen=True)
class Scenes:
    """``N`` scenes as integer tensors: indices into ``SIZES``, ``COLOURS``, ``SHAPES``, ``RELATIONS``, ``BACKGROUNDS``.

    ``count`` (N,) is 1 or 2; the second column of ``size``, ``colour``, ``shape`` (N, 2) and ``relation``
    (N,) mean nothing where it is 1.
    """

    count: Tensor
    size: Tensor
    colour: Tensor
    shape: Tensor
    relation: Tensor
    background: Tensor

    def __len__(self) -> int:
        return len(self.count)

    def __getitem__(self, index: Tensor | slice) -> Scenes:
        return Scenes(*(getattr(self, f.name)[index] for f in fields(self)))

    @staticmethod
    def cat(parts: list[Scenes]) -> Scenes:
        """One batch of several."""
        return Scenes(*(torch.cat([getattr(p, f.name) for p in parts]) for f in fields(Scenes)))

    def number(self) -> Tensor:
        """(N,) int64: one number for each scene that can be told apart by its full caption."""
        two = self.count == 2
        first = (self.size[:, 0] * 8 + self.colour[:, 0]) * 5 + self.shape[:, 0]
        second = ((self.size[:, 1] * 8 + self.colour[:, 1]) * 5 + self.shape[:, 1]) * 4 + self.relation
        return (first * 4 + self.background) * 321 + torch.where(two, 1 + second, 0)

    def has_held_out_pair(self) -> Tensor:
        """(N,) bool: a shape of the scene is one of ``HELD_OUT_PAIRS``."""
        held = _held_out_table()[self.colour, self.shape]  # (N, 2)
        held[:, 1] &= self.count == 2
        return held.any(dim=1)

    def is_for_testing(self) -> Tensor:
        """(N,) bool: never sampled for training - a held-out pair, or one of the tenth of numbers set apart."""
        mixed = (self.number() * 2654435761) % 2**32  # Knuth's multiplicative hash: neighbours are scattered
        return ((mixed >> 16) % 10 == 0) | self.has_held_out_pair()

    def seen_from_the_other(self, which: Tensor) -> Scenes:
        """The same pictures, said the other way round where ``which`` (N,): *a above b* becomes *b below a*.

        Nothing changes where there is one shape, or where the other way is a caption set apart for testing.
        """
        flipped = Scenes(
            self.count,
            self.size.flip(1),
            self.colour.flip(1),
            self.shape.flip(1),
            self.relation ^ 1,
            self.background,
        )
        take = which & (self.count == 2) & ~flipped.is_for_testing()
        pairs = ((getattr(flipped, f.name), getattr(self, f.name)) for f in fields(self))
        return Scenes(*(torch.where(take.view(-1, *(1,) * (a.dim() - 1)), a, b) for a, b in pairs))


@dataclass(frozen=True)
class Wording:
    """Which optional words a caption has; (N,) and (N, 2) bool tensors, all true for the full caption."""

    sizes: Tensor
    background: Tensor
    to_the: Tensor


def _held_out_table() -> Tensor:
    table = torch.zeros(len(COLOURS), len(SHAPES), dtype=torch.bool)
    names = list(COLOURS)
    for colour, shape in HELD_OUT_PAIRS:
        table[names.index(colour), SHAPES.index(shape)] = True
    return table


def generator(seed: int, step: int = 0) -> torch.Generator:
    """A CPU generator for ``(seed, step)``; different steps have unrelated streams."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step * 7_919 + 12_345) % 2**63)


def _draw(n: int, g: torch.Generator, single: float) -> Scenes:
    return Scenes(
        count=2 - (torch.rand(n, generator=g) < single).long(),
        size=torch.randint(2, (n, 2), generator=g),
        colour=torch.randint(len(COLOURS), (n, 2), generator=g),
        shape=torch.randint(len(SHAPES), (n, 2), generator=g),
        relation=torch.randint(len(RELATIONS), (n,), generator=g),
        background=torch.randint(len(BACKGROUNDS), (n,), generator=g),
    )


def sample(n: int, g: torch.Generator, split: str = "train", single: float = 0.25) -> Scenes:
    """``n`` scenes of a split: ``train``, ``test`` (seen pairs, unseen captions) or ``pairs`` (one held out in each).

    Args:
        single: share of scenes with one shape.

    Raises:
        ValueError: an unknown split.
    """
    if split not in ("train", "test", "pairs"):
        raise ValueError(f"split {split!r}: one of 'train', 'test', 'pairs'")
    parts: list[Scenes] = []
    found = 0
    while found < n:
        drawn = _draw(2 * n + 16, g, single)
        pair, testing = drawn.has_held_out_pair(), drawn.is_for_testing()
        keep = {"train": ~testing, "test": testing & ~pair, "pairs": pair}[split]
        parts.append(drawn[keep])
        found += int(keep.sum())
    return Scenes.cat(parts)[:n]


def wording(n: int, g: torch.Generator | None = None) -> Wording:
    """Optional words: all of them without a generator, else each left out now and then, as people do."""
    if g is None:
        yes = torch.ones(n, dtype=torch.bool)
        return Wording(yes[:, None].expand(n, 2), yes, ~yes)
    drawn = torch.rand(n, 4, generator=g)
    return Wording(drawn[:, :2] > 0.08, drawn[:, 2] > 0.08, drawn[:, 3] > 0.5)


def captions(scenes: Scenes, words: Wording | None = None) -> list[str]:
    """What each scene shows, e.g. ``a small red circle above a large blue square on a white background``."""
    words = words or wording(len(scenes))
    colours, backgrounds = list(COLOURS), list(BACKGROUNDS)
    columns = [getattr(scenes, f.name).tolist() for f in fields(scenes)]
    rows = zip(*columns, words.sizes.tolist(), words.background.tolist(), words.to_the.tolist(), strict=True)
    out = []
    for count, size, colour, shape, relation, background, say_size, say_background, to_the in rows:
        things = []
        for i in range(count):
            noun = f"{colours[colour[i]]} {SHAPES[shape[i]]}"
            article = "an" if not say_size[i] and noun[0] in "aeiou" else "a"
            things.append(f"{article} {SIZES[size[i]]} {noun}" if say_size[i] else f"{article} {noun}")
        name = RELATIONS[relation]
        link = f" to the {name} " if to_the and " " in name else f" {name} "
        ending = f" on a {backgrounds[background]} background" if say_background else ""
        out.append(link.join(things) + ending)
    return out


def place(scenes: Scenes, g: torch.Generator, size: int = IMAGE_SIZE) -> tuple[Tensor, Tensor]:
    """Where the shapes are and how large: centres (N, 2, 2) as x, y and radii (N, 2), in pixels.

    Shapes keep a gap between each other and to the border; the relation holds along one axis, and
    the shapes are nearly level along the other, so that no two relations are true at once.
    """
    n, unit = len(scenes), size / IMAGE_SIZE
    low, high = (_RADII[scenes.size] * unit).unbind(dim=-1)  # (N, 2) each
    radius = low + (high - low) * torch.rand(n, 2, generator=g)
    free = (size / 2 - radius - _EDGE * unit).clamp(min=0)  # how far from the middle a centre may be
    alone = (torch.rand(n, 2, generator=g) * 2 - 1) * free[:, :1]  # (N, 2): x, y

    # along the axis of the relation: border, first, gap, second, border; the slack is shared at random
    need = 2 * radius.sum(dim=1) + (_GAP + 2 * _EDGE) * unit
    slack = (size - need)[:, None] * torch.rand(n, 2, generator=g).sort(dim=1).values
    near = _EDGE * unit + slack[:, 0] + radius[:, 0] - size / 2
    far = near + radius.sum(dim=1) + _GAP * unit + (slack[:, 1] - slack[:, 0])
    swap = (scenes.relation % 2 == 1)[:, None]  # below, right of: the first one is the far one
    along = torch.where(swap, -torch.stack([near, far], dim=1), torch.stack([near, far], dim=1))
    level = (torch.rand(n, 1, generator=g) * 2 - 1) * free.min(dim=1, keepdim=True).values.clamp(max=14 * unit)
    across = level + (torch.rand(n, 2, generator=g) * 2 - 1) * 3 * unit
    across = torch.maximum(torch.minimum(across, free), -free)
    vertical = (scenes.relation < 2)[:, None]
    pair = torch.stack([torch.where(vertical, across, along), torch.where(vertical, along, across)], dim=-1)
    centre = torch.where((scenes.count == 2)[:, None, None], pair, alone[:, None, :].expand(n, 2, 2))
    return centre + size / 2, radius


def _distance(kind: int, x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Signed distance in pixels from ``(x, y)`` to the edge of ``SHAPES[kind]`` of radius ``r``; negative inside."""
    name = SHAPES[kind]
    if name == "circle":
        return torch.hypot(x, y) - r
    if name == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.9 * r
    if name == "triangle":  # two slopes of 2:1 on a base
        return torch.maximum(y - 0.9 * r, (2 * x.abs() - y - 0.9 * r) / math.hypot(2.0, 1.0))
    if name == "cross":
        long, wide = torch.maximum(x.abs(), y.abs()) - r, torch.minimum(x.abs(), y.abs()) - 0.34 * r
        return torch.maximum(long, wide)
    # star: fold the plane into one wedge of 36 degrees, where the edge is one line from a tip to a notch
    wedge = math.pi / 5
    turn = torch.atan2(x, -y)
    turn = (turn - torch.round(turn / (2 * wedge)) * 2 * wedge).abs()
    u, v = torch.hypot(x, y) * torch.cos(turn), torch.hypot(x, y) * torch.sin(turn)
    notch_u, notch_v = 0.45 * math.cos(wedge), 0.45 * math.sin(wedge)
    return ((u - 1.05 * r) * notch_v + v * (1.0 - notch_u)) / math.hypot(1.0 - notch_u, notch_v)


def render(scenes: Scenes, g: torch.Generator, size: int = IMAGE_SIZE) -> Tensor:
    """Paint the scenes, antialiased, at places and exact sizes drawn from ``g``: (N, 3, size, size) in [-1, 1]."""
    centre, radius = place(scenes, g, size)
    grid = torch.arange(size, dtype=torch.float32) + 0.5
    palette = torch.tensor(list(COLOURS.values())) / 127.5 - 1.0
    ground = torch.tensor(list(BACKGROUNDS.values())) / 127.5 - 1.0
    image = ground[scenes.background][:, :, None, None].expand(-1, 3, size, size)  # (N, 3, H, W)
    for i in range(2):
        x = (grid[None, None, :] - centre[:, i, 0, None, None]).expand(-1, size, size)
        y = (grid[None, :, None] - centre[:, i, 1, None, None]).expand(-1, size, size)
        cover = torch.zeros_like(x)
        for k in range(len(SHAPES)):  # only the pictures that have this shape
            rows = (scenes.shape[:, i] == k) & (scenes.count > i)
            if rows.any():
                cover[rows] = (0.5 - _distance(k, x[rows], y[rows], radius[rows, i, None, None])).clamp(0, 1)
        image = image + cover[:, None] * (palette[scenes.colour[:, i]][:, :, None, None] - image)
    return image.contiguous()
