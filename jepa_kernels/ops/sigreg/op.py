"""Public face of `sigreg`."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from jepa_kernels._core.check import FLOATING, check_number, check_tensor, fail, has_values, is_positive
from jepa_kernels._core.define import define, differentiable
from jepa_kernels._core.select import BACKENDS, Kernel, select, short
from jepa_kernels.agreement import agree, bits, check_group
from jepa_kernels.ops.sigreg import reference
from jepa_kernels.ops.sigreg.cpu import kept_size

OP = "sigreg"
MOST = 2**63  # seeds and steps lie below

KERNELS = (Kernel("triton"), Kernel("cpu"))
FACTS = ("dtype", "E", "views", "backend", "slices", "knots", "t_max", "seed", "step")


def sigreg(
    z: Tensor,
    *,
    slices: int = 1024,
    knots: int = 17,
    t_max: float = 3.0,
    step: int | Tensor = 0,
    seed: int = 0,
    group: dist.ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor:
    """Sketched isotropic Gaussian regularisation: how far embeddings are from N(0, 1) along random directions.

    y = z a for each direction a; with phi(t) = exp(-t^2 / 2) and t over `knots` even knots of [0, t_max],
    statistic(a) = N sum_t w(t) phi(t) [(mean_n cos(t y_n) - phi(t))^2 + (mean_n sin(t y_n))^2]
    w: the trapezoid rule's weights on [-t_max, t_max], folded. The result is the mean over directions and views.

    z: [..., N, E]: N embeddings of each view, the views being the leading dimensions; fp32, bf16 or fp16.
    slices: number of directions, >= 1. knots: >= 2. t_max: > 0.
    step: of training, an int or a 0-dim int64 tensor in [0, 2^63); seed: an int in [0, 2^63). The directions are a
        function of (seed, step) alone, the same bits on every rank and backend; no rank sends them to another. A
        compiled step passes a tensor, which nothing compiles anew for.
    group: ranks whose embeddings count as one batch: one all-reduce of 2 x slices x knots numbers a view. N may differ
        between ranks; views, E, dtype, backend and the options may not. Each uncompiled call compares them first, in
        one small all-gather that every rank joins, and waits for its answer: with NCCL, one synchronisation with the
        device. A compiled call compares nothing: compile on every rank or on none. None: this process alone.

    Returns an fp32 scalar, also under autocast: nothing is lowered. No embeddings: 0. About 1.0525 for embeddings from
    N(0, I), 0.4020 N where all have collapsed to 0. Gradient: of z, in its dtype; with a group, world times that of the
    joint statistic by the rank's own rows, so that DDP's mean over ranks is the gradient of a single process. Sums
    have a fixed order: the same bits on every run and for any number of threads. For a gradient the CPU keeps
    4 (V N + E) bytes a slice.
    Raises ValueError and TypeError for arguments that do not fit, on every rank of a group where one's do not.
    Source: LeJEPA (arXiv:2511.08544) section 4; Epps and Pulley, Biometrika 70 (1983).
    """
    if group is None:
        _check(z, slices, knots, t_max, step, seed)
        backend = select(OP, KERNELS, backend, z)
    else:
        backend = _over_ranks((z, slices, knots, t_max, step, seed), group, backend)
    slices, knots, t_max, seed = _plain(slices), _plain(knots), float(t_max), _plain(seed)
    step = step if isinstance(step, Tensor) else _plain(step)
    if backend == "reference":
        return reference.forward(z, slices=slices, knots=knots, t_max=t_max, step=step, seed=seed, group=group)
    if not isinstance(step, Tensor):
        step = torch.scalar_tensor(step, dtype=torch.int64, device="cpu")
    z = z[None] if z.dim() == 2 else z.flatten(0, -3)
    keep = backend == "cpu" and torch.is_grad_enabled() and z.requires_grad
    moments, kept = _moments(z.detach(), slices, knots, t_max, step, seed, keep, backend)
    if group is not None:
        dist.all_reduce(moments, group=group)
    world = 1 if group is None else group.size()
    return _loss(z, moments, t_max, step, seed, world, kept, backend)


def _over_ranks(arguments: tuple[Any, ...], group: dist.ProcessGroup, backend: str | None) -> str:
    """The backend, once arguments fit and are the same on every rank of the group."""
    check_group(OP, group)
    if torch.compiler.is_compiling():
        _check(*arguments)
        return select(OP, KERNELS, backend, arguments[0])
    facts: list[int | Tensor] | Exception
    try:
        _check(*arguments)
        chosen = select(OP, KERNELS, backend, arguments[0])
        facts = _facts(chosen, *arguments)
    except Exception as error:  # the others wait for this rank: they must hear of it, whatever it is
        facts = error
    agree(OP, group, FACTS, facts)
    return chosen


def _facts(
    backend: str, z: Tensor, slices: int, knots: int, t_max: float, step: int | Tensor, seed: int
) -> list[int | Tensor]:
    """What must be the same on every rank, as whole numbers."""
    embeddings = [FLOATING.index(z.dtype), z.shape[-1], z.shape[:-2].numel(), BACKENDS.index(backend)]
    return [*embeddings, slices, knots, bits(t_max), seed, step]


def _check(z: Any, slices: Any, knots: Any, t_max: Any, step: Any, seed: Any) -> None:
    check_tensor(OP, "z", z, " ".join("V" * (z.dim() - 2)) + " N E" if isinstance(z, Tensor) and z.dim() > 2 else "N E")
    if z.shape[-1] == 0:
        fail(OP, "z", "have at least 1 feature", tuple(z.shape), "pass embeddings [..., N, E]")
    _check_count("slices", slices, 1, "1024 is usual")
    _check_count("knots", knots, 2, "17 is usual")
    check_number(OP, "t_max", t_max)
    if not is_positive(t_max):
        fail(OP, "t_max", "be greater than 0 and finite", t_max, "3.0 is usual")
    _check_word("seed", seed)
    if isinstance(step, Tensor):
        _check_step(step, z)
    else:
        _check_word("step", step)


def _check_step(step: Tensor, z: Tensor) -> None:
    if step.dim() != 0 or step.dtype != torch.int64:
        actual = f"{short(step.dtype)} {tuple(step.shape)}"
        fail(OP, "step", "be an int or a 0-dim int64 tensor", actual, "use torch.tensor(step)", TypeError)
    if step.device.type != "cpu" and step.device != z.device:
        fail(OP, "step", f"be on the CPU or on z's device {z.device}", step.device, "move it with .to(device)")
    if has_values(step):
        _check_word("step", step.item())


def _check_count(argument: str, value: Any, least: int, remedy: str) -> None:
    _check_whole(argument, value, remedy)
    if value < least:
        fail(OP, argument, f"be at least {least}", value, remedy)


def _check_word(argument: str, value: Any) -> None:
    _check_whole(argument, value, "pass a whole number")
    if not 0 <= value < MOST:
        fail(OP, argument, "lie in [0, 2^63)", value, "take it modulo 2^63")


def _check_whole(argument: str, value: Any, remedy: str) -> None:
    if not isinstance(value, (int, torch.SymInt, Integral)) or isinstance(value, bool):
        fail(OP, argument, "be an int", type(value).__name__, remedy, TypeError)


def _plain(value: Any) -> Any:
    """A NumPy whole number as Python's, whose products do not overflow."""
    return value if isinstance(value, (int, torch.SymInt)) else int(value)


MOMENTS = (
    "(Tensor z, SymInt slices, SymInt knots, float t_max, Tensor step, SymInt seed, bool keep, str backend)"
    " -> (Tensor moments, Tensor kept)"
)
FORWARD = (
    "(Tensor z, Tensor moments, float t_max, Tensor step, SymInt seed, SymInt world, Tensor kept, str backend)"
    " -> Tensor"
)
BACKWARD = "(Tensor grad, " + FORWARD.removeprefix("(")


def _moments_fake(z: Tensor, slices: int, knots: int, *rest: Any) -> tuple[Tensor, Tensor]:
    moments = z.new_empty((z.shape[0], 2, knots, slices), dtype=torch.float32)
    *_, keep, backend = rest
    return moments, moments.new_empty(kept_size(z, slices) if keep and backend == "cpu" else 0)


def _forward_fake(z: Tensor, *rest: Any) -> Tensor:
    return z.new_empty((), dtype=torch.float32)


def _backward_fake(grad: Tensor, z: Tensor, *rest: Any) -> Tensor:
    return z.new_empty(z.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    z, moments, ctx.t_max, step, ctx.seed, ctx.world, kept, ctx.backend = inputs
    ctx.save_for_backward(z, moments, step, kept)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 8
    z, moments, step, kept = ctx.saved_tensors
    return (_backward(grad, z, moments, ctx.t_max, step, ctx.seed, ctx.world, kept, ctx.backend), *(None,) * 7)


_moments = define(OP, "moments", MOMENTS, _moments_fake)
_forward = define(OP, "forward", FORWARD, _forward_fake)
_backward = define(OP, "backward", BACKWARD, _backward_fake)
_loss = differentiable(OP, _forward, FORWARD, _forward_fake, _setup, _gradient)
