"""masked_attention at JEPA's shapes: ragged packed sequences, whole clips, frames, rope, and one qkv."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

import jepa_kernels as jk
from benchmarks.workload import Inputs, Workload, each
from jepa_kernels import Packing, Rope
from jepa_kernels.ops.masked_attention import reference

GPU_BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION)
BOTH = ("float32", "bfloat16")
GRID = (8, 8)  # rows and columns of a frame of the clips here


def packed(lengths: Sequence[int], heads: int, width: int) -> Callable[[torch.Generator], Inputs]:
    """q, k and v as views of one [T, 3, H, D], as a model's qkv product hands them over."""

    def make(generator: torch.Generator) -> Inputs:
        q, k, v = one_qkv(lengths, heads, width)(generator)["qkv"].unbind(1)
        return dict(q=q, k=k, v=v, packing=Packing.from_lengths(lengths))

    return make


def one_qkv(lengths: Sequence[int], heads: int, width: int) -> Callable[[torch.Generator], Inputs]:
    def make(generator: torch.Generator) -> Inputs:
        packing = Packing.from_lengths(lengths)
        qkv = torch.randn(packing.tokens, 3, heads, width, generator=generator, dtype=torch.float64)
        return dict(qkv=qkv, packing=packing)

    return make


def dense(
    batch: int, heads: int, tokens: int, width: int, rope: bool = False, **options: Any
) -> Callable[[torch.Generator], Inputs]:
    def make(generator: torch.Generator) -> Inputs:
        qkv = torch.randn(batch, tokens, 3, heads, width, generator=generator, dtype=torch.float64)
        q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
        return dict(q=q, k=k, v=v, **options, **({"rope": clip_rope(tokens)} if rope else {}))

    return make


def clip_rope(tokens: int) -> Rope:
    """V-JEPA 2's, of a whole clip."""
    place, (rows, columns) = torch.arange(tokens), GRID
    frame = place // (rows * columns)
    return Rope(torch.stack([frame, place // columns % rows, place % columns], 1), pairing="tiled")


def loop(inputs: Inputs) -> dict[str, Callable[[], Any]]:
    packing, qkv = inputs["packing"], [inputs[n] for n in ("q", "k", "v")]

    def run() -> torch.Tensor:
        sequences = zip(*(torch.split(x, packing.lengths) for x in qkv), strict=True)
        return torch.cat([sdpa(*map(heads_first, one))[0].transpose(0, 1) for one in sequences])

    return {"loop": run}


def heads_first(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(0, 1)[None]  # [T, H, D] -> [1, H, T, D]


def loop_and_padded(inputs: Inputs) -> dict[str, Callable[[], Any]]:
    """Masks are additive, the faster form, and built outside the timing."""
    packing, qkv = inputs["packing"], [inputs[n] for n in ("q", "k", "v")]
    column = torch.arange(packing.max_seqlen, device=qkv[0].device)
    keep = additive(column < packing.cu_seqlens.diff()[:, None], qkv[0].dtype)[:, None, None]

    def padded() -> torch.Tensor:
        q, k, v = (packing.pad(x).transpose(1, 2) for x in qkv)
        return packing.unpad(sdpa(q, k, v, keep.expand(-1, 1, q.shape[2], -1)).transpose(1, 2))

    return {**loop(inputs), "sdpa_padded": padded}


def loop_and_masks(inputs: Inputs) -> dict[str, Callable[[], Any]]:
    packing, qkv = inputs["packing"], [inputs[n] for n in ("q", "k", "v")]
    mask = additive(packing.dense_mask(), qkv[0].dtype)

    def masked() -> torch.Tensor:
        return sdpa(*map(heads_first, qkv), mask)[0].transpose(0, 1)

    return {**loop_and_padded(inputs), "sdpa_mask": masked}


def additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))


def whole(inputs: Inputs) -> dict[str, Callable[[], Any]]:
    return {"sdpa": lambda: sdpa(inputs["q"], inputs["k"], inputs["v"])}


def frames_by_torch(inputs: Inputs) -> dict[str, Callable[[], Any]]:
    q, k, v = (inputs[n] for n in ("q", "k", "v"))
    frame = torch.arange(k.shape[2], device=q.device) // inputs["frame_size"]
    mask = additive(frame[:, None] >= frame, q.dtype)

    def prefixes() -> torch.Tensor:
        """Frame by frame, each against the keys up to its end: no mask."""
        size = inputs["frame_size"]
        frames = [(q[:, :, i : i + size], k[:, :, : i + size], v[:, :, : i + size]) for i in range(0, len(frame), size)]
        return torch.cat([sdpa(*one) for one in frames], 2)

    return {"sdpa_mask": lambda: sdpa(q, k, v, mask), "sdpa_prefixes": prefixes}


def turned_before(inputs: Inputs) -> dict[str, Callable[[], Any]]:
    """Our rope, then our attention; the rope in plain PyTorch, then SDPA. Tables of turns are made before."""
    q, k, v, rope = (inputs[n] for n in ("q", "k", "v", "rope"))

    def by_torch() -> torch.Tensor:
        return sdpa(*(x.transpose(1, 2) for x in rope.turn(q.transpose(1, 2), k.transpose(1, 2))), v)

    return {"rope_qk": lambda: jk.masked_attention(*jk.rope_qk(q, k, rope), v), "rope_then_sdpa": by_torch}


def of_views(qkv: torch.Tensor, packing: Packing) -> torch.Tensor:
    return reference.forward(*qkv.unbind(1), packing)


def views(inputs: Inputs) -> dict[str, Callable[[], Any]]:
    """Autograd stacks the three gradients."""
    return {"views": lambda: jk.masked_attention(*inputs["qkv"].unbind(1), inputs["packing"])}


def gpu_backends(inputs: Inputs) -> dict[str, Callable[[], Any]]:
    """SDPA by its own choice, and each backend by name."""
    q, k, v = (inputs[n] for n in ("q", "k", "v"))

    def one(backend: SDPBackend) -> torch.Tensor:
        with sdpa_kernel(backend):
            return sdpa(q, k, v)

    named = {f"sdpa_{b.name.split('_')[0].lower()}": b for b in GPU_BACKENDS}
    return {"sdpa": lambda: sdpa(q, k, v), **{n: lambda b=b: one(b) for n, b in named.items()}}


def varlen(inputs: Inputs) -> dict[str, Callable[[], Any]]:
    """torch's own packed attention."""
    from torch.nn.attention.varlen import varlen_attn

    p = inputs["packing"]
    cu, longest, qkv = p.cu_seqlens, p.max_seqlen, [inputs[n] for n in ("q", "k", "v")]
    return {"varlen": lambda: varlen_attn(*qkv, cu, cu, longest, longest), **loop_and_padded(inputs)}


def workload(name: str, make: Callable[[torch.Generator], Inputs], **options: Any) -> Workload:
    return Workload(name, make, **{"grads": QKV, "devices": ("cpu",), **options})


def on_gpu(name: str, batch: int, heads: int, tokens: int, width: int) -> Workload:
    """A published training batch, in bf16."""
    make, small = (dense(b, heads, tokens, width) for b in (batch, 2))
    return workload(name, make, small=small, rivals=gpu_backends, dtypes=("bfloat16",), devices=("cuda",))


QKV = ("q", "k", "v")
FEW = {"reference_timed": False}
RAGGED = (257, 300, 415, 600)
CONTEXTS = [42 + 37 * i % 135 for i in range(32)]  # 42 to 176 of 256 patches, as multi-block masks leave them
PREDICTED = [96 + 11 * i % 33 for i in range(64)]  # 96 to 128: a context and one target block

GPU_CONTEXTS = [75 + 37 * i % 73 for i in range(128)]  # 111 on average

WORKLOADS = (
    workload("ragged_1572_h16_d64", packed(RAGGED, 16, 64), rivals=loop_and_masks, **FEW),
    workload("smoke_ragged_524", packed([n // 3 for n in RAGGED], 16, 64), rivals=loop_and_masks, smoke=True, **FEW),
    workload("ragged_1572_h16_d64", packed(RAGGED, 16, 64), rivals=loop, dtypes=("bfloat16",), **FEW),
    workload("ijepa_vit_h14_contexts", packed(CONTEXTS, 16, 80), rivals=loop, dtypes=BOTH, **FEW),
    workload("ijepa_vit_h14_predictor", packed(PREDICTED, 16, 24), rivals=loop_and_padded),
    workload("ijepa_vit_h14_target", dense(2, 16, 256, 80), rivals=whole, grads=(), compile=("forward",)),
    workload("vjepa2_vit_l_target", dense(2, 16, 1024, 64), rivals=whole, grads=(), **FEW),
    workload("vjepa2_vit_l_target", dense(2, 16, 1024, 64), rivals=whole, dtypes=("bfloat16",), **FEW),
    workload("vjepa2_ac_frames", dense(1, 16, 4 * 258, 64, frame_size=258), rivals=frames_by_torch),
    workload("vjepa2_vit_l_rope", dense(2, 16, 512, 64, rope=True), rivals=turned_before, grads=()),
    workload("vjepa2_vit_l_qkv", one_qkv((503, 512, 488, 510), 16, 64), rivals=views, grads=("qkv",),
             dtypes=("bfloat16",), function="masked_attention_qkv", reference=of_views, **FEW),
    on_gpu("ijepa_vit_h14_target_b128", 128, 16, 256, 80),
    workload("ijepa_vit_h14_contexts_b128", packed(GPU_CONTEXTS, 16, 80), small=packed(GPU_CONTEXTS[:8], 16, 80),
             rivals=varlen, dtypes=("bfloat16",), devices=("cuda",)),
    on_gpu("ijepa_vit_h14_predictor_b128", 512, 16, 112, 24),
    on_gpu("vjepa2_predictor_b24", 24, 12, 1480, 32),
    on_gpu("vjepa2_vit_l_target_b24", 24, 16, 2048, 64),
)  # fmt: skip
SMALL = (
    workload("small", packed((30, 41, 64), 2, 64), dtypes=BOTH),
    workload("small_long", dense(1, 1, 300, 32)),
    workload("small_rope", dense(1, 2, 64, 64, rope=True), grads=()),
)


@each("masked_attention", WORKLOADS)
def test_masked_attention(bench, op, workload, stage, dtype):
    bench(op, workload, stage, dtype)
