"""I-JEPA's loss written from the equations, one (mask, image) pair at a time: shares no code with the package."""

import math

import torch


def layer_norm(x, weight=1.0, bias=0.0, eps=1e-6):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight + bias


def norm(x, p, name):
    return layer_norm(x, p[f"{name}.weight"], p[f"{name}.bias"])


def linear(x, p, name):
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def attention(x, p, name, heads, turn=lambda q: q, seen=None):
    """turn: what positions do to the queries and keys of a head. seen: bool, which keys a query sees; None: all."""
    outputs = []
    queries, keys, values = (y.chunk(heads, -1) for y in linear(x, p, f"{name}.qkv").chunk(3, -1))
    for q, k, v in zip(map(turn, queries), map(turn, keys), values, strict=True):
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        outputs.append((scores if seen is None else scores.masked_fill(~seen, -math.inf)).softmax(-1) @ v)
    return linear(torch.cat(outputs, -1), p, f"{name}.proj")


def block(x, p, name, heads, *options):
    x = x + attention(norm(x, p, f"{name}.norm1"), p, f"{name}.attn", heads, *options)
    h = linear(norm(x, p, f"{name}.norm2"), p, f"{name}.mlp.fc1")
    return x + linear(h * (1 + torch.erf(h / math.sqrt(2))) / 2, p, f"{name}.mlp.fc2")


def positions(grid, dim):
    """[sin, cos] of the column, then [sin, cos] of the row, each for dim / 4 frequencies."""
    table = torch.empty(grid[0] * grid[1], dim, dtype=torch.float64)
    for place in range(len(table)):
        row, column = divmod(place, grid[1])
        frequencies = [10000 ** (-4 * i / dim) for i in range(dim // 4)]
        waves = [wave(p * w) for p in (column, row) for wave in (math.sin, math.cos) for w in frequencies]
        table[place] = torch.tensor(waves, dtype=torch.float64)
    return table.float().double()


def encode(image, ids, p, name, c):
    """Latents of the patches `ids` of one image [C, H, W]."""
    size = c.patch_size
    rows = image.unfold(1, size, size).unfold(2, size, size)  # [C, Gh, Gw, P, P]
    patches = rows.permute(1, 2, 0, 3, 4).flatten(2).flatten(0, 1)
    table = positions(rows.shape[1:3], c.embed_dim)
    weight = p[f"{name}.patch_embed.proj.weight"].flatten(1)
    x = (patches @ weight.T + p[f"{name}.patch_embed.proj.bias"] + table)[ids]
    for i in range(c.depth):
        x = block(x, p, f"{name}.blocks.{i}", c.num_heads)
    return norm(x, p, f"{name}.norm")


def predict(context, context_ids, target_ids, grid, p, c):
    table = positions(grid, c.predictor_embed_dim)
    x = linear(context, p, "predictor.predictor_embed") + table[context_ids]
    x = torch.cat([x, p["predictor.mask_token"][0, 0] + table[target_ids]])
    for i in range(c.predictor_depth):
        x = block(x, p, f"predictor.predictor_blocks.{i}", c.num_heads)
    return linear(norm(x[len(context) :], p, "predictor.predictor_norm"), p, "predictor.predictor_proj")


def loss(p, images, contexts, targets, grid, c):
    """Mean over masks of the mean over images; contexts: ids per image, targets: ids per (mask, image)."""
    total, places = 0.0, torch.arange(grid[0] * grid[1])
    for s, target_ids in enumerate(targets):
        image, context_ids = images[s % len(images)], contexts[s % len(images)]
        context = encode(image, context_ids, p, "context_encoder", c)
        wanted = layer_norm(encode(image, places, p, "target_encoder", c), eps=1e-5)[target_ids].detach()
        d = (predict(context, context_ids, target_ids, grid, p, c) - wanted).abs()
        total = total + torch.where(d < 1, d * d / 2, d - 0.5).mean()
    return total / len(targets)
