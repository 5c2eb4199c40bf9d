"""Frames predicted one after another, each from all before it, without computing anything twice."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor

import jepa_kernels as jk
from jepa_kernels.nn.action_predictor import ActionPredictor
from jepa_kernels.nn.block import ActionBlock
from jepa_kernels.nn.kv_cache import KVCache, KVHistory
from jepa_kernels.rotary import Rope


class Seen(NamedTuple):
    """Of one world, up to now: latents [T, N, E], the actions taken between them [T - 1, A], and states [T, Ds] and
    extrinsics [T, Dx] where the model has tokens of them."""

    latents: Tensor
    actions: Tensor | None
    states: Tensor | None
    extrinsics: Tensor | None


def begin(
    predictor: ActionPredictor,
    seen: Seen,
    horizon: int,
    *,
    window: int | None = None,
    sequences: int | None = None,
) -> Rollout | WindowRollout:
    """The rollout of these frames: `WindowRollout` where they come to more than `window`, else `Rollout`.

    sequences: for inference, of at most so many samples at once, in a cache of their size; None: with gradients.
    """
    frames = len(seen.latents) - 1 + horizon
    if window is not None and frames > window:
        return WindowRollout(predictor, seen, window)
    blocks, weight = predictor.predictor_blocks, predictor.predictor_norm.weight
    if sequences is None:
        return Rollout(predictor, seen, horizon, KVHistory(len(blocks)))
    kind, dtype = weight.device.type, weight.dtype
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    tokens, heads = frames * predictor.frame_tokens, cast(ActionBlock, blocks[0]).attn.num_heads
    like = weight.new_empty(0, dtype=dtype)
    return Rollout(predictor, seen, horizon, KVCache(len(blocks), sequences, tokens, heads, len(weight) // heads, like))


class Rollout:
    """What an ActionPredictor's predictions for many actions share, computed once; and `step`, the rest.

    Shared are the keys and values of all frames but the last, whose actions are known; of the
    last frame the embedded patches, and where conditioning tokens stand before them the first block's product of all
    tokens but the action's. Earlier frames go through the last block as keys and values alone.
    horizon: frames to predict, for which `cache` has room.
    """

    def __init__(
        self,
        predictor: ActionPredictor,
        seen: Seen,
        horizon: int,
        cache: KVCache | KVHistory,
    ) -> None:
        latents, actions, states, extrinsics = seen
        self.predictor, self.cache, self.past = predictor, cache, len(latents) - 1
        self.blocks = [cast(ActionBlock, block) for block in predictor.predictor_blocks]
        patches = predictor.predictor_embed(latents)[None]  # [1, T, N, D]
        states, extrinsics = (None if x is None else x[None] for x in (states, extrinsics))
        if actions is not None and self.past:
            before = (None if x is None else x[:, :-1] for x in (states, extrinsics))
            action = predictor.action(actions[None])
            self._look_back(predictor.join(action, predictor.parts(patches[:, :-1], *before)), action)
        now = (None if x is None else x[:, -1:] for x in (states, extrinsics))
        self.extrinsics = None if extrinsics is None else extrinsics[:, -1:]
        self.now = torch.cat(predictor.parts(patches[:, -1:], *now), -2)
        self.now_qkv = self.blocks[0].before(self.now)[0] if predictor.cond_tokens else None
        self.ropes = [predictor.rope_of(self.past + n, 1) for n in range(horizon)]

    def step(self, n: int, actions: Tensor, latents: Tensor | None = None, states: Tensor | None = None) -> Tensor:
        """Predict from the n-th frame after the last one seen: actions [S, A] taken in it -> [S, N, E].

        latents [S, N, E], states [S, Ds]: of that frame; for n = 0 they are those seen.
        """
        predictor, qkv = self.predictor, None
        action = predictor.action(actions[:, None])  # [S, 1, 1, D]
        if latents is None:
            x = predictor.join(action, [_each(self.now, actions)])
            if self.now_qkv is not None:
                qkv = torch.cat([self.blocks[0].before(action)[0], _each(self.now_qkv, actions)], -2)
        else:
            states = None if states is None else states[:, None]
            extrinsics = None if self.extrinsics is None else _each(self.extrinsics, actions)
            x = predictor.join(action, predictor.parts(predictor.predictor_embed(latents)[:, None], states, extrinsics))
        begin = (self.past + n) * predictor.frame_tokens
        for layer, block in enumerate(self.blocks):
            x = block(x, action, partial(self._attend, layer, begin, self.ropes[n]), qkv)
            qkv = None
        return predictor.predict(x)[:, 0]

    def _look_back(self, x: Tensor, action: Tensor) -> None:
        """Keep the keys and values of the frames x [1, T - 1, n, D] before the current one."""
        rope = self.predictor.rope_of(0, self.past)
        *blocks, last = self.blocks
        for layer, block in enumerate(blocks):  # by halves, which `compile_blocks` leaves: once a plan, of any length
            qkv, parts = block.before(x, action)
            x = block.after(x, self._attend(layer, 0, rope, qkv), parts)
        _, k, v = self._turned(last.before(x, action)[0], rope)
        self.cache.extend(len(blocks), 0, k, v)
        self.cache.share(x.shape[1] * x.shape[2])

    def _attend(self, layer: int, begin: int, rope: Rope, qkv: Tensor) -> Tensor:
        """Of the tokens of whole frames, the first at place `begin`, to all so far: qkv [S, T, n, 3 D]."""
        q, k, v = self._turned(qkv, rope)
        frame_size = None if qkv.shape[1] == 1 else qkv.shape[2]  # one frame sees every key
        out = self.cache.attend(layer, begin, q, k, v, frame_size)
        return out.transpose(1, 2).flatten(2).unflatten(1, qkv.shape[1:3])

    def _turned(self, qkv: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys by their positions, and values, [S, H, T n, D / H]."""
        q, k, v = self.predictor.heads(qkv).transpose(1, 3).unbind(2)
        return *jk.rope_qk(q, k, rope), v


class WindowRollout:
    """`Rollout` of predictions that see the last `window` frames alone, numbered from 0 anew: each computes them all.

    Kept keys would not be exact: they turn with a frame's number, and hold what the frame saw before the window.
    """

    def __init__(
        self,
        predictor: ActionPredictor,
        seen: Seen,
        window: int,
    ) -> None:
        self.predictor, self.window = predictor, window
        self.past = [[None if x is None else x[t, None] for x in seen] for t in range(len(seen.latents) - 1)]
        self.now, self.extrinsics = seen.latents[-1:], None if seen.extrinsics is None else seen.extrinsics[-1:]

    def step(self, n: int, actions: Tensor, latents: Tensor | None = None, states: Tensor | None = None) -> Tensor:
        """As of `Rollout`; steps come one after the other, and begin anew with n = 0."""
        if latents is None:
            self.frames = [[None if x is None else _each(x, actions) for x in frame] for frame in self.past]
            latents = _each(self.now, actions)
        extrinsics = None if self.extrinsics is None else _each(self.extrinsics, actions)
        self.frames = [*self.frames, [latents, actions, states, extrinsics]][-self.window :]
        given = (
            None if x[-1] is None else torch.stack(cast(list[Tensor], x), 1) for x in zip(*self.frames, strict=True)
        )
        return self.predictor(*given)[:, -1]


def _each(x: Tensor, actions: Tensor) -> Tensor:
    """x of one world for every sample."""
    return x.expand(len(actions), *x.shape[1:])
