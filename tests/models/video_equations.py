"""V-JEPA, 2 and 2.1 written from the equations, one sequence at a time: shares no code with the package.

The predictor sorts its tokens by place and returns them to their order, as published.
c: a config of any; p: the weights of one network; image: of clips of one frame that have patches of their own.
"""

import math

import torch

from tests.models.ijepa_equations import block, layer_norm, linear, norm
from tests.models.rope_equations import place, turned

# The blocks, from 0 on, after which published V-JEPA 2.1 encoders of so many have a norm.
LEVEL_BLOCKS = {12: [2, 5, 8, 11], 24: [5, 11, 17, 23], 40: [9, 19, 29, 39], 48: [11, 23, 37, 47]}


def table(grid, dim, uniform_power=True):
    """Frame, row and column, each [sin, cos] of its place; cut to `dim` channels."""
    widths = [2 * math.ceil(dim / 6)] * 3 if uniform_power else [dim // 2, dim // 4, dim // 4]
    rows = []
    for n in range(math.prod(grid)):
        waves = []
        for at, width in zip(place(n, grid), widths, strict=True):
            for wave in (math.sin, math.cos):
                waves += [wave(at * 10000 ** (-i / (width // 2))) for i in range(width // 2)]
        rows.append(waves[:dim])
    return torch.tensor(rows, dtype=torch.float64).float().double()


def sizes(c, image):
    return (1 if image else c.tubelet_size), c.patch_size, c.patch_size


def grid_of(clip, c):
    image = has_own_patches(clip, c)
    return tuple(n // size for n, size in zip(clip.shape[1:], sizes(c, image), strict=True))


def has_own_patches(clip, c):
    return getattr(c, "image_tokenizer", False) and clip.shape[1] == 1


def places(ids, grid, spread):
    """spread: the side of the grid over which rows and columns are spread, or None."""
    found = [place(n, grid) for n in ids.tolist()]
    if spread is None:
        return found
    last_row, last_column = (max(n - 1, 1) for n in grid[1:])
    return [(t, h * (spread - 1) / last_row, w * (spread - 1) / last_column) for t, h, w in found]


def levels(x, ids, grid, p, blocks, depth, heads, c, spread=None, causal=False):
    """The output of every block."""
    options = []
    if getattr(c, "rope", None) is not None:
        at = places(ids, grid, spread)
        options.append(lambda q: turned(q, at, c.rope, c.rope_precision))
    else:
        options.append(lambda q: q)
    frames = ids // (grid[1] * grid[2])
    options.append(frames[None] <= frames[:, None] if causal else None)
    found = []
    for i in range(depth):
        x = block(x, p, f"{blocks}.{i}", heads, *options)
        found.append(x)
    return found


def embed(clip, ids, p, c):
    image, grid = has_own_patches(clip, c), grid_of(clip, c)
    patches = []
    for n in ids.tolist():
        t, h, w = (at * size for at, size in zip(place(n, grid), sizes(c, image), strict=True))
        size = sizes(c, image)
        patches.append(clip[:, t : t + size[0], h : h + size[1], w : w + size[2]].flatten())
    name = "patch_embed_img" if image else "patch_embed"
    x = torch.stack(patches) @ p[f"{name}.proj.weight"].flatten(1).T + p[f"{name}.proj.bias"]
    if getattr(c, "modality_embedding", False):
        x = x + p["img_mod_embed" if clip.shape[1] == 1 else "video_mod_embed"][0]
    if getattr(c, "rope", None) is None:
        x = x + table(grid, c.embed_dim, c.uniform_power)[ids]
    return x


def encode(clip, ids, p, c):
    """Normed latents of the patches `ids` of one clip [C, T, H, W], a list: of each trained level."""
    grid, count = grid_of(clip, c), getattr(c, "levels", None)
    spread = 256 // c.patch_size if getattr(c, "interpolate_rope", False) else None
    found = levels(
        embed(clip, ids, p, c), ids, grid, p, "blocks", c.depth, c.num_heads, c, spread, c.frame_causal
    )  # fmt: skip
    if count is None:
        return [norm(found[-1], p, "norm")]
    ends = LEVEL_BLOCKS.get(c.depth) or [c.depth * (i + 1) // 4 - 1 for i in range(4)]
    return [norm(found[n], p, f"norms_block.{i}") for i, n in enumerate(ends)][-count:]


def predict(context, context_ids, target_ids, token, grid, p, c, image=False):
    """Latents at `target_ids`, and with predict_all at `context_ids`; context: of all levels, side by side."""
    heads = getattr(c, "predictor_num_heads", c.num_heads)
    spread = 256 // c.patch_size if getattr(c, "predictor_interpolate_rope", False) else None
    if (getattr(c, "levels", None) or 1) > 1:
        wide = linear(context, p, "predictor_embed.0")
        x = linear(wide * (1 + torch.erf(wide / math.sqrt(2))) / 2, p, "predictor_embed.2")
    else:
        x = linear(context, p, "predictor_embed")
    ids = torch.cat([context_ids, target_ids])
    x = torch.cat([x, token.expand(len(target_ids), -1)])
    if getattr(c, "modality_embedding", False):
        x = x + p["img_mod_embed" if image else "video_mod_embed"][0]
    if getattr(c, "rope", None) is None:
        x = x + table(grid, c.predictor_embed_dim, c.uniform_power)[ids]
    order = ids.argsort()
    x = levels(x[order], ids[order], grid, p, "predictor_blocks", c.predictor_depth, heads, c, spread)[-1]
    x = norm(x[order.argsort()], p, "predictor_norm")
    own, targets = x[: len(context_ids)], x[len(context_ids) :]
    targets = linear(targets, p, "predictor_proj")
    return (targets, linear(own, p, "predictor_proj_context")) if getattr(c, "predict_all", False) else (targets, None)


def weights(context_ids, target_ids, grid, c):
    """One over the root of each context place's distance to the nearest target."""
    if not c.weight_distance_loss:
        return torch.ones(len(context_ids), dtype=torch.float64)
    unit = grid[1] // 16 if c.offset_context_loss else 1
    targets = [place(n, grid) for n in target_ids.tolist()]
    nearest = [min(math.dist(place(n, grid), at) for at in targets) for n in context_ids.tolist()]
    return torch.tensor([1 / math.sqrt(d / unit) for d in nearest], dtype=torch.float64)


def loss(p, clips, contexts, targets, c, token):
    """Mean over masks of the mean over their places and channels, of all clips; p: {network: its weights}.

    token: of a mask's number, its mask token's. Also returns the predictions at the targets, in order.
    """
    count, exponent, sums, predictions = len(clips), getattr(c, "loss_exp", 1.0), {}, []
    whole = [torch.arange(math.prod(grid_of(clip, c))) for clip in clips]
    latents = [encode(clip, ids, p["target_encoder"], c) for clip, ids in zip(clips, whole, strict=True)]
    wanted = [torch.cat([layer_norm(x, eps=1e-5) for x in found], -1).detach() for found in latents]
    for s, (context_ids, target_ids) in enumerate(zip(contexts, targets, strict=True)):
        mask, clip, grid = s // count, clips[s % count], grid_of(clips[s % count], c)
        context = torch.cat(encode(clip, context_ids, p["context_encoder"], c), -1)
        given = context, context_ids, target_ids, p["predictor"][f"mask_tokens.{token(mask)}"][0, 0]
        found, own = predict(*given, grid, p["predictor"], c, image=clip.shape[1] == 1)
        predictions.append(found)
        sums.setdefault(("target", mask), []).append((found - wanted[s % count][target_ids]).abs() ** exponent)
        if own is not None:
            weight = weights(context_ids, target_ids, grid, c)[:, None]
            sums.setdefault(("context", mask), []).append(weight * (own - wanted[s % count][context_ids]).abs())
    masks = len(targets) // count
    mean = {key: torch.cat(parts).mean() / exponent / masks for key, parts in sums.items()}
    scale = {"target": 1.0, "context": getattr(c, "context_weight", 0.0)}
    return sum(scale[kind] * value for (kind, _), value in mean.items()), predictions
