"""Public face of `sigreg`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from jepa_kernels._core.check import check_number, check_tensor, fail
from jepa_kernels._core.define import define, differentiable
from jepa_kernels._core.select import Kernel, select, short
from jepa_kernels.ops.sigreg import reference
from jepa_kernels.ops.sigreg.ranks import add_over_ranks

OP = "sigreg"
MOST = 2**63  # seeds and steps lie below

KERNELS = (Kernel("triton"), Kernel("cpu"))


def sigreg(
    z: Tensor,
    *,
    slices: int = 1024,
    knots: int = 17,
    t_max: float = 3.0,
    step: int | Tensor = 0,
    seed: int = 0,
    group: torch.distributed.ProcessGroup | None = None,
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
        between ranks; views, E and the options may not, which is checked when a group's first call, or a call with
        other options than the last, runs uncompiled. None: this process alone.

    Returns an fp32 scalar, also under autocast: nothing is lowered. No embeddings: 0. About 1.0525 for embeddings from
    N(0, I), 0.4020 N where all have collapsed to 0. Gradient: of z, in its dtype; with a group, world times that of the
    joint statistic by the rank's own rows, so that DDP's mean over ranks is the gradient of a single process. Sums
    have a fixed order: the same bits on every run and for any number of threads.
    Raises ValueError and TypeError for arguments that do not fit.
    Source: LeJEPA (arXiv:2511.08544) section 4; Epps and Pulley, Biometrika 70 (1983).
    """
    _check(z, slices, knots, t_max, step, seed)
    backend = select(OP, KERNELS, backend, z)
    options: dict[str, Any] = dict(slices=slices, knots=knots, t_max=t_max, step=step, seed=seed)
    if backend == "reference":
        return reference.forward(z, **options, group=group)
    if not isinstance(step, Tensor):
        step = torch.scalar_tensor(step, dtype=torch.int64)
    z = z[None] if z.dim() == 2 else z.flatten(0, -3)
    moments = _moments(z.detach(), slices, knots, t_max, step, seed, backend)
    if group is not None:
        moments = add_over_ranks(moments, group, views=len(z), width=z.shape[-1], **options)
    world = 1 if group is None else group.size()
    return _loss(z, moments, t_max, step, seed, world, backend)


def _check(z: Any, slices: Any, knots: Any, t_max: Any, step: Any, seed: Any) -> None:
    check_tensor(OP, "z", z, " ".join("V" * (z.dim() - 2)) + " N E" if isinstance(z, Tensor) and z.dim() > 2 else "N E")
    if z.shape[-1] == 0:
        fail(OP, "z", "have at least 1 feature", tuple(z.shape), "pass embeddings [..., N, E]")
    _check_count("slices", slices, 1, "1024 is usual")
    _check_count("knots", knots, 2, "17 is usual")
    check_number(OP, "t_max", t_max)
    if not 0 < t_max < math.inf:
        fail(OP, "t_max", "be greater than 0 and finite", t_max, "3.0 is usual")
    _check_word("seed", seed)
    if isinstance(step, Tensor):
        if step.dim() != 0 or step.dtype != torch.int64:
            actual = f"{short(step.dtype)} {tuple(step.shape)}"
            fail(OP, "step", "be an int or a 0-dim int64 tensor", actual, "use torch.tensor(step)", TypeError)
        if step.device.type != "cpu" and step.device != z.device:
            fail(OP, "step", f"be on the CPU or on z's device {z.device}", step.device, "move it with .to(device)")
    else:
        _check_word("step", step)


def _check_count(argument: str, value: Any, least: int, remedy: str) -> None:
    if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool):
        fail(OP, argument, "be an int", type(value).__name__, remedy, TypeError)
    if value < least:
        fail(OP, argument, f"be at least {least}", value, remedy)


def _check_word(argument: str, value: Any) -> None:
    if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool):
        fail(OP, argument, "be an int", type(value).__name__, "pass a whole number", TypeError)
    if not 0 <= value < MOST:
        fail(OP, argument, "lie in [0, 2^63)", value, "take it modulo 2^63")


MOMENTS = "(Tensor z, SymInt slices, SymInt knots, float t_max, Tensor step, SymInt seed, str backend) -> Tensor"
FORWARD = "(Tensor z, Tensor moments, float t_max, Tensor step, SymInt seed, SymInt world, str backend) -> Tensor"
BACKWARD = "(Tensor grad, " + FORWARD.removeprefix("(")


def _moments_fake(z: Tensor, slices: int, knots: int, *rest: Any) -> Tensor:
    return z.new_empty((z.shape[0], 2, knots, slices), dtype=torch.float32)


def _forward_fake(z: Tensor, *rest: Any) -> Tensor:
    return z.new_empty((), dtype=torch.float32)


def _backward_fake(grad: Tensor, z: Tensor, *rest: Any) -> Tensor:
    return z.new_empty(z.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    z, moments, ctx.t_max, step, ctx.seed, ctx.world, ctx.backend = inputs
    ctx.save_for_backward(z, moments, step)


def _gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    z, moments, step = ctx.saved_tensors
    return (_backward(grad, z, moments, ctx.t_max, step, ctx.seed, ctx.world, ctx.backend), *(None,) * 6)


_moments = define(OP, "moments", MOMENTS, _moments_fake)
_forward = define(OP, "forward", FORWARD, _forward_fake)
_backward = define(OP, "backward", BACKWARD, _backward_fake)
_loss = differentiable(OP, _forward, FORWARD, _forward_fake, _setup, _gradient)
