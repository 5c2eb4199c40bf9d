"""LeWorldModel written out plainly, for one image or sequence at a time, from a state dict of this library's names."""

import torch
import torch.nn.functional as F

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def linear(w, name, x):
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def norm(w, name, x, eps):
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)


def heads(x, count):
    """[N, count * D] -> [count, N, D]."""
    return torch.stack(x.chunk(count, -1))


def attention(q, k, v, visible=None):
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    return torch.cat(list(scores.softmax(-1) @ v), -1)


def encode(w, image, c):
    """image [C, H, W] in 0..1 -> [E]."""
    p = c.patch_size
    mean, std = (torch.tensor(v, dtype=image.dtype)[:, None, None] for v in (MEAN, STD))
    image = (image - mean) / std
    places = [(y, x) for y in range(0, c.crop_size, p) for x in range(0, c.crop_size, p)]
    patches = torch.stack([image[:, y : y + p, x : x + p].flatten() for y, x in places])
    patches = F.linear(patches, w["patch_embed.proj.weight"].flatten(1), w["patch_embed.proj.bias"])
    x = torch.cat([w["cls_token"][0], patches]) + w["pos_embed"][0]
    for i in range(c.depth):
        block = f"blocks.{i}"
        q, k, v = linear(w, f"{block}.attn.qkv", norm(w, f"{block}.norm1", x, 1e-12)).chunk(3, -1)
        out = attention(*(heads(t, c.num_heads) for t in (q, k, v)))
        x = x + linear(w, f"{block}.attn.proj", out)
        hidden = F.gelu(linear(w, f"{block}.mlp.fc1", norm(w, f"{block}.norm2", x, 1e-12)))
        x = x + linear(w, f"{block}.mlp.fc2", hidden)
    return norm(w, "norm", x, 1e-12)[0]


def project(w, x, training):
    """The projectors: x [rows, E]; batch norm over rows in training, by what it saw else."""
    x = linear(w, "net.0", x)
    mean, var = x.mean(0), x.var(0, unbiased=False)
    if not training:
        mean, var = w["net.1.running_mean"], w["net.1.running_var"]
    x = (x - mean) / (var + 1e-5).sqrt() * w["net.1.weight"] + w["net.1.bias"]
    return linear(w, "net.3", F.gelu(x))


def act(w, actions):
    x = actions @ w["patch_embed.weight"][..., 0].T + w["patch_embed.bias"]
    return linear(w, "embed.2", F.silu(linear(w, "embed.0", x)))


def predict(w, x, condition, c):
    """x and condition [T, E], one sequence -> [T, E]."""
    visible = torch.ones(len(x), len(x)).tril().bool()
    x = x + w["pos_embedding"][0, : len(x)]
    bare = lambda x: F.layer_norm(x, x.shape[-1:], eps=1e-6)  # noqa: E731
    for i in range(c.predictor_depth):
        layer = f"transformer.layers.{i}"
        m = linear(w, f"{layer}.adaLN_modulation.1", F.silu(condition)).chunk(6, -1)
        h = norm(w, f"{layer}.attn.norm", bare(x) * (1 + m[1]) + m[0], 1e-5)
        q, k, v = (heads(t, c.predictor_num_heads) for t in linear(w, f"{layer}.attn.to_qkv", h).chunk(3, -1))
        x = x + m[2] * linear(w, f"{layer}.attn.to_out.0", attention(q, k, v, visible))
        h = norm(w, f"{layer}.mlp.net.0", bare(x) * (1 + m[4]) + m[3], 1e-5)
        x = x + m[5] * linear(w, f"{layer}.mlp.net.4", F.gelu(linear(w, f"{layer}.mlp.net.1", h)))
    return norm(w, "transformer.norm", x, 1e-5)


def part(state, name):
    return {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}


def forward(state, frames, actions, c):
    """Training: (predictions [B, T - 1, E], embeddings [B, T, E]); frames after the history are rolled out."""
    tokens = torch.stack([encode(part(state, "encoder"), image, c) for image in frames.flatten(0, 1)])
    embeddings = project(part(state, "projector"), tokens, True).unflatten(0, frames.shape[:2])
    conditions, given = act(part(state, "action_encoder"), actions), min(c.history, actions.shape[1])
    known, predicted = embeddings[:, :given], []
    for end in range(given, actions.shape[1] + 1):
        first = max(0, end - c.history)
        pairs = zip(known[:, first:], conditions[:, first:end], strict=True)
        rows = torch.stack([predict(part(state, "predictor"), x, condition, c) for x, condition in pairs])
        rows = rows if end == given else rows[:, -1:]
        predicted.append(project(part(state, "pred_proj"), rows.flatten(0, 1), True).view_as(rows))
        known = torch.cat([known, predicted[-1][:, -1:]], 1)
    return torch.cat(predicted, 1), embeddings


def read_back(state, embeddings):
    """Inverse dynamics: embeddings [B, T, E] -> actions [B, T - 1, A]."""
    w, pairs = part(state, "inverse"), torch.cat([embeddings[:, :-1], embeddings[:, 1:]], -1)
    return linear(w, "net.2", F.gelu(linear(w, "net.0", pairs)))


def imagine(state, latents, actions, past, c):
    """One sample: latents [T, E] seen, past [T - 1, A] and actions [h, A] -> [h, E], by whole windows of 3 frames."""
    conditions = act(part(state, "action_encoder"), torch.cat([past, actions]))
    known = list(latents)
    for end in range(len(latents), len(conditions) + 1):
        window = slice(max(0, end - c.history), end)
        x = predict(part(state, "predictor"), torch.stack(known[window]), conditions[window], c)[-1:]
        known.append(project(part(state, "pred_proj"), x, False)[0])
    return torch.stack(known[len(latents) :])
