"""A video encoder and predictor with rotary positions written from the equations, one sequence at a time.

Shares no code with the package. The predictor sorts its tokens by place and returns them to their order, as published.
"""

import torch

from tests.models.ijepa_equations import block, linear, norm


def place(n, grid):
    """Frame, row and column of patch n."""
    return n // (grid[1] * grid[2]), n // grid[2] % grid[1], n % grid[2]


def turned(x, places, pairing):
    """x [n, D]: each axis turns its A channels, channel i of a pair (2k, 2k + 1) by its own frequency."""
    y, width = x.clone(), x.shape[-1] // 3 // 2 * 2
    for axis, at in enumerate(torch.tensor(places, dtype=torch.float64).view(-1, 3).T):
        for i in range(width):
            j = i % (width // 2) if pairing == "tiled" else i // 2
            angle = (at * 10000 ** (-2 * j / width)).to(x.dtype)
            own, other = axis * width + i, axis * width + (i ^ 1)
            y[:, own] = x[:, own] * angle.cos() + (-1 if i % 2 == 0 else 1) * x[:, other] * angle.sin()
    return y


def blocks(x, ids, grid, p, name, depth, heads, pairing):
    places = [place(n, grid) for n in ids.tolist()]
    for i in range(depth):
        x = block(x, p, f"{name}.{i}", heads, lambda q: turned(q, places, pairing))
    return x


def encode(clip, ids, p, sizes, heads, depth, pairing):
    """Latents of the patches `ids` of one clip [C, T, H, W]; sizes: of a patch, (frames, height, width)."""
    grid = tuple(n // size for n, size in zip(clip.shape[1:], sizes, strict=True))
    patches = []
    for n in ids.tolist():
        t, h, w = (at * size for at, size in zip(place(n, grid), sizes, strict=True))
        patches.append(clip[:, t : t + sizes[0], h : h + sizes[1], w : w + sizes[2]].flatten())
    weight = p["patch_embed.proj.weight"].flatten(1)
    x = torch.stack(patches) @ weight.T + p["patch_embed.proj.bias"]
    return norm(blocks(x, ids, grid, p, "blocks", depth, heads, pairing), p, "norm")


def predict(context, context_ids, target_ids, token, grid, p, heads, depth, pairing):
    """Latents at `target_ids` of one sequence; token [E]: its mask token."""
    ids = torch.cat([context_ids, target_ids])
    x = torch.cat([linear(context, p, "predictor_embed"), token.expand(len(target_ids), -1)])
    order = ids.argsort()
    x = blocks(x[order], ids[order], grid, p, "predictor_blocks", depth, heads, pairing)
    x = x[order.argsort()][len(context_ids) :]
    return linear(norm(x, p, "predictor_norm"), p, "predictor_proj")
