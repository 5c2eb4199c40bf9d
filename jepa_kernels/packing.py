"""Packing: sequences of different lengths side by side on one token axis, with no padding between them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from jepa_kernels._core.check import check_tensor, fail


class Packing:
    """Where each of S sequences lies on a packed token axis [T, ...]. Immutable.

    Sequence s owns tokens `cu_seqlens[s]:cu_seqlens[s + 1]`. With several masks of the same B images the order is
    mask-major: s = mask * B + image.

    cu_seqlens: int32 [S + 1], contiguous, on the tokens' device: rising from 0 to at most T. Its values are not
        checked, which would wait for the device: wrong ones give wrong results.
    lengths: the same on the host; compiled code never reads it.
    tokens: T, the length of the token axis; it may exceed cu_seqlens[-1] (see `padded`): rows past the end are
        never read, their outputs and gradients are 0.
    max_seqlen: an upper bound of the lengths, known without a device sync.
    pairs: sum of lengths squared, for FLOP formulas.
    tiles: int32 [tokens // TILE + S, 2], the schedule of attention: (sequence, block of TILE tokens), most work first,
        then (-1, 0). Built once, on the host; every layer and both passes read it.
    """

    __slots__ = ("cu_seqlens", "lengths", "max_seqlen", "pairs", "tiles", "tokens")

    TILE = 64

    cu_seqlens: Tensor
    lengths: tuple[int, ...]
    tokens: int
    max_seqlen: int
    pairs: int
    tiles: Tensor

    def __init__(self, cu_seqlens: Tensor, lengths: tuple[int, ...], tokens: int, max_seqlen: int):
        _check_cu_seqlens(cu_seqlens)
        self._set(cu_seqlens, _schedule(lengths, tokens).to(cu_seqlens.device), lengths, tokens, max_seqlen)

    @classmethod
    def _of(cls, cu_seqlens: Any, tiles: Any, lengths: tuple[int, ...], tokens: int, max_seqlen: int) -> Packing:
        """From its parts, as they are."""
        packing = cls.__new__(cls)
        packing._set(cu_seqlens, tiles, lengths, tokens, max_seqlen)
        return packing

    def _set(self, cu_seqlens: Any, tiles: Any, lengths: tuple[int, ...], tokens: int, max_seqlen: int) -> None:
        for name, value in (
            ("cu_seqlens", cu_seqlens),
            ("tiles", tiles),
            ("lengths", lengths),
            ("tokens", tokens),
            ("max_seqlen", max_seqlen),
            ("pairs", sum(n * n for n in lengths)),
        ):
            object.__setattr__(self, name, value)
        if isinstance(tiles, Tensor) and not torch.compiler.is_compiling():
            # What torch._dynamo.maybe_mark_dynamic sets: how many tiles there are is dynamic from the first trace on,
            # though two packings may happen to have as many.
            tiles._dynamo_weak_dynamic_indices = {0}  # type: ignore[attr-defined]

    def __reduce__(self) -> tuple[Any, ...]:
        return Packing._of, (self.cu_seqlens, self.tiles, self.lengths, self.tokens, self.max_seqlen)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"Packing: {name} must stay as it is, got an assignment; build a new Packing")

    @classmethod
    def from_lengths(
        cls,
        lengths: Iterable[int],
        *,
        tokens: int | None = None,
        bucket: int = 0,
        device: torch.device | str | None = None,
    ) -> Packing:
        """Sequences of these lengths, one after another. Lengths may be 0. Copies one small tensor to `device`.

        tokens: length of the token axis; None: the lengths' sum.
        bucket: not 0: the axis is padded up to a multiple of it, the bound of the lengths up to a power of two, so that
            lengths that change have few shapes. Both as of `padded`.
        """
        given = tuple(lengths)
        host = tuple(int(n) for n in given)
        if host != given:
            actual = next(n for n, whole in zip(given, host, strict=True) if n != whole)
            fail("Packing", "lengths", "be whole numbers", actual, "count the kept tokens of each sequence")
        if any(n < 0 for n in host):
            fail("Packing", "lengths", "be at least 0", min(host), "count the kept tokens of each sequence")
        if sum(host) >= 2**31:
            fail("Packing", "lengths", "sum to less than 2^31", sum(host), "split the batch")
        longest, tokens = max(host, default=0), sum(host) if tokens is None else tokens
        if tokens < sum(host):
            fail("Packing", "tokens", f"be at least {sum(host)}", tokens, "leave it out for the lengths' sum")
        if bucket:
            longest, tokens = 1 << (longest - 1).bit_length() if longest else 0, round_up(tokens, bucket)
        return cls._build(host, tokens, longest, device)

    @classmethod
    def _build(
        cls, lengths: tuple[int, ...], tokens: int, max_seqlen: int, device: torch.device | str | None
    ) -> Packing:
        place = torch.get_default_device() if device is None else torch.device(device)
        tiles = _schedule(lengths, tokens)
        both = torch.zeros(tiles.numel() + len(lengths) + 1, dtype=torch.int32, device="cpu")  # one copy to the device
        both[: tiles.numel()] = tiles.flatten()
        torch.cumsum(torch.tensor(lengths, dtype=torch.int32, device="cpu"), 0, out=both[tiles.numel() + 1 :])
        both = both.pin_memory().to(place, non_blocking=True) if place.type == "cuda" else both.to(place)
        return cls._of(both[tiles.numel() :], both[: tiles.numel()].view(-1, 2), lengths, tokens, max_seqlen)

    @classmethod
    def uniform(cls, sequences: int, length: int, *, device: torch.device | str | None = None) -> Packing:
        """`sequences` sequences of one length."""
        return cls.from_lengths((length,) * sequences, device=device)

    @classmethod
    def from_ids(cls, ids: Sequence[Tensor], *, device: torch.device | str | None = None) -> tuple[Tensor, Packing]:
        """Lists of patch ids, one per sequence -> (ids int64 [T], Packing)."""
        packing = cls.from_lengths([len(row) for row in ids], device=device)
        flat = torch.cat([torch.as_tensor(row) for row in ids]) if len(ids) else torch.empty(0)
        return flat.to(dtype=torch.int64, device=device), packing

    @classmethod
    def from_mask(cls, keep: Tensor) -> tuple[Tensor, Packing]:
        """keep bool [B, N] -> (ids int64 [T] of the True entries, Packing). Syncs with the device once."""
        if keep.dim() != 2 or keep.dtype != torch.bool:
            fail("Packing", "keep", "be bool [B, N]", f"{keep.dtype} {tuple(keep.shape)}", "compare it with 0")
        packing = cls.from_lengths(keep.sum(1).tolist(), device=keep.device)
        return keep.nonzero()[:, 1], packing

    @property
    def sequences(self) -> int:
        """S, without reading `lengths`."""
        return self.cu_seqlens.shape[0] - 1

    def padded(self, tokens: int, sequences: int, max_seqlen: int) -> Packing:
        """The same sequences in a bigger, fixed shape: more rows, empty sequences, a larger bound.

        For CUDA graphs and length buckets: shapes stay, lengths change.
        """
        for name, wanted, least in (
            ("tokens", tokens, self.tokens),
            ("sequences", sequences, self.sequences),
            ("max_seqlen", max_seqlen, self.max_seqlen),
        ):
            if wanted < least:
                fail("Packing", name, f"be at least {least}", wanted, "choose a larger bucket")
        lengths = self.lengths + (0,) * (sequences - self.sequences)
        return self._build(lengths, tokens, max_seqlen, self.cu_seqlens.device)

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """x [T, ...] -> one view per sequence."""
        self._check_tokens("x", x)
        return x[: sum(self.lengths)].split(self.lengths)

    def pad(self, x: Tensor, *, value: float = 0.0) -> Tensor:
        """x [T, ...] -> [S, max_seqlen, ...], filled with `value` behind each sequence. Differentiable."""
        self._check_tokens("x", x)
        place, inside = self._places()
        if x.shape[0] == 0:  # nothing to index; the gradient still finds its way to x
            filled = x.new_full((self.sequences, self.max_seqlen, *x.shape[1:]), value)
            return torch.cat([filled.flatten(0, 1), x]).view_as(filled)
        inside = inside.view(*inside.shape, *(1,) * (x.dim() - 1))
        return torch.where(inside, x[place], x.new_full((), value))

    def unpad(self, x: Tensor) -> Tensor:
        """x [S, max_seqlen, ...] -> [T, ...], the inverse of `pad`; rows past the last sequence are 0."""
        if x.shape[:2] != (self.sequences, self.max_seqlen):
            fail(
                "Packing",
                "x",
                f"start with [{self.sequences}, {self.max_seqlen}]",
                tuple(x.shape),
                "pad it first",
            )
        place, inside = self._places()
        out = x.new_zeros((self.tokens + 1, *x.shape[2:]))  # the last row takes what is outside
        place = torch.where(inside, place, self.tokens).flatten()
        return out.index_copy(0, place, x.flatten(0, 1))[: self.tokens]

    def _places(self) -> tuple[Tensor, Tensor]:
        """[S, max_seqlen]: each entry's place on the token axis (clamped), and whether it exists."""
        cu = self.cu_seqlens.long()
        column = torch.arange(self.max_seqlen, device=cu.device)
        inside = column < cu.diff()[:, None]
        return torch.where(inside, cu[:-1, None] + column, 0), inside

    def sequence_of_token(self) -> Tensor:
        """int64 [T]: the sequence each token belongs to; S for rows past the last sequence."""
        rows = torch.arange(self.tokens, device=self.cu_seqlens.device, dtype=torch.int32)
        return torch.searchsorted(self.cu_seqlens[1:].contiguous(), rows, right=True)

    def place_of_token(self) -> Tensor:
        """int64 [T]: how many tokens of its sequence stand before each one."""
        start = self.cu_seqlens[self.sequence_of_token()]
        return torch.arange(self.tokens, device=start.device) - start

    def mean(self, x: Tensor) -> Tensor:
        """The mean of each sequence's tokens, summed in fp32 or wider: x [T, ...] -> [S, ...]; 0 for empty ones.
        Differentiable."""
        self._check_tokens("x", x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        offsets = self.cu_seqlens.long()
        return torch.segment_reduce(wide, "mean", offsets=offsets, unsafe=True, initial=0).to(x.dtype)

    def dense_mask(self) -> Tensor:
        """bool [T, T]: True where two tokens share a sequence (for SDPA's attn_mask)."""
        owner = self.sequence_of_token()
        return (owner[:, None] == owner) & (owner < self.sequences)

    def to_nested(self, x: Tensor) -> Tensor:
        """x [T, ...] as a jagged torch.nested tensor over the same memory."""
        self._check_tokens("x", x)
        return torch.nested.nested_tensor_from_jagged(x, offsets=self.cu_seqlens.long())

    def block_mask(self) -> Any:
        """The FlexAttention BlockMask of these sequences, for [1, H, T, D] tensors."""
        from torch.nn.attention.flex_attention import create_block_mask

        owner = self.sequence_of_token()

        def same_sequence(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (owner[i] == owner[j]) & (owner[i] < self.sequences)

        return create_block_mask(same_sequence, None, None, self.tokens, self.tokens, device=str(owner.device))

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Packing:
        """The same Packing with its tensors on another device."""
        cu, tiles = (x.to(device, non_blocking=non_blocking) for x in (self.cu_seqlens, self.tiles))
        return Packing._of(cu, tiles, self.lengths, self.tokens, self.max_seqlen)

    def _check_tokens(self, argument: str, x: Tensor) -> None:
        if x.shape[0] != self.tokens:
            fail("Packing", argument, f"have {self.tokens} tokens", x.shape[0], "pack it with the same lengths")

    def __repr__(self) -> str:
        return f"Packing(sequences={self.sequences}, tokens={self.tokens}, max_seqlen={self.max_seqlen})"


def round_up(tokens: int, bucket: int) -> int:
    """To a multiple of `bucket`; 0: as it is."""
    return -(-tokens // bucket) * bucket if bucket else tokens


def _schedule(lengths: tuple[int, ...], tokens: int) -> Tensor:
    """`Packing.tiles`, on the host, of a size that depends on `tokens` and S alone."""
    tiles = torch.zeros(tokens // Packing.TILE + len(lengths), 2, dtype=torch.int32, device="cpu")
    if sum(lengths) > tokens:
        fail("Packing", "lengths", f"sum to at most tokens = {tokens}", sum(lengths), "count the rows again")
    used = sum(-(-n // Packing.TILE) for n in lengths)
    tiles[used:, 0] = -1
    length = torch.tensor(lengths, dtype=torch.int64, device="cpu")
    blocks = (length + Packing.TILE - 1) // Packing.TILE
    sequence = torch.repeat_interleave(blocks, output_size=used)
    block = torch.arange(used, device="cpu") - (blocks.cumsum(0) - blocks)[sequence]
    work = (length[sequence] - block * Packing.TILE).clamp(max=Packing.TILE) * length[sequence]
    order = work.argsort(descending=True, stable=True)
    tiles[:used] = torch.stack([sequence, block], 1)[order]
    return tiles


def _check_cu_seqlens(cu_seqlens: Any) -> None:
    check_tensor("Packing", "cu_seqlens", cu_seqlens, "S+1", dtypes=(torch.int32,))
    if not cu_seqlens.is_contiguous():
        fail("Packing", "cu_seqlens", "be contiguous", f"strides {cu_seqlens.stride()}", "call .contiguous()")


def pack(tensors: Sequence[Tensor]) -> tuple[Tensor, Packing]:
    """Tensors [n_s, ...] that differ only in n_s -> (one [T, ...], Packing). Differentiable."""
    if not tensors:
        fail("pack", "tensors", "hold at least one tensor", "none", "pass a list of [n, ...] tensors")
    shapes = {tuple(x.shape[1:]) for x in tensors}
    if len(shapes) > 1:
        fail("pack", "tensors", "agree in all but their first dimension", sorted(shapes), "reshape them")
    return torch.cat(list(tensors)), Packing.from_lengths([len(x) for x in tensors], device=tensors[0].device)


def _flatten(p: Packing) -> tuple[list[Any], Any]:
    return [p.cu_seqlens, p.tiles, p.tokens, p.max_seqlen], p.lengths


def _keyed(p: Packing) -> tuple[list[tuple[Any, Any]], Any]:
    values, lengths = _flatten(p)
    keys = map(pytree.GetAttrKey, ("cu_seqlens", "tiles", "tokens", "max_seqlen"))
    return list(zip(keys, values, strict=True)), lengths


def _unflatten(values: Iterable[Any], lengths: Any) -> Packing:
    cu, tiles, tokens, max_seqlen = values
    if isinstance(cu, Tensor):  # pytree utilities put specs, nodes and None in the leaves' places
        _check_cu_seqlens(cu)
    return Packing._of(cu, tiles, lengths, tokens, max_seqlen)


pytree.register_pytree_node(
    Packing, _flatten, _unflatten, serialized_type_name="jepa_kernels.Packing", flatten_with_keys_fn=_keyed
)
