"""adamw_ema over whole encoders: the step that torch takes in two passes, and in four where it casts as well."""

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.ops.bench_ema_update import encoder_shapes
from benchmarks.workload import Inputs, Workload, each
from jepa_kernels.ops.adamw_ema import cases

LOW = torch.bfloat16


def rivals(inputs: Inputs) -> dict[str, Callable[[], Any]]:
    shadows = [(inputs[role], inputs[of]) for role, of in zip(cases.SHADOWS, ("params", "targets"), strict=True)
               if role in inputs]  # fmt: skip

    def whole(**options: Any) -> Callable[[], Any]:
        optimizer = adamw(inputs, **options)

        @torch.no_grad()
        def step() -> None:
            optimizer.step()
            torch._foreach_lerp_(inputs["targets"], inputs["params"], 1 - inputs["momentum"])
            for copies, tensors in shadows:
                torch._foreach_copy_(copies, tensors)

        return step

    return {"fused": whole(fused=True), "foreach": whole(foreach=True)}


def adamw(inputs: Inputs, **options: Any) -> torch.optim.AdamW:
    """torch's own, on the inputs' states."""
    params = inputs["params"]
    optimizer = torch.optim.AdamW(params, inputs["lr"], weight_decay=inputs["weight_decay"], **options)
    for i, p in enumerate(params):
        p.grad = inputs["grads"][i]
        optimizer.state[p] = dict(
            step=inputs["steps"][i], exp_avg=inputs["exp_avgs"][i], exp_avg_sq=inputs["exp_avg_sqs"][i]
        )
    return optimizer


def workload(name: str, width: int, depth: int, shadows: bool = False, **options: Any) -> Workload:
    """Every block has the numbers of one, on which parity is checked: drawing more takes longer than all the rest."""
    kinds = (LOW, LOW) if shadows else (None, None)
    one = cases.case(name, cases.make(encoder_shapes(width, 1), shadows=kinds))

    def make(generator: torch.Generator) -> Inputs:
        return {role: deepened(x, depth) if isinstance(x, list) else x for role, x in one.make(generator).items()}

    return Workload(
        name,
        make,
        rivals=rivals,
        mutates=one.mutates,
        keep=(*one.keep, "grads"),
        traffic="rmw",
        small=one.make,
        **options,
    )


def deepened(tensors: list[torch.Tensor], depth: int) -> list[torch.Tensor]:
    """Of an encoder of one block: three tensors before it, two after it."""
    single = [t.float() if t.dtype == torch.float64 else t for t in tensors]  # half the bytes on their way
    return [*single[:3], *single[3:-2] * depth, *single[-2:]]


ON_CPU: dict[str, Any] = dict(reference_timed=True)
ON_GPU: dict[str, Any] = dict(devices=("cuda",))
WORKLOADS = (
    workload("smoke_vit_ti16", 192, 12, smoke=True, **ON_CPU),
    workload("vit_s16", 384, 12, **ON_CPU),
    workload("vit_b16", 768, 12, **ON_CPU),
    workload("vit_b16_bf16_shadows", 768, 12, shadows=True, **ON_CPU),
    workload("vit_h14", 1280, 32, **ON_GPU),
    workload("vit_h14_bf16_shadows", 1280, 32, shadows=True, **ON_GPU),
)
SMALL = (workload("small", 32, 1, shadows=True),)


@each("adamw_ema", WORKLOADS)
def test_adamw_ema(bench, op, workload, stage, dtype):
    bench(op, workload, stage, dtype)
