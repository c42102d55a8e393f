"""An independent reader of the demo's pictures: what is really to be seen, by classical image analysis.

Nothing here comes from the code that paints the pictures. A picture is cut into connected regions that differ from the
colour of its border; a region's colour is its nearest palette colour, its shape the polygon that overlaps it
best when both have the same centroid and area, its size the radius of that polygon. A little blur and
wrong colour, as generated pictures have them, do no harm.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

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
GROUNDS = {"white": (255, 255, 255), "black": (12, 12, 12), "gray": (128, 128, 128), "brown": (105, 65, 30)}
ATTRIBUTES = ("colour", "shape", "size", "relation", "background")
SIDE = 64  # pixels; radii below are for this side
LARGE = 9.5  # radius from which a shape is large
CONTRAST = 60.0  # distance in RGB from the border's colour that makes a pixel foreground
LEAST_AREA = 25  # pixels; smaller regions are specks


@dataclass(frozen=True)
class Thing:
    """One shape, as read or as demanded; ``x``, ``y`` is its centroid and ``radius`` its radius, in pixels."""

    size: str | None
    colour: str
    shape: str
    x: float = 0.0
    y: float = 0.0
    radius: float = 0.0


@dataclass(frozen=True)
class Reading:
    """What a picture shows: its background and its shapes, the largest first."""

    background: str
    things: tuple[Thing, ...]


@dataclass(frozen=True)
class Demand:
    """What a caption asks for; ``None`` where it says nothing."""

    things: tuple[Thing, ...]
    relation: str | None
    background: str | None


# -- reading pictures ----------------------------------------------------------------------------------


def _polygons() -> dict[str, Array]:
    """The outline of each shape for radius 1, (V, 2) as x, y with y downwards."""
    turn = np.linspace(0, 2 * np.pi, 36, endpoint=False)
    tips = np.arange(10) * np.pi / 5
    reach = np.where(np.arange(10) % 2 == 0, 1.05, 0.47)
    a = 0.34
    return {
        "circle": np.stack([np.cos(turn), np.sin(turn)], axis=1),
        "square": 0.9 * np.array([[-1.0, -1], [1, -1], [1, 1], [-1, 1]]),
        "triangle": 0.9 * np.array([[0.0, -1], [1, 1], [-1, 1]]),
        "star": np.stack([reach * np.sin(tips), -reach * np.cos(tips)], axis=1),
        "cross": np.array(
            [[-a, -1], [a, -1], [a, -a], [1, -a], [1, a], [a, a], [a, 1], [-a, 1], [-a, a], [-1, a], [-1, -a], [-a, -a]]
        ),
    }


def _inside(polygon: Array, x: Array, y: Array) -> npt.NDArray[np.bool_]:
    """Even-odd rule: whether the points ``x``, ``y`` (any shape) are inside."""
    inside = np.zeros(x.shape, dtype=bool)
    for (x0, y0), (x1, y1) in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
        if y0 != y1:
            inside ^= ((y0 > y) != (y1 > y)) & (x < (x1 - x0) * (y - y0) / (y1 - y0) + x0)
    return inside


def _area_and_centroid(polygon: Array) -> tuple[float, Array]:
    following = np.roll(polygon, -1, axis=0)
    cross = polygon[:, 0] * following[:, 1] - following[:, 0] * polygon[:, 1]
    area = cross.sum() / 2
    return abs(float(area)), ((polygon + following) * cross[:, None]).sum(axis=0) / (6 * area)


@lru_cache(maxsize=1)
def _templates() -> dict[str, tuple[Array, float]]:
    """Shape -> outline around its centroid, and area, for radius 1."""
    out = {}
    for name, polygon in _polygons().items():
        area, centroid = _area_and_centroid(polygon)
        out[name] = (polygon - centroid, area)
    return out


def _regions(mask: npt.NDArray[np.bool_]) -> list[npt.NDArray[np.bool_]]:
    """The connected regions of ``mask`` (neighbours share a side), the largest first."""
    height, width = mask.shape
    left = {(int(y), int(x)) for y, x in zip(*np.nonzero(mask), strict=True)}
    found = []
    while left:
        stack, region = [left.pop()], np.zeros((height, width), dtype=bool)
        while stack:
            y, x = stack.pop()
            region[y, x] = True
            for neighbour in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                if neighbour in left:
                    left.remove(neighbour)
                    stack.append(neighbour)
        found.append(region)
    return sorted(found, key=lambda region: -int(region.sum()))


def _window(region: npt.NDArray[np.bool_]) -> tuple[slice, slice]:
    """The rows and columns of a region, with a margin."""
    ys, xs = np.nonzero(region)
    return slice(max(0, ys.min() - 3), ys.max() + 4), slice(max(0, xs.min() - 3), xs.max() + 4)


def _nearest(colour: Array, palette: dict[str, tuple[int, int, int]]) -> str:
    return min(palette, key=lambda name: float(np.square(colour - np.array(palette[name])).sum()))


def _grown(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    padded = np.pad(mask, 1)
    return padded[1:-1, 1:-1] | padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]


def _thing(pixels: Array, region: npt.NDArray[np.bool_], ground: Array) -> Thing:
    """Colour, shape, size and place of the region of a picture."""
    side = region.shape[0]
    rows, columns = _window(region)
    pixels, region = pixels[rows, columns], region[rows, columns]
    contrast = np.linalg.norm(pixels - ground, axis=-1)
    core = region & (contrast >= np.median(contrast[region]))
    colour = np.median(pixels[core], axis=0)
    along = colour - ground
    cover = np.clip((pixels - ground) @ along / (along @ along), 0, 1) * _grown(region)  # (h, w): share of each pixel
    area = cover.sum()
    ys, xs = np.mgrid[: region.shape[0], : region.shape[1]] + 0.5
    ys, xs = ys + rows.start, xs + columns.start
    x, y = float((cover * xs).sum() / area), float((cover * ys).sum() / area)
    scores = {}
    for name, (outline, unit) in _templates().items():
        ideal = _painted(outline * np.sqrt(area / unit) + (x, y), xs, ys)
        scores[name] = float(np.minimum(cover, ideal).sum() / np.maximum(cover, ideal).sum())
    shape = max(scores, key=lambda name: scores[name])
    radius = float(np.sqrt(area / _templates()[shape][1])) * SIDE / side
    return Thing("large" if radius >= LARGE else "small", _nearest(colour, COLOURS), shape, x, y, radius)


def _painted(outline: Array, xs: Array, ys: Array) -> Array:
    """Share of each pixel inside ``outline``, from 3x3 points."""
    steps = (-1 / 3, 0.0, 1 / 3)
    hits = [_inside(outline, xs + dx, ys + dy) for dx in steps for dy in steps]
    return np.asarray(np.mean(hits, axis=0), dtype=np.float64)


def read(picture: Any) -> Reading:
    """What is to be seen in ``picture``: a PIL image or an array (H, W, 3) of 0 to 255."""
    pixels = np.asarray(picture, dtype=np.float64)
    if pixels.ndim != 3 or pixels.shape[-1] != 3:
        raise ValueError(f"a picture has the shape (height, width, 3), not {pixels.shape}")
    border = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3)])
    border = np.concatenate([border, pixels[:, :2].reshape(-1, 3), pixels[:, -2:].reshape(-1, 3)])
    ground = np.median(border, axis=0)
    least = LEAST_AREA * (pixels.shape[0] / SIDE) ** 2
    regions = _regions(np.linalg.norm(pixels - ground, axis=-1) > CONTRAST)
    things = tuple(_thing(pixels, region, ground) for region in regions[:6] if region.sum() >= least)
    return Reading(_nearest(ground, GROUNDS), things)


# -- reading captions ----------------------------------------------------------------------------------

_NOUN = r"an? (?:(small|large) )?({}) ({})".format("|".join(COLOURS), "|".join(_polygons()))
_CAPTION = re.compile(
    rf"^{_NOUN}(?: (?:to the )?(above|below|left of|right of) {_NOUN})?(?: on an? ({'|'.join(GROUNDS)}) background)?$"
)


def demand(caption: str) -> Demand:
    """What ``caption`` asks for.

    Raises:
        ValueError: a caption that is not of the grammar.
    """
    match = _CAPTION.match(caption.strip().lower())
    if match is None:
        raise ValueError(f"{caption!r} is no caption of the demo, like 'a small red circle above a large blue square'")
    size, colour, shape, relation, size2, colour2, shape2, background = match.groups()
    things = [Thing(size, colour, shape)]
    if relation:
        things.append(Thing(size2, colour2, shape2))
    return Demand(tuple(things), relation, background)


# -- judging -------------------------------------------------------------------------------------------


def relation(first: Thing, second: Thing) -> str:
    """Where ``first`` is, seen from ``second``."""
    dx, dy = first.x - second.x, first.y - second.y
    if abs(dy) >= abs(dx):
        return "above" if dy < 0 else "below"
    return "left of" if dx < 0 else "right of"


def judge(caption: str | Demand, reading: Reading) -> dict[str, list[bool]]:
    """For each attribute, what is right and what is wrong in a picture; and ``whole``, everything and nothing more.

    Shapes of the picture are matched with those of the caption in the way that is best for the picture;
    a shape that is missing is wrong in everything, one too many only makes the whole wrong.
    """
    wanted = caption if isinstance(caption, Demand) else demand(caption)
    seen: tuple[Thing | None, ...] = reading.things[:4]
    seen += (None,) * (len(wanted.things) - len(seen))
    best = max((_match(wanted, order) for order in permutations(seen, len(wanted.things))), key=_rank)
    if wanted.background is not None:
        best["background"] = [wanted.background == reading.background]
    right = all(all(values) for values in best.values())
    best["whole"] = [right and len(reading.things) == len(wanted.things)]
    return best


def _match(wanted: Demand, order: tuple[Thing | None, ...]) -> dict[str, list[bool]]:
    out: dict[str, list[bool]] = {"colour": [], "shape": [], "size": []}
    for want, got in zip(wanted.things, order, strict=True):
        out["colour"].append(got is not None and got.colour == want.colour)
        out["shape"].append(got is not None and got.shape == want.shape)
        if want.size is not None:
            out["size"].append(got is not None and got.size == want.size)
    if wanted.relation is not None:
        first, second = order
        out["relation"] = [first is not None and second is not None and relation(first, second) == wanted.relation]
    return out


def _rank(marks: dict[str, list[bool]]) -> int:
    return sum(sum(values) for values in marks.values())


def tally(captions: Iterable[str], pictures: Iterable[Any]) -> dict[str, tuple[int, int]]:
    """Attribute (and ``whole``) -> how many are right, of how many, over pictures and their captions."""
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for caption, picture in zip(captions, pictures, strict=True):
        for name, marks in judge(caption, read(picture)).items():
            right[name] += sum(marks)
            total[name] += len(marks)
    return {name: (right[name], total[name]) for name in (*ATTRIBUTES, "whole")}
