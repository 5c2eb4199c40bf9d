"""rope of queries and keys, at V-JEPA 2's shapes: masked clips, each with positions of its own, and whole clips."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.workload import Inputs, Workload, compiled, each, nbytes
from jepa_kernels import Rope
from jepa_kernels.ops.rope import reference

GRID = (8, 16, 16)  # frames, rows and columns of patches
WIDTH, AXES = 64, 3
PAIRS = WIDTH // AXES // 2


def positions_of(ids: Tensor) -> Tensor:
    """Frame, row and column of patches, fp32 [..., 3]."""
    _, rows, columns = GRID
    return torch.stack([ids // (rows * columns), ids // columns % rows, ids % columns], -1).float()


def heads_of_qkv(generator: torch.Generator, batch: int, tokens: int, heads: int) -> dict[str, Tensor]:
    """q and k where a qkv product leaves them."""
    qkv = torch.randn(batch, tokens, 3, heads, WIDTH, generator=generator, dtype=torch.float64)
    q, k, _ = qkv.permute(2, 0, 3, 1, 4)
    return dict(q=q, k=k)


def masked(batch: int, tokens: int, heads: int) -> Callable[[torch.Generator], Inputs]:
    """The patches that a mask keeps of each clip."""

    def make(generator: torch.Generator) -> Inputs:
        count = GRID[0] * GRID[1] * GRID[2]
        ids = [torch.randperm(count, generator=generator)[:tokens].sort().values for _ in range(batch)]
        heads_first = heads_of_qkv(generator, batch, tokens, heads)
        return dict(**heads_first, positions=positions_of(torch.stack(ids)), pairing="tiled")

    return make


def whole(batch: int, heads: int) -> Callable[[torch.Generator], Inputs]:
    """Every patch, by the table that all layers share."""

    def make(generator: torch.Generator) -> Inputs:
        ids = torch.arange(GRID[0] * GRID[1] * GRID[2])
        return dict(
            **heads_of_qkv(generator, batch, len(ids), heads), positions=Rope(positions_of(ids), pairing="tiled")
        )

    return make


def published(x: Tensor, positions: Tensor) -> Tensor:
    """As the published models compute it: an axis at a time, with angles for every head."""
    turned, pairs = [], x.shape[-1] // AXES // 2
    for axis in range(AXES):
        part = x[..., axis * 2 * pairs : (axis + 1) * 2 * pairs]
        frequencies = torch.arange(pairs, dtype=torch.float32, device=x.device)
        frequencies = 1.0 / 10000 ** (frequencies / pairs)
        place = positions[..., None, :, axis].expand(x.shape[:-1])
        angles = torch.einsum("...n,j->...nj", place, frequencies)
        sin, cos = angles.sin().repeat(1, 1, 1, 2), angles.cos().repeat(1, 1, 1, 2)
        even, odd = part.unflatten(-1, (-1, 2)).unbind(-1)
        partner = torch.stack((-odd, even), -1).flatten(-2)
        turned.append(part * cos + partner * sin)
    return torch.cat([*turned, x[..., AXES * 2 * pairs :]], -1).to(x.dtype)


def table(positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines [B, 1, N, D], once for all heads; 1 and 0 for the channels that stay."""
    frequencies = 10000.0 ** -(torch.arange(PAIRS, device=positions.device) / PAIRS)
    angles = (positions[..., None] * frequencies).repeat(1, 1, 1, 2).flatten(-2)[:, None]
    sign = torch.tensor([-1.0, 1.0], device=positions.device).repeat(AXES * PAIRS)
    rest = (0, WIDTH - 2 * AXES * PAIRS)
    return F.pad(angles.cos(), rest, value=1.0), F.pad(angles.sin() * sign, rest)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    single = x.float()
    partner = single.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return (single * cos + partner * sin).to(x.dtype)


def turn_both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return turn(q, cos, sin), turn(k, cos, sin)


def rivals(inputs: Inputs) -> dict[str, Callable[[], Any]]:
    """compile is two graphs, the table apart: in one, every head would compute its cosines anew. Where ours has its
    table before the timing, of a `Rope`, it has too."""
    q, k, positions = (inputs[n] for n in ("q", "k", "positions"))
    made = isinstance(positions, Rope)
    positions = positions.positions[None] if made else positions
    compiled_table, compiled_turn = compiled(table), compiled(turn_both)
    before = table(positions) if made else None
    return {
        "published": lambda: (published(q, positions), published(k, positions)),
        "compile": lambda: compiled_turn(q, k, *(before or compiled_table(positions))),
    }


def moved(inputs: Inputs, stage: str) -> float:
    """q and k in and out, and the table of cosines and sines; backward the same of gradients."""
    positions = inputs["positions"]
    places = positions.positions if isinstance(positions, Rope) else positions
    table = 4 * 2 * AXES * 2 * PAIRS * places.shape[:-1].numel()
    return (2 * nbytes(inputs["q"], inputs["k"]) + table) * (2 if stage == "backward" else 1)


def workload(name: str, make: Callable[[torch.Generator], Inputs], **options: Any) -> Workload:
    return Workload(name, make, bytes=moved, rivals=rivals, grads=("q", "k"), function="rope_qk",
                    reference=reference.forward_qk, keep=("positions",), reference_timed=False, **options)  # fmt: skip


WORKLOADS = (
    workload("vjepa2_vit_l_masked", masked(4, 503, 16), dtypes=("float32", "bfloat16")),
    workload("vjepa2_vit_g_clip_b24", whole(24, 22), small=whole(1, 2), dtypes=("bfloat16",), devices=("cuda",)),
)
SMALL = (workload("small", masked(1, 50, 2), dtypes=("float32", "bfloat16")),)


@each("rope", WORKLOADS)
def test_rope(bench, op, workload, stage, dtype):
    bench(op, workload, stage, dtype)
