"""Specification of `sigreg`: random directions, empirical characteristic functions, the Epps-Pulley statistic.

Directions are the same bits everywhere: integers, and fp32 operations that IEEE rounds in one way, each on its own.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

WORD = 2**32 - 1
SALT = 0x53494752  # keeps these numbers apart from those that masks are drawn from
SQRT_HALF_BITS = 0x3F3504F3


def forward(
    z: Tensor,
    *,
    slices: int = 1024,
    knots: int = 17,
    t_max: float = 3.0,
    step: int | Tensor = 0,
    seed: int = 0,
    group: torch.distributed.ProcessGroup | None = None,
) -> Tensor:
    """The statistic, a scalar in fp32 (float64 for float64 z)."""
    wide = torch.float64 if z.dtype == torch.float64 else torch.float32
    with torch.autocast("cpu" if z.is_meta else z.device.type, enabled=False):  # meta has none
        y = z.to(wide) @ directions(z.shape[-1], slices, step, seed, z.device).to(wide).T  # [.., N, slices]
    t = torch.linspace(0, t_max, knots, dtype=torch.float64, device=z.device).to(wide)
    phi = torch.exp(-0.5 * t * t)
    weight = torch.full_like(t, 2 * t_max / (knots - 1))
    weight[0] = weight[-1] = t_max / (knots - 1)  # trapezoid of an even function, folded to [0, t_max]
    angle = y[..., None] * t
    sums = torch.stack([angle.cos().sum(-3), angle.sin().sum(-3)])
    count = torch.full((), float(z.shape[-2]), dtype=torch.float64, device=z.device)
    if group is not None:  # by this rank's rows, world times the gradient of the joint statistic
        own, sums = sums, sums.detach().clone()
        for total in (sums, count):
            torch.distributed.all_reduce(total, group=group)
        sums = sums + group.size() * (own - own.detach())
    cosine, sine = sums / count.clamp(min=1).to(wide)
    distance = ((cosine - phi).square() + sine.square()) @ (weight * phi)  # [.., slices]
    return (distance.sum() * count.to(wide)) / max(distance.numel(), 1)


def directions(width: int, slices: int, step: int | Tensor, seed: int, device: torch.device) -> Tensor:
    """Unit vectors fp32 [slices, width], evenly spread over the sphere: functions of (seed, step, slice) alone.

    Element e of slice k is a standard normal number on the grid of odd multiples of 2^-17, over the norm of its
    slice. On the grid the sum of squares is a whole number: exact in any order, and never 0.
    """
    words = _words(torch.arange((width + 3) // 4, device=device), torch.arange(slices, device=device), step, seed)
    normal = torch.stack([*_normals(words[0], words[1]), *_normals(words[2], words[3])], -1)
    grid = (torch.floor(normal * 65536).to(torch.int64) * 2 + 1).flatten(1)[:, :width]
    scale = 1 / grid.square().sum(1, keepdim=True).to(torch.float64).sqrt()
    return grid.to(torch.float32) * scale.to(torch.float32)


def _words(block: Tensor, slice_: Tensor, step: int | Tensor, seed: int) -> tuple[Tensor, ...]:
    """Four words of 32 bits [slices, blocks] of Philox4x32-10 (Salmon et al., SC 2011), in int64."""
    step = torch.as_tensor(step, dtype=torch.int64, device=block.device)
    c: tuple[Tensor, ...] = (block, slice_[:, None], step & WORD, (step >> 32) & WORD)
    key = [seed & WORD, (seed >> 32 & WORD) ^ SALT]
    for _ in range(10):
        (a_high, a_low), (b_high, b_low) = _product(c[0], 0xD2511F53), _product(c[2], 0xCD9E8D57)
        c = (b_high ^ c[1] ^ key[0], b_low, a_high ^ c[3] ^ key[1], a_low)
        key = [(key[0] + 0x9E3779B9) & WORD, (key[1] + 0xBB67AE85) & WORD]
    return c


def _product(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Upper and lower word of a product of words; no intermediate leaves int64."""
    upper, lower = (x >> 16) * factor, (x & 0xFFFF) * factor
    return (upper + (lower >> 16)) >> 16, (((upper & 0xFFFF) << 16) + lower) & WORD


def _normals(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Two standard normal numbers from two words, by Box and Muller's transform."""
    u = ((first >> 8) + 1).to(torch.float32)  # in [1, 2^24]: a uniform number times 2^24
    bits = u.view(torch.int32)
    exponent = (bits - SQRT_HALF_BITS) >> 23
    m = (bits - (exponent << 23)).view(torch.float32)  # in [sqrt(1/2), sqrt(2))
    t = (m - 1) / (m + 1)
    s = t * t
    log_m = (((s * (2 / 9) + 2 / 7) * s + 2 / 5) * s + 2 / 3) * s * t + 2 * t
    square = (24 - exponent).to(torch.float32) * (2 * math.log(2)) - 2 * log_m
    radius = square.to(torch.float64).sqrt().to(torch.float32)  # torch's own fp32 root may round either way
    angle = ((second >> 8).to(torch.float32) + 0.5) * (math.pi / 4 * 2**-24)
    s = angle * angle
    sine = ((s * (-1 / 5040) + 1 / 120) * s + -1 / 6) * s * angle + angle
    cosine = (((s * (1 / 40320) + -1 / 720) * s + 1 / 24) * s + -1 / 2) * s + 1
    swapped = (second & 1) == 1
    x, y = torch.where(swapped, sine, cosine), torch.where(swapped, cosine, sine)  # one of eight octants
    return torch.where((second & 2) == 2, -x, x) * radius, torch.where((second & 4) == 4, -y, y) * radius
