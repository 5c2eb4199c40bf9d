"""Rotary position embedding: how each channel of a query or key turns with its token's position."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jepa_kernels._core.check import check_number, check_tensor, fail, sizes_of
from jepa_kernels._core.define import define
from jepa_kernels._core.select import FLOATS, unavailable

PAIRINGS = ("interleaved", "tiled", "half")

# Positions of queries and of keys, and both, by the dimensions of queries and of positions.
LOOKS = {
    (3, 2): sizes_of("N A", "M A", "N H D f", "M G D f"),
    (4, 2): sizes_of("N A", "M A", "B H N D f", "B G M D f"),
    (4, 3): sizes_of("B N A", "B M A", "B H N D f", "B G M D f"),
}


class Rope:
    """The rotation of queries and keys by their positions, for `masked_attention(..., rope=)` and `rope`. Immutable.

    Of D channels each of a axes turns A = 2 ((D // a) // 2), in order; the rest stay. With frequencies
    w[j] = theta ** (-j / (A / 2)), j in 0..A/2-1, and p the token's position on the channel's axis:

        y[i] = x[i] cos(p w[f(i)]) + x'[i] sin(p w[f(i)]),   x'[2k] = -x[2k+1], x'[2k+1] = x[2k]

    pairing: "interleaved": f(i) = i // 2, a true rotation (V-JEPA 2.1). "tiled": f(i) = i mod A / 2, as published for
        V-JEPA 2 and AC, where the two channels of a pair turn by different angles. "half", for one axis:
        f(i) = i mod A / 2, and channel i pairs with i + A / 2 instead (Llama).
    positions: [T, a] packed, [N, a] or [B, N, a] dense, a in 1..3 (frame, row, column); integers or fractions.
    k_positions: of the keys, likewise; None: the same as of the queries.
    theta: > 0. frequencies: fp32 [A / 2], overrides theta: low-precision or scaled variants.
    angle_dtype: the type in which positions and frequencies are multiplied and their cosines and sines kept: float32,
        bfloat16 or float16.

    No gradient to positions or frequencies, which must not change afterwards: the table of cosines and sines is
    computed once for all layers. Frequencies that require grad are refused. Raises ValueError and TypeError for
    arguments that do not fit.
    Source: RoFormer (arXiv:2104.09864); V-JEPA 2 (arXiv:2506.09985) section 2; V-JEPA 2.1 (arXiv:2603.14482).
    """

    def __init__(
        self,
        positions: Tensor,
        k_positions: Tensor | None = None,
        *,
        pairing: str = "interleaved",
        theta: float = 10000.0,
        frequencies: Tensor | None = None,
        angle_dtype: torch.dtype = torch.float32,
    ) -> None:
        _check_positions("positions", positions, positions)
        if k_positions is not None:
            _check_positions("k_positions", k_positions, positions)
        if pairing not in PAIRINGS:
            fail("Rope", "pairing", f"be one of {', '.join(PAIRINGS)}", repr(pairing), "leave it out for interleaved")
        if pairing == "half" and positions.shape[-1] != 1:
            fail("Rope", "positions", "have one axis for pairing='half'", positions.shape[-1], "pass [T, 1]")
        check_number("Rope", "theta", theta)
        if not 0 < theta < float("inf"):
            fail("Rope", "theta", "be finite and greater than 0", theta, "10000 is usual")
        if angle_dtype not in FLOATS:
            wanted = "be float32, bfloat16 or float16"
            fail("Rope", "angle_dtype", wanted, angle_dtype, "leave it out for float32", TypeError)
        if frequencies is not None:
            check_tensor("Rope", "frequencies", frequencies, "A/2", device=positions.device)
            if frequencies.requires_grad and torch.is_grad_enabled():
                remedy = "pass frequencies.detach(): they get no gradient"
                fail("Rope", "frequencies", "not require grad", "requires_grad=True", remedy)
        self.positions, self.k_positions, self.pairing = positions, k_positions, pairing
        self.theta, self.frequencies, self.angle_dtype = float(theta), frequencies, angle_dtype
        self._turns: dict[tuple[int, bool], tuple[Tensor, Tensor]] = {}

    def to(self, device: torch.device | str) -> Rope:
        """The same Rope with its tensors on another device."""
        k_positions, frequencies = (None if x is None else x.to(device) for x in (self.k_positions, self.frequencies))
        return Rope(
            self.positions.to(device),
            k_positions,
            pairing=self.pairing,
            theta=self.theta,
            frequencies=frequencies,
            angle_dtype=self.angle_dtype,
        )

    @property
    def half(self) -> bool:
        """Whether channel i pairs with i + A / 2 rather than with its neighbour."""
        return self.pairing == "half"

    def turn(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q and k, token-major [..., T, H, D], turned in plain PyTorch, which computes the table too."""
        turns, k_turns = self.turns(q.shape[-1], plain=True)
        return turn(q, turns, self.half), turn(k, k_turns, self.half)

    def turns(self, width: int, *, plain: bool = False) -> tuple[Tensor, Tensor]:
        """Of queries and of keys, for heads of `width` channels: fp32 [..., 2, R], the cosine and the signed sine of
        each of the R = a A channels that turn. plain: computed by plain PyTorch, for the reference; else by the kernel
        that there is, one for all backends."""
        if torch.compiler.is_compiling():  # the compiler computes equal tables once
            return self._both(width, plain)
        if (width, plain) in self._turns:
            return self._turns[width, plain]
        with torch.inference_mode(False):  # a table made while evaluating serves training too
            turns = self._both(width, plain)
        if type(turns[0]) is Tensor and not _capturing(turns[0]):
            self._turns[width, plain] = turns
        return turns

    def _both(self, width: int, plain: bool) -> tuple[Tensor, Tensor]:
        turns = self._table(self.positions, width, plain)
        return turns, turns if self.k_positions is None else self._table(self.k_positions, width, plain)

    def _table(self, positions: Tensor, width: int, plain: bool) -> Tensor:
        pairs = width // positions.shape[-1] // 2  # A / 2
        if self.frequencies is not None and self.frequencies.shape[0] != pairs:
            wanted = f"hold A / 2 = {pairs} numbers for these heads"
            fail("Rope", "frequencies", wanted, self.frequencies.shape[0], "pass one for each pair of an axis")
        with torch.no_grad():
            positions = positions.to(self.angle_dtype)
            frequencies = None if self.frequencies is None else self.frequencies.to(self.angle_dtype)
            backend = "reference" if plain else _maker(positions)
            return _turns(positions, frequencies, self.theta, self.pairing, width, backend)


def _maker(positions: Tensor) -> str:
    """Who computes the table of every kernel."""
    fits = positions.is_cpu and positions.dtype == torch.float32
    return "cpu" if fits and unavailable("cpu", "cpu") is None else "reference"


def _turns_fake(
    positions: Tensor, frequencies: Tensor | None, theta: float, pairing: str, width: int, backend: str
) -> Tensor:
    axes = positions.shape[-1]
    return positions.new_empty(*positions.shape[:-1], 2, axes * (width // axes // 2) * 2, dtype=torch.float32)


# A torch op, so that compiled code holds the same bits: a compiler's cosines differ from torch's.
_turns = define(
    "rope",
    "turns",
    "(Tensor positions, Tensor? frequencies, float theta, str pairing, SymInt width, str backend) -> Tensor",
    _turns_fake,
)


def rope_of(
    op: str,
    positions: Tensor | Rope,
    k_positions: Tensor | None = None,
    *,
    pairing: str = "interleaved",
    theta: float = 10000.0,
    frequencies: Tensor | None = None,
    angle_dtype: torch.dtype = torch.float32,
) -> Rope:
    """The Rope of an op's arguments, of which `positions` may be one already: then the others must be left out."""
    if not isinstance(positions, Rope):
        return Rope(positions, k_positions, pairing=pairing, theta=theta, frequencies=frequencies,
                    angle_dtype=angle_dtype)  # fmt: skip
    for name, left_out in (
        ("k_positions", k_positions is None),
        ("pairing", pairing == "interleaved"),
        ("theta", theta == 10000.0),
        ("frequencies", frequencies is None),
        ("angle_dtype", angle_dtype == torch.float32),
    ):
        if not left_out:
            fail(op, name, "be left out where positions is a Rope", "one", f"give it to Rope({name}=...)")
    return positions


def width_of(q: Tensor, k: Tensor, positions: Tensor, k_positions: Tensor) -> int | None:
    """Channels of a head, where the positions are of the tokens of q and of k; None where a look does not tell."""
    look = LOOKS.get((getattr(q, "ndim", 0), positions.ndim))
    sizes = None if look is None else look(positions, k_positions, q, k)
    return None if sizes is None else sizes[-2]


def patch_positions(ids: Tensor, grid: tuple[int, int, int], *, pretrained_grid: int | None = None) -> Tensor:
    """Frame, row and column of patches: int64 ids [..., K] -> float32 [..., K, 3], in patches, for `Rope`.

    ids: n = (t * Gh + h) * Gw + w for patch (t, h, w) of the grid (Gt, Gh, Gw). Frames past Gt are as good: a
        predictor may look beyond the clip.
    pretrained_grid: rows h (and columns) are spread over those of a square grid of this side G0, at fractions
        h (G0 - 1) / (Gh - 1); frames stay. V-JEPA 2.1 takes 256 // patch_size at every resolution. None: h itself.
    Raises ValueError and TypeError for arguments that do not fit.
    """
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64:
        actual = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        fail("patch_positions", "ids", "be an int64 tensor", actual, "pass patch numbers", TypeError)
    if len(grid) != 3 or min(grid) < 1:
        fail("patch_positions", "grid", "be (Gt, Gh, Gw), each at least 1", grid, "an image has one frame: (1, Gh, Gw)")
    if pretrained_grid is not None and pretrained_grid < 1:
        fail("patch_positions", "pretrained_grid", "be at least 1", pretrained_grid, "256 // patch_size is published")
    frame, place = ids // (grid[1] * grid[2]), ids % (grid[1] * grid[2])
    row, column = place // grid[2], place % grid[2]
    if pretrained_grid is not None:  # of a lone row, 0 is 0 whatever the scale
        row = row * float(pretrained_grid - 1) / max(grid[1] - 1, 1)
        column = column * float(pretrained_grid - 1) / max(grid[2] - 1, 1)
    return torch.stack([frame.float(), row.float(), column.float()], -1)


def published_frequencies(
    count: int, dtype: torch.dtype, device: torch.device, power_dtype: torch.dtype | None = None
) -> Tensor:
    """10000 ** (-j / count), j < count, rounded as in the published code: the exponents in `dtype`, that of queries,
    the powers in `power_dtype`; None: in what autocast makes of the exponents."""
    exponents = torch.arange(count, dtype=dtype, device=device) / count
    return 1.0 / 10000 ** exponents.to(power_dtype or dtype)


def _capturing(x: Tensor) -> bool:
    """Whether x is made inside a CUDA graph, whose memory other graphs may not read."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def turn(x: Tensor, turns: Tensor, half: bool) -> Tensor:
    """x [..., H, D] by turns [..., 2, R], in fp32 or wider: y[i] = x[i] turns[0, i] + x[partner] turns[1, i]."""
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = turns.to(wide).unsqueeze(-3).unbind(-2)
    turning, rest = x[..., : cos.shape[-1]].to(wide), x[..., cos.shape[-1] :]
    partner = turning.roll(turning.shape[-1] // 2, -1) if half else turning.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.cat([(turning * cos + partner * sin).to(x.dtype), rest], -1)


def _check_positions(name: str, x: Any, positions: Tensor) -> None:
    if not isinstance(x, Tensor):
        fail("Rope", name, "be a tensor", type(x).__name__, "convert it with torch.as_tensor", TypeError)
    if x.dim() not in (2, 3) or not 1 <= x.shape[-1] <= 3:
        fail("Rope", name, "have shape [T, a], [N, a] or [B, N, a] with 1 to 3 axes", tuple(x.shape), "reshape it")
    if x.dtype == torch.bool or x.is_complex():
        fail("Rope", name, "be integers or floats", x.dtype, "pass coordinates", TypeError)
    if x.shape[-1] != positions.shape[-1]:
        fail("Rope", name, f"have {positions.shape[-1]} axes like positions", x.shape[-1], "pass one for each axis")
    if x.device != positions.device:
        fail("Rope", name, f"be on {positions.device} like positions", x.device, "move it with .to(device)")
