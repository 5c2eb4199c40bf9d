"""masked_attention at JEPA's shapes: ragged packed sequences against loops and masks, rectangles against SDPA."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from benchmarks.workload import Inputs, Workload, each, nbytes
from jepa_kernels import Packing

BOTH = ("float32", "bfloat16")


def packed(lengths: Sequence[int], heads: int, width: int) -> Callable[[torch.Generator], Inputs]:
    """q, k and v as views of one [T, 3, H, D], as a model's qkv product hands them over."""

    def make(generator: torch.Generator) -> Inputs:
        packing = Packing.from_lengths(lengths)
        q, k, v = torch.randn(packing.tokens, 3, heads, width, generator=generator, dtype=torch.float64).unbind(1)
        return dict(q=q, k=k, v=v, packing=packing)

    return make


def dense(batch: int, heads: int, tokens: int, width: int) -> Callable[[torch.Generator], Inputs]:
    def make(generator: torch.Generator) -> Inputs:
        qkv = torch.randn(batch, tokens, 3, heads, width, generator=generator, dtype=torch.float64)
        q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
        return dict(q=q, k=k, v=v)

    return make


def packed_rivals(inputs: Inputs) -> dict[str, Callable[[], Any]]:
    """Masks are additive, the faster form, and built outside the timing."""
    packing, qkv = inputs["packing"], [inputs[n] for n in ("q", "k", "v")]
    column = torch.arange(packing.max_seqlen, device=qkv[0].device)
    keep = additive(column < packing.cu_seqlens.diff()[:, None], qkv[0].dtype)[:, None, None]

    def heads_first(x: torch.Tensor) -> torch.Tensor:
        return x.transpose(0, 1)[None]  # [T, H, D] -> [1, H, T, D]

    def loop() -> torch.Tensor:
        sequences = zip(*(torch.split(x, packing.lengths) for x in qkv), strict=True)
        return torch.cat([sdpa(*map(heads_first, one))[0].transpose(0, 1) for one in sequences])

    def masked() -> torch.Tensor:
        return sdpa(*map(heads_first, qkv), mask)[0].transpose(0, 1)

    def padded() -> torch.Tensor:
        q, k, v = (packing.pad(x).transpose(1, 2) for x in qkv)
        return packing.unpad(sdpa(q, k, v, keep.expand(-1, 1, q.shape[2], -1)).transpose(1, 2))

    if qkv[0].dtype != torch.float32:  # their backward takes seconds in bf16
        return {"loop": loop}
    mask = additive(packing.dense_mask(), qkv[0].dtype)
    return {"loop": loop, "sdpa_mask": masked, "sdpa_padded": padded}


def additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))


def dense_rivals(inputs: Inputs) -> dict[str, Callable[[], Any]]:
    return {"sdpa": lambda: sdpa(inputs["q"], inputs["k"], inputs["v"])}


def pairs(inputs: Inputs) -> int:
    """Scores of one head."""
    q, packing = inputs["q"], inputs.get("packing")
    return packing.pairs if packing is not None else q.shape[0] * q.shape[2] ** 2


def flops(inputs: Inputs, stage: str) -> float:
    """Two products forward; backward five, one of them the scores again."""
    heads, width = inputs["q"].shape[1], inputs["q"].shape[-1]
    return (4 if stage == "forward" else 14) * pairs(inputs) * heads * width


def moved(inputs: Inputs, stage: str) -> float:
    """q, k, v read and the output written; backward reads it, its gradient and q, k, v, and writes theirs."""
    return (4 if stage == "forward" else 12) * nbytes(inputs["q"])


def workload(name: str, make: Callable[[torch.Generator], Inputs], **options: Any) -> Workload:
    return Workload(name, make, bytes=moved, flops=flops, grads=("q", "k", "v"), **options)


RAGGED = (257, 300, 415, 600)
CONTEXTS = (70, 111, 84, 119, 95, 77, 102, 88)  # what multi-block masks leave of 256 patches

WORKLOADS = (
    workload("ragged_1572_h6_d64", packed(RAGGED, 6, 64), rivals=packed_rivals, smoke=True),
    workload("ijepa_vit_h14_context", packed(CONTEXTS, 16, 80), rivals=packed_rivals, dtypes=BOTH),
    workload("ijepa_vit_h14_predictor", dense(16, 16, 112, 24), rivals=dense_rivals, dtypes=BOTH),
    workload("ijepa_vit_h14_target", dense(2, 16, 256, 80), rivals=dense_rivals, dtypes=BOTH, compile=("forward",)),
)


@each("masked_attention", WORKLOADS)
def test_masked_attention(bench, op, workload, stage, dtype):
    bench(op, workload, stage, dtype)
