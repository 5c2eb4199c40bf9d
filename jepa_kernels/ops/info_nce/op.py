"""Public face of `info_nce`."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from jepa_kernels._core.check import (
    INT64,
    check_number,
    check_tensor,
    fail,
    has_values,
    is_number,
    is_positive,
    sizes_of,
)
from jepa_kernels._core.define import define, differentiable
from jepa_kernels._core.select import Kernel, select
from jepa_kernels.ops.info_nce import reference
from jepa_kernels.ops.info_nce.items import MAX_ITEMS, items_of, mean_loss, shares

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

OP = "info_nce"
KERNELS = (Kernel("triton"), Kernel("cpu"))


def info_nce(
    x: Tensor,
    y: Tensor,
    temperature: float | Tensor,
    *,
    normalize: bool = True,
    label_smoothing: float = 0.0,
    duplicates: Tensor | None = None,
    group: "ProcessGroup | None" = None,
    backend: str | None = None,
) -> Tensor:
    """Tell each pair (x_i, y_i) from every other pairing, in both directions: symmetric InfoNCE, B x B never in memory.

    S = x^ y^T / temperature, x^ = x / max(|x|, 1e-12) where `normalize`, else x; y^ likewise
    loss = (mean_i CE(S[i, :], i) + mean_j CE(S[:, j], j)) / 2

    x, y: [B, E], one dtype of fp32, bf16 or fp16, any strides; B at most 2^24 with duplicates. |x_i| |y_j| below 1e38,
        with normalize too: kernels may multiply first.
    temperature: > 0, a number or a 0-dim floating tensor on x's device, which gets a gradient (learned). A tensor on
        a GPU is not read: a value that is not positive gives meaningless numbers there. Under torch.compile each
        other number compiles anew: pass a tensor where it changes.
    label_smoothing: in [0, 1], as in torch's cross_entropy: a share of the target spread evenly over all candidates.
    duplicates: int64 [B], the item that row i of x and of y stands for. Entries (i, j), i != j, of equal items are
        neither positives nor negatives: left out of both log-sum-exps and of label smoothing, whose share is then
        spread over the candidates that are left. The positive of a row stays (i, i) alone.
    group: a process group whose ranks hold B_r rows each, B_r free (also 0); E, dtype, backend, options and which of
        x, y and temperature need gradients are the same: one small all-gather compares them first, and its answer is
        waited for (with NCCL, one synchronisation with the device a call). Every rank returns the loss of all rows in
        the order of ranks, and its gradients are those of the sum over ranks of what they return, as of an all-gather:
        averaged over ranks, as DistributedDataParallel does with parameters, they are the single-process gradients.
        Embeddings travel one rank's rows at a time. Runs outside torch.compile.

    Returns an fp32 scalar, 0 for B = 0; also under autocast: statistics are fp32 and better, never lowered. Gradients:
    x, y and a tensor temperature, in their dtypes, from tiles of S computed again. Summed in a fixed order: the same
    bits on every run and for any number of threads. NaN and infinity propagate.
    Raises ValueError and TypeError for arguments that do not fit, on every rank of a group where one's do not.
    Source: van den Oord et al. (arXiv:1807.03748); CLIP (arXiv:2103.00020) section 2.3; VL-JEPA (arXiv:2512.10942).
    """
    if group is not None:
        from jepa_kernels.ops.info_nce.distributed import over_ranks

        return over_ranks(x, y, temperature, normalize, label_smoothing, duplicates, group, backend)
    check_arguments(x, y, temperature, normalize, label_smoothing, duplicates)
    backend = select(OP, KERNELS, backend, x)
    if backend == "reference":
        return reference.forward(
            x, y, temperature, normalize=normalize, label_smoothing=label_smoothing, duplicates=duplicates
        )
    items = None if duplicates is None else items_of(duplicates)
    scale = as_tensor(temperature, x.device)
    return _loss(x, y, scale, items, items, 0, float(label_smoothing), normalize, backend)[0]


def as_tensor(temperature: float | Tensor, device: torch.device) -> Tensor:
    """As the kernels take it: float64, 0-dim."""
    if isinstance(temperature, Tensor):
        return temperature.double()
    return torch.full((), float(temperature), dtype=torch.float64, device=device)


USUAL = sizes_of("B E f", "B E f", "g|None", "B int64|None")


def check_arguments(
    x: Tensor,
    y: Tensor,
    temperature: float | Tensor,
    normalize: bool,
    label_smoothing: float,
    duplicates: Tensor | None,
) -> None:
    """Whatever one process can tell."""
    learned = temperature if isinstance(temperature, Tensor) else None
    if USUAL(x, y, learned, duplicates) is None:
        _check_tensors(x, y, learned, duplicates)
    _check_temperature(temperature)
    if not isinstance(normalize, bool):
        fail(OP, "normalize", "be a bool", type(normalize).__name__, "pass True or False", TypeError)
    check_number(OP, "label_smoothing", label_smoothing)
    if not 0 <= label_smoothing <= 1:
        fail(OP, "label_smoothing", "lie in [0, 1]", label_smoothing, "use 0 for none")
    if duplicates is not None and x.shape[0] > MAX_ITEMS:
        fail(OP, "duplicates", f"label at most {MAX_ITEMS} rows", x.shape[0], "leave it out")


def _check_tensors(x: Tensor, y: Tensor, temperature: Tensor | None, duplicates: Tensor | None) -> None:
    check_tensor(OP, "x", x, "B E")
    check_tensor(OP, "y", y, "B E", dtypes=(x.dtype,), device=x.device)
    if y.shape != x.shape:
        fail(OP, "y", f"have shape {tuple(x.shape)} like x", tuple(y.shape), "pass one row of y for each of x")
    if temperature is not None:
        check_tensor(OP, "temperature", temperature, "", device=x.device)
        if temperature.dim():
            fail(OP, "temperature", "be a number or 0-dim", f"shape {tuple(temperature.shape)}", "index or sum it")
    if duplicates is not None:
        check_tensor(OP, "duplicates", duplicates, "B", dtypes=INT64, device=x.device)
        if duplicates.shape[0] != x.shape[0]:
            fail(OP, "duplicates", f"hold {x.shape[0]} labels like x", duplicates.shape[0], "pass one label a row")


def _check_temperature(temperature: float | Tensor) -> None:
    if isinstance(temperature, Tensor):
        if not has_values(temperature):
            return
        temperature = temperature.item()
    elif not is_number(temperature):
        fail(OP, "temperature", "be a number or a tensor", type(temperature).__name__, "pass a float", TypeError)
    if not is_positive(temperature):
        fail(OP, "temperature", "be positive and finite", temperature, "use 0.07; learn its logarithm")


FORWARD = (
    "(Tensor x, Tensor y, Tensor temperature, Tensor? items, Tensor? column_items, int shift, float label_smoothing,"
    " bool normalize, str backend)"
)
BACKWARD = (
    "(Tensor weight, Tensor x, Tensor y, Tensor temperature, Tensor? items, Tensor? column_items, Tensor row_lse,"
    " Tensor col_lse, Tensor? row_share, Tensor? col_share, int shift, float kept, bool normalize, bool wide,"
    " str backend) -> (Tensor dx, Tensor dy, Tensor dtemperature)"
)


def _fake(x: Tensor, y: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    rows, columns = x.new_empty(x.shape[0], dtype=torch.float64), x.new_empty(y.shape[0], dtype=torch.float64)
    empty = x.new_empty(0, dtype=torch.float64)
    sums = (torch.empty_like(rows), torch.empty_like(columns)) if rest[4] > 0 else (empty, torch.empty_like(empty))
    return rows, columns, x.new_empty(x.shape[0], dtype=torch.float32), *sums


def _backward_fake(weight: Tensor, x: Tensor, y: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    dx, dy = (t.new_empty(t.shape, dtype=torch.float32 if rest[-2] else t.dtype) for t in (x, y))
    return dx, dy, x.new_empty((), dtype=torch.float64)


forward_block = define(
    OP,
    "forward",
    f"{FORWARD} -> (Tensor row_lse, Tensor col_lse, Tensor diagonal, Tensor row_sum, Tensor col_sum)",
    _fake,
)
backward_block = define(OP, "backward", BACKWARD, _backward_fake)


def _whole(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, row_lse, col_lse, shares of label smoothing or an empty tensor) of one process's rows."""
    x, items, smoothing = inputs[0], inputs[3], inputs[6]
    row_lse, col_lse, diagonal, *sums = forward_block(*inputs)
    share = shares(smoothing, items, x) if smoothing else None
    loss = mean_loss((row_lse, col_lse), diagonal, (sums[0], sums[1]), share, smoothing)
    return loss, row_lse, col_lse, x.new_empty(0, dtype=torch.float32) if share is None else share


def _whole_fake(x: Tensor, y: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    row_lse, col_lse, *_ = _fake(x, y, *rest)
    share = x.new_empty(x.shape[0] if rest[4] else 0, dtype=torch.float32)
    return x.new_empty((), dtype=torch.float32), row_lse, col_lse, share


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:5], *output[1:])
    ctx.shift, ctx.smoothing, ctx.normalize, ctx.backend = inputs[5:]


def _gradient(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 9
    x, y, temperature, items, column_items, row_lse, col_lse, share = ctx.saved_tensors
    share = share if ctx.smoothing else None
    weight = grad.float() / (2 * max(x.shape[0], 1))
    found = backward_block(
        weight, x, y, temperature, items, column_items, row_lse, col_lse, share, share,
        ctx.shift, 1 - ctx.smoothing, ctx.normalize, False, ctx.backend,
    )  # fmt: skip
    return (*found, *(None,) * 6)


_loss = differentiable(
    OP,
    _whole,
    f"{FORWARD} -> (Tensor loss, Tensor row_lse, Tensor col_lse, Tensor share)",
    _whole_fake,
    _setup,
    _gradient,
)
