"""V-JEPA 2-AC and JEPA-WMs' predictor written from the equations, one world at a time: shares no code with the package.

As published: a product each for queries, keys and values of action, state, camera and patches; a dense mask; each
prediction of a rollout computes every frame before it anew. c: a config; p: the weights of the predictor.
"""

import functools
import math

import torch
from scipy.spatial.transform import Rotation

from tests.models.ijepa_equations import layer_norm, linear, norm


def patch_places(t, c):
    height, width = (side // c.patch_size for side in c.crop_size)
    scales = [1 if c.rope_grid is None else c.rope_grid / side for side in (height, width)]
    return [(t, h * scales[0], w * scales[1]) for h in range(height) for w in range(width)]


@functools.cache
def angles(places, width, pairing, axes):
    """Of every channel of heads of `width` [n, D]; each of three axes turns a third, and further ones stay."""
    third = width // 3 // 2 * 2
    found = torch.zeros(len(places), width, dtype=torch.float64)
    for n, place in enumerate(places):
        for axis, at in enumerate(place[:axes]):
            for i in range(third):
                j = i % (third // 2) if pairing == "tiled" else i // 2
                found[n, axis * third + i] = at * 10000 ** (-2 * j / third)
    return found


def turned(x, places, pairing, axes=3):
    """x [n, D]: the channels 2 k and 2 k + 1 turn together, each by its own angle; of `axes` axes, the frame first."""
    angle = angles(tuple(places), x.shape[-1], pairing, axes)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * angle.cos() + torch.stack([-odd, even], -1).flatten(-2) * angle.sin()


def frame_mask(frames, tokens):
    mask = torch.zeros(frames * tokens, frames * tokens, dtype=torch.bool)
    for t1 in range(frames):
        for t2 in range(t1 + 1):
            mask[t1 * tokens : (t1 + 1) * tokens, t2 * tokens : (t2 + 1) * tokens] = True
    return mask


def attention(groups, p, name, c):
    """groups: frame by frame, kind by kind, (tokens [n, D], t) -> likewise."""
    heads = c.predictor_num_heads
    queries, keys, values = [], [], []
    for x, t in groups:
        q, k, v = (y.chunk(heads, -1) for y in linear(x, p, f"{name}.qkv").chunk(3, -1))
        patches = patch_places(t, c)
        single = len(x) != len(patches)

        def turn(y, t=t, patches=patches, single=single):
            return turned(y, [(t, 0, 0)], c.rope, axes=1) if single else turned(y, patches, c.rope)

        queries.append([turn(y) for y in q])
        keys.append([turn(y) for y in k])
        values.append(v)
    frames = groups[-1][1] + 1
    mask = frame_mask(frames, sum(len(x) for x, _ in groups) // frames)
    out = []
    for h in range(heads):
        q, k, v = (torch.cat([group[h] for group in side]) for side in (queries, keys, values))
        scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~mask, -math.inf)
        out.append(scores.softmax(-1) @ v)
    return linear(torch.cat(out, -1), p, f"{name}.proj").split([len(x) for x, _ in groups])


def mlp(x, p, name):
    h = linear(x, p, f"{name}.fc1")
    return linear(h * (1 + torch.erf(h / math.sqrt(2))) / 2, p, f"{name}.fc2")


def predict(latents, actions, states, extrinsics, p, c):
    """latents [T, N, E] and what steers each frame -> those of the frames after them, layer-normalised if c says so."""
    steps, modulated = len(latents), c.conditioning == "adaln"
    groups, z = [], [linear(a[None], p, "action_encoder") for a in actions]
    for t in range(steps):
        if not modulated:
            groups.append((z[t], t))
            if states is not None:
                groups.append((linear(states[t][None], p, "state_encoder"), t))
            if extrinsics is not None:
                groups.append((linear(extrinsics[t][None], p, "extrinsics_encoder"), t))
        groups.append((linear(latents[t], p, "predictor_embed"), t))
    for i in range(c.predictor_depth):
        name = f"predictor_blocks.{i}"
        parts = [[0, 0, 1, 0, 0, 1]] * steps
        if modulated:
            parts = [linear(a * torch.sigmoid(a), p, f"{name}.adaLN_modulation.1").chunk(6, -1) for a in z]
        normed = [(norm(x, p, f"{name}.norm1") * (1 + parts[t][1]) + parts[t][0], t) for x, t in groups]
        out = attention(normed, p, f"{name}.attn", c)
        groups = [(x + parts[t][2] * y, t) for (x, t), y in zip(groups, out, strict=True)]
        groups = [
            (x + parts[t][5] * mlp(norm(x, p, f"{name}.norm2") * (1 + parts[t][4]) + parts[t][3], p, f"{name}.mlp"), t)
            for x, t in groups
        ]
    patches = [x for x, _ in groups[(len(groups) // steps) - 1 :: len(groups) // steps]]
    out = torch.stack([linear(norm(x, p, "predictor_norm"), p, "predictor_proj") for x in patches])
    return layer_norm(out, eps=1e-5) if c.normalize else out


def moved(pose, action):
    """The next pose, by SciPy."""
    turn = [Rotation.from_euler("xyz", x[3:6].detach().numpy()).as_matrix() for x in (action, pose)]
    angles = torch.from_numpy(Rotation.from_matrix(turn[0] @ turn[1]).as_euler("xyz")).to(pose)
    return torch.cat([pose[:3] + action[:3], angles, (pose[6:] + action[6:]).clamp(0, 1)])


def imagine(latents, past, states, actions, p, c, next_state=moved):
    """The frames after the last of latents [T, N, E], by actions [horizon, A]; past [T - 1, A]."""
    begin = len(latents)
    for action in actions:
        past = torch.cat([past, action[None]])
        new = predict(latents, past, states, None, p, c)[-1]
        latents = torch.cat([latents, new[None]])
        if states is not None:
            states = torch.cat([states, next_state(states[-1], action)[None]])
    return latents[begin:]


def loss(h, actions, states, p, c, auto_steps, released):
    """V-JEPA 2-AC's, of one clip."""
    known, states = len(h) - 1, states[: len(h) - 1]
    forced = predict(h[:-1], actions, states, None, p, c)
    seq = torch.stack([h[0], forced[1 if released else 0]])
    for n in range(1, auto_steps):
        seq = torch.cat([seq, predict(seq, actions[: n + 1], states[: n + 1], None, p, c)[-1:]])
    assert len(forced) == known
    return (forced - h[1:]).abs().mean() + (seq[1:] - h[1 : auto_steps + 1]).abs().mean()


def prefix_loss(h, actions, p, c, rollout_steps, prefixes, window, detach, stop):
    """JEPA-WMs', of one clip, squared distances."""
    forced = predict(h[:-1], actions, None, None, p, c)
    total = (forced - h[1:]).square().mean() / (rollout_steps + 1)
    for t in prefixes:
        first = forced[t].detach() if detach else forced[t]
        frames = [*h[: t + 1], first]
        for r in range(1, rollout_steps):
            seen, taken = frames[-window:], actions[: t + 1 + r][-window:]
            new = predict(torch.stack(seen), taken, None, None, p, c)[-1]
            total = total + (new - h[t + 1 + r]).square().mean() / (rollout_steps * len(prefixes))
            frames.append(new.detach() if stop else new)
    return total
