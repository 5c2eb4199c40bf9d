"""The places of patches and how queries and keys turn with them, written from the equations."""

import torch


def place(n, grid):
    """Frame, row and column of patch n."""
    return n // (grid[1] * grid[2]), n // grid[2] % grid[1], n % grid[2]


def turned(x, places, pairing, precision="float32"):
    """x [n, D]: each axis turns its A channels, channel i of a pair (2k, 2k + 1) by its own frequency."""
    y, width = x.clone(), x.shape[-1] // 3 // 2 * 2
    for axis, at in enumerate(torch.tensor(places, dtype=torch.float64).view(-1, 3).T):
        for i in range(width):
            j = i % (width // 2) if pairing == "tiled" else i // 2
            exponent = 2 * j / width
            if precision == "bf16_exponent":
                exponent = torch.tensor(exponent).bfloat16().item()
            angle = (at * 10000**-exponent).to(x.dtype)
            own, other = axis * width + i, axis * width + (i ^ 1)
            y[:, own] = x[:, own] * angle.cos() + (-1 if i % 2 == 0 else 1) * x[:, other] * angle.sin()
    return y
