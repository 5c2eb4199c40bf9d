"""embed_patches at I-JEPA's shapes: the context's kept patches, and every patch for the target encoder."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.workload import Inputs, Workload, each, nbytes
from jepa_kernels.ops.embed_patches.cases import Images, rectangular, whole

VIT_H14 = (3, (16, 16), 14, 1280)  # channels, grid, patch size, embedding: 224 pixels
VIT_S16 = (3, (14, 14), 16, 384)


def unfolded(
    pixels: Tensor, ids: Tensor | None, image: Tensor | None, weight: Tensor, bias: Tensor, pos: Tensor
) -> Tensor:
    """The best plain PyTorch: only the kept patches (ids of each image; None: all) are copied and multiplied."""
    channels, size = weight.shape[1:3]
    rows, across = pixels.shape[2] // size, pixels.shape[3] // size
    patches = pixels.view(-1, channels, rows, size, across, size).permute(0, 2, 4, 1, 3, 5)
    if ids is None:
        return F.linear(patches.reshape(len(pixels), rows * across, -1), weight.flatten(1), bias) + pos
    return F.linear(patches[image, ids // across, ids % across].flatten(2), weight.flatten(1), bias) + pos[ids]


compiled = torch.compile(unfolded, dynamic=False)


def compiled_rivals(inputs: Inputs) -> dict[str, Callable[[], Any]]:
    """For one workload: each stage takes five seconds to compile."""
    pixels, ids, weight, bias, pos = (inputs[n] for n in ("pixels", "ids", "weight", "bias", "pos_embed"))
    image = torch.arange(len(ids), device=ids.device)[:, None] % len(pixels)
    return {**rivals(inputs), "compile": lambda: compiled(pixels, ids, image, weight, bias, pos)}


def rivals(inputs: Inputs) -> dict[str, Callable[[], Any]]:
    pixels, ids, weight, bias, pos = (inputs[n] for n in ("pixels", "ids", "weight", "bias", "pos_embed"))
    image, index = None, None
    if ids is not None:
        image = torch.arange(len(ids), device=ids.device)[:, None] % len(pixels)
        index = ids[..., None].expand(-1, -1, len(weight))

    def conv() -> Tensor:  # I-JEPA's PatchEmbed and apply_masks
        tokens = F.conv2d(pixels, weight, bias, stride=weight.shape[2]).flatten(2).transpose(1, 2) + pos
        return tokens if ids is None else tokens.gather(1, index)

    def unfold() -> Tensor:
        return unfolded(pixels, ids, image, weight, bias, pos)

    # PyTorch's bf16 convolution takes a second a call where the processor has no bf16 instructions.
    return {"unfold": unfold} if pixels.dtype == torch.bfloat16 else {"conv": conv, "unfold": unfold}


def _shape(inputs: Inputs) -> tuple[int, int, int, int]:
    """Rows, pixels of a patch, embedding, bytes of an element."""
    pixels, ids, weight = inputs["pixels"], inputs["ids"], inputs["weight"]
    depth = weight[0].numel()
    rows = pixels.numel() // depth if ids is None else ids.numel()
    return rows, depth, weight.shape[0], weight.element_size()


def moved(inputs: Inputs, stage: str) -> float:
    rows, depth, embed_dim, size = _shape(inputs)
    layer = nbytes(inputs["weight"], inputs["bias"], inputs["pos_embed"])
    ids = 0 if inputs["ids"] is None else nbytes(inputs["ids"])
    once = rows * (depth + embed_dim) * size + layer + ids
    return once if stage == "forward" else 2 * once


def flops(inputs: Inputs, stage: str) -> float:
    rows, depth, embed_dim, _ = _shape(inputs)
    return 2 * rows * depth * embed_dim * (1 if stage == "forward" else 2)


def workload(
    name: str,
    make: Callable[[torch.Generator], Inputs],
    dtypes: tuple[str, ...] = ("float32",),
    rivals: Any = rivals,
    smoke: bool = False,
) -> Workload:
    return Workload(
        name,
        make,
        bytes=moved,
        flops=flops,
        rivals=rivals,
        grads=("weight", "bias", "pos_embed"),
        dtypes=dtypes,
        smoke=smoke,
    )


WORKLOADS = (
    workload("ijepa_vit_h14_27_b4", rectangular(Images(4, *VIT_H14), 1, 69), ("float32", "bfloat16"), smoke=True),
    workload("ijepa_vit_h14_27_b8", rectangular(Images(8, *VIT_H14), 1, 69), rivals=compiled_rivals),
    workload("ijepa_vit_h14_all_b4", whole(Images(4, *VIT_H14))),
    workload("ijepa_vit_s16_27_b32", rectangular(Images(32, *VIT_S16), 1, 53)),
)


@each("embed_patches", WORKLOADS)
def test_embed_patches(bench, op, workload, stage, dtype):
    bench(op, workload, stage, dtype)
