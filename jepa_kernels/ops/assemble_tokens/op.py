"""Public face of `assemble_tokens`."""

from operator import add
from typing import Any

import torch
from torch import Tensor

from jepa_kernels._core.check import INT64, check_ids, check_packing, check_placed, check_tensor, fail, sizes_of
from jepa_kernels._core.define import define, differentiable
from jepa_kernels._core.select import Kernel, select
from jepa_kernels.ops.assemble_tokens import reference
from jepa_kernels.packing import Packing

OP = "assemble_tokens"

KERNELS = (Kernel("triton"), Kernel("cpu"))

Packings = tuple[Packing | None, Packing | None, Packing | None]


def assemble_tokens(
    context: Tensor,
    mask_token: Tensor,
    context_ids: Tensor | None = None,
    target_ids: Tensor | None = None,
    pos_embed: Tensor | None = None,
    *,
    context_packing: Packing | None = None,
    target_packing: Packing | None = None,
    packing: Packing | None = None,
    backend: str | None = None,
) -> Tensor:
    """Write the predictor's sequences [context | mask tokens], every token straight to its place.

    Sequence s of St is context s % Sc, out = context[c] + pos[context_ids[c]] for its tokens c, followed by the
    targets of s, out = mask_token[s // (St / G)] + pos[target_ids[t]] for its places t. Masks of the same images are
    mask-major, and the sequences of one mask token are neighbours.

    context: [Sc, Kc, E], or [Tc, E] with context_packing of Sc sequences; fp32, bf16 or fp16, any strides.
    mask_token: [G, E], G a divisor of St. pos_embed: [N, E], frozen, or None: nothing is added. Both in context's
        dtype or fp32.
    context_ids: [Sc, Kc] or [Tc], target_ids: [St, Kt] or [Tt], int64 in [0, N), increasing within each row. Read
        only where there is a pos_embed; rectangular calls state St and Kt by target_ids and always have them.
    context_packing, target_packing, packing: all or none. target_packing has the St target lengths, a multiple of
        Sc in number; packing the St sequences' own, context and target together.

    Returns [St, Kc + Kt, E], or [packing.tokens, E] with rows past packing's last sequence 0; contiguous, in
    context's dtype: added in fp32, rounded once. Under autocast that is the low type of the projection before it,
    while tokens and positions stay as they are.
    Gradient: of context, the sum over its sequences in fp32 in order; of mask_token, the sum over the rows of its
    group in fp32, blocks of rows by themselves and their sums in order: the same bits on every run and for any number
    of threads.
    Raises ValueError and TypeError for arguments that do not fit.
    Source: the predictors of I-JEPA (arXiv:2301.08243) section 3 and V-JEPA (arXiv:2404.08471) section 3.2, without
    their repeated tokens, concatenation and sort.
    """
    packings = context_packing, target_packing, packing
    rows = _check(context, mask_token, context_ids, target_ids, pos_embed, packings)
    backend = select(OP, KERNELS, backend, context)
    if backend == "reference":
        named = dict(context_packing=context_packing, target_packing=target_packing, packing=packing)
        return reference.forward(context, mask_token, context_ids, target_ids, pos_embed, **named)
    if pos_embed is None:
        context_ids = target_ids = None
    boundaries = (None if p is None else p.cu_seqlens for p in packings)
    return _assemble(context, mask_token, context_ids, target_ids, pos_embed, *boundaries, rows, backend)


RECTANGULAR = sizes_of(
    "C K E f", "G E f|float32", "N E f|float32|None", "C K int64|None contiguous", "S L int64 contiguous"
)
PACKED = sizes_of(
    *("T E f", "G E f|float32", "N E f|float32|None", "T int64|None contiguous", "L int64|None contiguous"),
    *("C+1 int32", "S+1 int32", "S+1 int32"),
)


# The numbers of contexts, of sequences, of mask tokens and of positions, and the result's dimensions before E.
Sizes = tuple[int, int, int, int, list[int]]


def _check(
    context: Tensor,
    mask_token: Tensor,
    context_ids: Tensor | None,
    target_ids: Tensor | None,
    pos_embed: Tensor | None,
    packings: Packings,
) -> list[int]:
    """The dimensions of the result before E."""
    _check_given(packings)
    given = context, mask_token, context_ids, target_ids, pos_embed, packings
    contexts, sequences, groups, count, rows = _usual(*given) or _check_each(*given)
    if sequences % contexts if contexts else sequences:
        name = "target_ids" if packings[0] is None else "target_packing"
        remedy = "order sequences mask-major: s = mask * Sc + c"
        fail(OP, name, f"hold a multiple of the {contexts} contexts", sequences, remedy)
    if groups == 0 or sequences % groups:
        fail(OP, "mask_token", f"hold a divisor of the {sequences} sequences", groups, "pass [1, E], or one a mask")
    if pos_embed is not None:
        if pos_embed.requires_grad:
            fail(OP, "pos_embed", "be frozen", "requires_grad=True", "detach it: positions get no gradient here")
        contexts_of, targets_of, _ = packings
        own = None if contexts_of is None else contexts_of.cu_seqlens
        other = None if targets_of is None else targets_of.cu_seqlens
        check_ids(OP, context_ids, count, own, "context_ids")  # type: ignore[arg-type]
        check_ids(OP, target_ids, count, other, "target_ids")  # type: ignore[arg-type]
    return rows


def _usual(
    context: Tensor, mask_token: Tensor, context_ids: Any, target_ids: Any, pos_embed: Any, packings: Any
) -> Sizes | None:
    if pos_embed is not None and (context_ids is None or target_ids is None):
        return None
    contexts, targets, packing = packings
    own, other = (None, None) if pos_embed is None else (context_ids, target_ids)  # read for positions alone
    if packing is None:
        sizes = RECTANGULAR(context, mask_token, pos_embed, own, target_ids)
        if sizes is None:
            return None
        count, kept, _, groups, positions, sequences, places = sizes
        return count, sequences, groups, positions, [sequences, kept + places]
    boundaries = contexts.cu_seqlens, targets.cu_seqlens, packing.cu_seqlens
    sizes = PACKED(context, mask_token, pos_embed, own, other, *boundaries)
    if sizes is None:
        return None
    tokens, _, groups, positions, places, count, sequences = sizes
    if tokens != contexts.tokens or places not in (None, targets.tokens):
        return None
    _check_lengths(contexts.lengths, targets.lengths, packing.lengths)
    return count, sequences, groups, positions, [packing.tokens]


def _check_each(
    context: Tensor, mask_token: Tensor, context_ids: Any, target_ids: Any, pos_embed: Any, packings: Any
) -> Sizes:
    packed = packings[0] is not None
    check_tensor(OP, "context", context, "T E" if packed else "S K E")
    _check_table("mask_token", mask_token, "G E", context)
    sizes = _packed_sizes(context, *packings) if packed else _rectangular_sizes(context, target_ids)
    contexts, sequences, targets, rows = sizes
    if pos_embed is not None:
        _check_table("pos_embed", pos_embed, "N E", context)
        _check_positions("context_ids", context_ids, tuple(context.shape)[:-1], packings[0], context.device)
        _check_positions("target_ids", target_ids, targets, packings[1], context.device)
    return contexts, sequences, mask_token.shape[0], 0 if pos_embed is None else pos_embed.shape[0], rows


def _check_given(packings: Packings) -> None:
    if packings[0] is packings[1] is packings[2] is None:
        return
    check_packing(OP, packings[0], "context_packing")
    check_packing(OP, packings[1], "target_packing")
    check_packing(OP, packings[2])
    if None in packings:
        missing = ("context_packing", "target_packing", "packing")[packings.index(None)]
        fail(OP, missing, "be given with the other packings", "None", "pass all three or none", TypeError)


def _check_table(name: str, table: Tensor, shape: str, context: Tensor) -> None:
    own = context.dtype
    dtypes = (own,) if own == torch.float32 else (own, torch.float32)
    check_tensor(OP, name, table, shape, dtypes=dtypes, device=context.device)
    if table.shape[1] != context.shape[-1]:
        remedy = "pass tensors of one width"
        fail(OP, name, f"have {context.shape[-1]} channels like context", table.shape[1], remedy)


def _rectangular_sizes(context: Tensor, target_ids: Tensor | None) -> tuple[Any, ...]:
    """Contexts, sequences, shapes of target_ids and of the result's rows."""
    if target_ids is None:
        fail(OP, "target_ids", "be given without packings", "None", "pass the places [S, K] of the targets", TypeError)
    check_tensor(OP, "target_ids", target_ids, "S K", dtypes=INT64, device=context.device)
    sequences, places = target_ids.shape
    return context.shape[0], sequences, (sequences, places), [sequences, context.shape[1] + places]


def _packed_sizes(context: Tensor, contexts: Any, targets: Any, packing: Any) -> tuple[Any, ...]:
    """As `_rectangular_sizes`."""
    device, rows, sequences = context.device, context.shape[0], targets.sequences
    named = (("context_packing", contexts), ("target_packing", targets), ("packing", packing))
    for name, p in named:
        check_placed(OP, name, p, device)
    if rows != contexts.tokens:
        remedy = "pack it with the same lengths"
        fail(OP, "context", f"hold context_packing.tokens = {contexts.tokens} rows", rows, remedy)
    if packing.sequences != sequences:
        remedy = "give each target its sequence"
        fail(OP, "packing", f"hold {sequences} sequences like target_packing", packing.sequences, remedy)
    if not torch.compiler.is_compiling():
        _check_lengths(contexts.lengths, targets.lengths, packing.lengths)
    return contexts.sequences, sequences, (targets.tokens,), [packing.tokens]


def _check_lengths(contexts: tuple[int, ...], targets: tuple[int, ...], assembled: tuple[int, ...]) -> None:
    """Read on the host, where packings keep them."""
    masks = len(targets) // len(contexts) if contexts else 0
    wanted = tuple(map(add, contexts * masks, targets))
    if len(wanted) == len(targets) and assembled != wanted:
        s = next(i for i, (a, b) in enumerate(zip(assembled, wanted, strict=True)) if a != b)
        remedy = "build it from the sums of the lengths"
        fail(OP, "packing", f"have length {wanted[s]} (context and target) in sequence {s}", assembled[s], remedy)


def _check_positions(
    name: str, ids: Tensor | None, shape: tuple[int, ...], packing: Packing | None, device: torch.device
) -> None:
    if ids is None:
        fail(OP, name, "be given with pos_embed", "None", "pass the patch index of every token", TypeError)
    check_tensor(OP, name, ids, "S K" if packing is None else "T", dtypes=INT64, device=device)
    if ids.shape != shape:
        fail(OP, name, f"have shape {shape}", tuple(ids.shape), "pass the patch index of every token")
    if not ids.is_contiguous():
        fail(OP, name, "be contiguous", f"strides {ids.stride()}", "call .contiguous()")


FORWARD = (
    "(Tensor context, Tensor mask_token, Tensor? context_ids, Tensor? target_ids, Tensor? pos_embed,"
    " Tensor? context_cu_seqlens, Tensor? target_cu_seqlens, Tensor? cu_seqlens, SymInt[] rows, str backend) -> Tensor"
)
BACKWARD = (
    "(Tensor grad, SymInt[] context_rows, Tensor? context_cu_seqlens, Tensor? cu_seqlens, SymInt groups,"
    " bool[2] wanted, str backend) -> (Tensor dcontext, Tensor dmask_token)"
)


def _fake(context: Tensor, *rest: Any) -> Tensor:
    rows = rest[-2]
    return context.new_empty(*rows, context.shape[-1])


def _backward_fake(
    grad: Tensor,
    context_rows: list[int],
    context_cu_seqlens: Tensor | None,
    cu_seqlens: Tensor | None,
    groups: int,
    wanted: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor]:
    channels = grad.shape[-1]
    dcontext = grad.new_empty((*context_rows, channels) if wanted[0] else 0)
    return dcontext, grad.new_empty((groups, channels) if wanted[1] else 0, dtype=torch.float32)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    context, mask_token, *_, context_cu_seqlens, _, cu_seqlens, _, ctx.backend = inputs
    ctx.save_for_backward(context_cu_seqlens, cu_seqlens)
    ctx.context_rows, ctx.groups, ctx.token_dtype = context.shape[:-1], mask_token.shape[0], mask_token.dtype


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[1]]
    dcontext, dtoken = _backward(grad, ctx.context_rows, *ctx.saved_tensors, ctx.groups, wanted, ctx.backend)
    return dcontext if wanted[0] else None, dtoken.to(ctx.token_dtype) if wanted[1] else None, *(None,) * 8


_forward = define(OP, "forward", FORWARD, _fake)
_backward = define(OP, "backward", BACKWARD, _backward_fake)
_assemble = differentiable(OP, _forward, FORWARD, _fake, _setup, _gradient)
