"""What a world model's latents of held-out episodes tell: the state, and the next frame's latent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jepa_kernels.models.world import Context, World
from jepa_kernels.probe import bootstrap, raw_pixels
from jepa_kernels.pusht.episodes import Episodes
from jepa_kernels.pusht.simulator import centre

RIDGE = 1e-3  # of the rows' number, for standardised features
QUANTITIES = {"agent place": slice(0, 2), "block place": slice(2, 4), "block angle": slice(4, 6)}


def told(states: np.ndarray) -> np.ndarray:
    """states [..., 10] -> what is asked for [..., 6]: places in pixels, sine and cosine of the angle."""
    angle = states[..., 6]
    return np.concatenate([states[..., :2], centre(states), np.stack([np.sin(angle), np.cos(angle)], -1)], -1)


def explained(seen: np.ndarray, states: np.ndarray, held_out: np.ndarray, held_out_states: np.ndarray) -> np.ndarray:
    """1 - squared error / variance of a linear fit on (seen [n, D], states [n, 10]) at each held-out row [m, 3]."""
    mean, std = seen.mean(0), seen.std(0) + 1e-6
    x, held_x = (np.c_[(rows - mean) / std, np.ones(len(rows))] for rows in (seen, held_out))
    y, held_y = told(states), told(held_out_states)
    weights = np.linalg.solve(x.T @ x + RIDGE * len(x) * np.eye(x.shape[1]), x.T @ y)
    error, spread = (held_x @ weights - held_y) ** 2, held_y.var(0)
    return np.stack([1 - error[:, part].sum(1) / spread[part].sum() for part in QUANTITIES.values()], 1)


@torch.no_grad()
def one_step(world: World, latents: Tensor, actions: Tensor, history: int = 3) -> np.ndarray:
    """Squared error of the predicted next latent over that of the last one, on average [episodes]: below 1 is better.

    latents [episodes, T, N, E], actions [episodes, T - 1, A]; predicted from `history` frames each.
    """
    ratios = []
    for frames, taken in zip(latents, actions, strict=True):
        error = copying = 0.0
        for now in range(history - 1, len(taken)):
            context = Context(frames[now - history + 1 : now + 1], taken[now - history + 1 : now])
            imagined = world.imagine(context, 1, 1)(taken[now][None, None])[0, 0]
            error += (imagined - frames[now + 1]).square().sum().item()
            copying += (frames[now] - frames[now + 1]).square().sum().item()
        ratios.append(error / copying)
    return np.array(ratios)


def probes(world: World, fresh: Callable[[], World], fitted_on: Episodes, held_out: Episodes) -> list[dict[str, Any]]:
    """Tables of scores with 95 % intervals over episodes, of trained, random and raw features; see `report.show`.

    fresh: makes a model at random initialisation.
    """
    worlds = {"trained": world, "random_init": fresh()}
    features = {name: (_latents(w, fitted_on), _latents(w, held_out)) for name, w in worlds.items()}
    features["raw_pixels"] = _pixels(fitted_on), _pixels(held_out)
    rows: dict[str, np.ndarray] = {}
    for name, (seen, held) in features.items():
        seen_rows, held_rows = (x.flatten(0, 1).flatten(1).double().numpy() for x in (seen, held))
        scores = explained(seen_rows, fitted_on.states.reshape(-1, 10), held_rows, held_out.states.reshape(-1, 10))
        rows[name] = scores.reshape(*held_out.states.shape[:2], len(QUANTITIES))
    state = {
        quantity: {name: _score(values[..., i]) for name, values in rows.items()}
        for i, quantity in enumerate(QUANTITIES)
    }
    ahead = one_step(world, features["trained"][1], torch.from_numpy(held_out.actions))
    return [
        {"question": "What of the state does a held-out frame tell, linearly?", "score": "explained", **state},
        {
            "question": "One step ahead: squared error, copying the last latent being 1",
            "score": "error",
            "prediction": {"trained": _score(ahead[:, None])},
        },
    ]


def _score(values: np.ndarray) -> dict[str, Any]:
    """values [episodes, frames]."""
    return {"mean": float(values.mean()), "ci95": list(bootstrap(values))}


def _latents(world: World, episodes: Episodes) -> Tensor:
    return torch.stack([world.encode(torch.from_numpy(frames)) for frames in episodes.frames])


def _pixels(episodes: Episodes) -> Tensor:
    return torch.stack([torch.from_numpy(raw_pixels(torch.from_numpy(f).float())) for f in episodes.frames])
