"""Selective decoding on a stream of rooms: text is decoded when the predicted embeddings move, not on every frame."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jepa_kernels import report
from jepa_kernels.models.vl_answers import embed, emissions, retrieve
from jepa_kernels.models.vl_jepa import VLJEPA
from jepa_kernels.probe import mean_of
from jepa_kernels.rooms.answers import predicted
from jepa_kernels.rooms.scenes import SPLITS, Scene, answer, candidates, known

CHANGE = 1 / 12  # chance that the thing asked about is another one in the next frame
QUESTION = "what is at the top left?"


@dataclass(frozen=True)
class Stream:
    """frames: uint8 [T, 3, H, W]. said: the right answer to QUESTION at each of them. changes: frames of a new one."""

    frames: Tensor
    said: tuple[str, ...]
    changes: tuple[int, ...]


def stream(steps: int, size: int, *, side: int = 4, seed: int = 0) -> Stream:
    """A room in which a thing at the top left and another at the bottom right wander, each inside its quarter; at times
    that no clock tells the first gives way to another thing. Of (steps, size, side, seed) alone; training's things."""
    rng = np.random.default_rng((seed, len(SPLITS)))
    things, half = known(), side // 2
    shown, other = (things[n] for n in rng.permutation(len(things))[:2])
    frames, said, changes = [], [], []
    for t in range(steps):
        if t and rng.random() < CHANGE:
            shown = [thing for thing in things if thing != shown][rng.integers(len(things) - 1)]
            changes.append(t)
        (a, b), (c, d) = rng.integers(half, size=(2, 2)).tolist()
        room = Scene((shown, other), ((a, b), (half + c, half + d)), side)
        frames.append(torch.from_numpy(room.render(size // (side + 2))).permute(2, 0, 1))
        said.append(answer(shown))
    return Stream(torch.stack(frames), tuple(said), tuple(changes))


def follow(model: VLJEPA, seen: Stream) -> Tensor:
    """The predicted embedding of the answer at every frame, [T, out_dim]."""
    return predicted(model, seen.frames, [QUESTION] * len(seen.frames))


def right(texts: Sequence[str], decoded: Sequence[int], said: Sequence[str]) -> np.ndarray:
    """bool [T]: whether the last decoded text is the right one; texts: what would be decoded at each frame."""
    last = np.searchsorted(np.asarray(decoded), np.arange(len(said)), side="right") - 1
    return np.array([texts[decoded[n]] == wanted for n, wanted in zip(last, said, strict=True)])


def threshold(answered: Tensor) -> float:
    """Half the least distance between two answers' embeddings: a new answer moves the stream by more than that."""
    apart = 1 - answered @ answered.T
    return float(apart[~torch.eye(len(answered), dtype=torch.bool, device=answered.device)].min() / 2)


def compare(model: VLJEPA, streams: Sequence[Stream]) -> dict[str, Any]:
    """Selective decoding against decoding every frame, and against every p-th, "uniform", with p such that there are at
    least as many decodes.

    Returns {decodes, accuracy: {selective, uniform, every_frame: {mean, ci95}}}, as `report.show` takes them.
    """
    names = candidates()
    answered = embed(model, names)
    limit = threshold(answered)
    chosen, texts = [], []
    for seen in streams:
        embeddings = follow(model, seen)
        chosen.append(emissions(embeddings, limit)[0])
        texts.append([names[n] for n in retrieve(embeddings, answered)[1][:, 0].tolist()])

    def score(decoded: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
        counts = np.array([len(steps) for steps in decoded], dtype=float)
        shares = [right(*row).mean() for row in zip(texts, decoded, (s.said for s in streams), strict=True)]
        return counts, np.array(shares)

    selective = score(chosen)
    every = [score([range(0, len(s.said), p) for s in streams]) for p in range(1, len(streams[0].said) + 1)]
    uniform = min((u for u in every if u[0].mean() >= selective[0].mean()), key=lambda u: u[0].mean())
    found = {"selective": selective, "uniform": uniform, "every_frame": every[0]}
    return {
        "question": f"{QUESTION} Along {len(streams)} streams of {len(streams[0].said)} frames of training's things.",
        "score": "mean of a stream",
        "changes": float(np.mean([len(s.changes) for s in streams])),
        "decodes": {name: mean_of(counts[:, None]) for name, (counts, _) in found.items()},
        "accuracy": {name: mean_of(shares[:, None]) for name, (_, shares) in found.items()},
    }


def picture(model: VLJEPA, seen: Stream) -> bytes:
    """The stream's distance from the mean since the last emission, emissions and true changes marked, as a PNG."""
    names, embeddings = candidates(), follow(model, seen)
    answered = embed(model, names)
    limit = threshold(answered)
    steps, distances = emissions(embeddings, limit)
    texts = [names[n] for n in retrieve(embeddings[steps], answered)[1][:, 0].tolist()]
    return report.emissions(steps, distances.tolist(), limit, texts=texts, changes=seen.changes, title=QUESTION)
