"""Rooms with a few objects, rendered by minigrid, and questions about them, answered from where the objects lie."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from jepa_kernels._core.check import fail
from jepa_kernels.data import extra

COLORS = ("blue", "green", "grey", "purple", "red", "yellow")
KINDS = ("key", "ball", "box", "door")
THINGS = tuple(product(COLORS, KINDS))
# Shown by no training scene and in no training answer, though each color and each kind is.
HELD_OUT = (("blue", "box"), ("green", "key"), ("grey", "ball"), ("purple", "key"), ("red", "ball"), ("yellow", "box"))
SPLITS = ("train", "held_out")
ROWS, COLUMNS = ("top", "bottom"), ("left", "right")
# How one may ask: by color, by kind, or by quarter of the room; each form takes the word asked by.
BY_COLOR = ("what is {}?", "what is the {} thing?", "is there anything {} in this room, and if so, what is it?")
BY_KIND = ("which {} is there?", "what color is the {}?", "tell me all that you can see of the {} lying in this room")
BY_PLACE = ("what is at the {}?", "what lies in the {} of the room?", "please name the one object in the {} quarter")


@dataclass(frozen=True)
class Scene:
    """things: (color, kind) of each object; places: (column, row) of each, inside the walls. side: cells of the room
    inside its walls, even."""

    things: tuple[tuple[str, str], ...]
    places: tuple[tuple[int, int], ...]
    side: int

    def render(self, tile: int) -> np.ndarray:
        """uint8 [(side + 2) tile, (side + 2) tile, 3], walls around."""
        grid, objects = (extra(f"minigrid.core.{part}", of="vl") for part in ("grid", "world_object"))
        room = grid.Grid(self.side + 2, self.side + 2)
        room.wall_rect(0, 0, self.side + 2, self.side + 2)
        for (color, kind), (column, row) in zip(self.things, self.places, strict=True):
            room.set(column + 1, row + 1, getattr(objects, kind.capitalize())(color))
        return room.render(tile, (-1, -1), 0)

    def quarter(self, n: int) -> str:
        """Where object n lies, "top left"."""
        column, row = self.places[n]
        return f"{ROWS[2 * row // self.side]} {COLUMNS[2 * column // self.side]}"


def scene(rng: np.random.Generator, things: tuple[tuple[str, str], ...], count: int, side: int) -> Scene:
    """`count` of these things, no two of a color, of a kind or in a quarter: each may be asked for by any of them."""
    found: list[tuple[str, str]] = []
    for n in rng.permutation(len(things)):
        color, kind = things[n]
        if len(found) < count and not any(color == c or kind == k for c, k in found):
            found.append((color, kind))
    half = side // 2
    places = []
    for quarter in rng.permutation(4)[: len(found)]:
        column, row = rng.integers(half, size=2) + half * np.array(divmod(int(quarter), 2))
        places.append((int(column), int(row)))
    return Scene(tuple(found), tuple(places), side)


def question(rng: np.random.Generator, shown: Scene, n: int) -> str:
    """One that object n alone answers."""
    color, kind = shown.things[n]
    forms, word = ((BY_COLOR, color), (BY_KIND, kind), (BY_PLACE, shown.quarter(n)))[rng.integers(3)]
    return forms[rng.integers(len(forms))].format(word)


def answer(thing: tuple[str, str]) -> str:
    return f"a {thing[0]} {thing[1]}"


class Scenes(Dataset[tuple[Tensor, str, str]]):
    """Rooms and questions: `scenes[i]` -> (pixels uint8 [3, size, size], question, answer), of (seed, i) alone.

    split: "train": no object of `HELD_OUT` is shown; "held_out": the question is about one of these.
    size: pixels per side, a multiple of side + 2. side: cells inside the walls, even. objects: in a room, 1..4.
    length: questions per epoch.
    """

    def __init__(
        self, size: int, *, split: str = "train", side: int = 4, objects: int = 3, length: int = 10_000, seed: int = 0
    ) -> None:
        if split not in SPLITS:
            fail("Scenes", "split", f"be one of {', '.join(SPLITS)}", repr(split), "leave it out for train")
        if side < 2 or side % 2 or not 1 <= objects <= len(KINDS):
            wanted = f"be even, with 1 to {len(KINDS)} objects"
            fail("Scenes", "side", wanted, f"{side} with {objects}", "leave both out")
        if size < side + 2 or size % (side + 2):
            fail("Scenes", "size", f"be a multiple of side + 2 = {side + 2}", size, "pass whole pixels a cell")
        self.size, self.split, self.side, self.objects = size, split, side, objects
        self.length, self.seed = length, seed
        extra("minigrid", of="vl")

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, str, str]:
        shown, n, text = self.drawn(index)
        pixels = torch.from_numpy(shown.render(self.size // (self.side + 2))).permute(2, 0, 1)
        return pixels, text, answer(shown.things[n])

    def drawn(self, index: int) -> tuple[Scene, int, str]:
        """The scene of item `index`, which of its objects is asked for, and the question."""
        rng = np.random.default_rng((self.seed, SPLITS.index(self.split), index))
        if self.split == "train":
            shown = scene(rng, known(), self.objects, self.side)
            n = int(rng.integers(len(shown.things)))
        else:  # the first of the things is asked for; the others are those of training
            asked = HELD_OUT[rng.integers(len(HELD_OUT))]
            shown, n = _with(rng, asked, self.objects, self.side), 0
        return shown, n, question(rng, shown, n)


@lru_cache
def known() -> tuple[tuple[str, str], ...]:
    """What rooms of training show."""
    return tuple(thing for thing in THINGS if thing not in HELD_OUT)


def _with(rng: np.random.Generator, asked: tuple[str, str], count: int, side: int) -> Scene:
    """A scene of `asked` and of known things that share neither color nor kind with it."""
    others = tuple(t for t in known() if t[0] != asked[0] and t[1] != asked[1])
    drawn = scene(rng, others, count - 1, side)
    places = scene(rng, THINGS, count, side).places
    things = (asked, *drawn.things)
    return Scene(things, places[: len(things)], side)


def candidates() -> list[str]:
    """Every answer that there is: what retrieval chooses from."""
    return [answer(thing) for thing in THINGS]
