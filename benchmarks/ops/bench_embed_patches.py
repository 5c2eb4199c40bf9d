"""embed_patches at the shapes of I-JEPA and V-JEPA 2: the contexts' kept patches, and every patch for the target."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import jepa_kernels as jk
from benchmarks.workload import Inputs, Workload, compiled, each
from jepa_kernels.ops.embed_patches.cases import Images, packed, rectangular, whole

VIT_H14 = (3, (16, 16), 14, 1280)  # channels, grid, patch size, embedding: 224 pixels
VIT_S16 = (3, (14, 14), 16, 384)
VIT_L16_CLIP, VIT_G16_CLIP = ((3, (8, 16, 16), 16, width) for width in (1024, 1408))  # 16 frames of 256 pixels
MASKS = (512, 128)  # kept tokens of a clip's two contexts, of 2048


def clips(batch: int, shape: tuple[Any, ...], **options: Any) -> Callable[[torch.Generator], Inputs]:
    """Both masks of each clip in one call."""
    return packed(Images(batch, *shape, tubelet=2, **options), [n for n in MASKS for _ in range(batch)])


def rows_of(inputs: Inputs) -> Tensor:
    """The row of each kept patch among the patches of all images [T]."""
    ids, batch = inputs["ids"], len(inputs["pixels"])
    if inputs.get("packing") is None:
        image = torch.arange(len(ids), device=ids.device)[:, None] % batch
    else:
        image = inputs["packing"].sequence_of_token() % batch
    return (image * math.prod(grid_of(inputs["pixels"], inputs["weight"])) + ids).flatten()


def grid_of(pixels: Tensor, weight: Tensor) -> tuple[int, ...]:
    sizes = weight.shape[2 - pixels.dim() :]
    return tuple(side // size for side, size in zip(pixels.shape[2:], sizes, strict=True))


def unfolded(
    pixels: Tensor, rows: Tensor | None, ids: Tensor | None, weight: Tensor, bias: Tensor, pos: Tensor
) -> Tensor:
    """The best plain PyTorch: only the kept patches (None: all) are multiplied.

    All patches are copied and whole rows selected, with the positions by the same means: indexing the strided view
    copies fewer bytes, yet in short pieces, and the backward of `pos[ids]` is a scatter of single elements.
    """
    axes, patches = weight.dim() - 2, pixels
    for axis, size in enumerate(weight.shape[2:], 2):
        patches = patches.unfold(axis, size, size)
    patches = patches.movedim(1, 1 + axes).flatten(1 + axes).flatten(1, axes)  # [B, N, C * (Pt *) P * P]
    if rows is None:
        return F.linear(patches, weight.flatten(1), bias) + pos
    out = F.linear(patches.flatten(0, 1).index_select(0, rows), weight.flatten(1), bias)
    return (out + pos.index_select(0, ids.flatten())).view(*ids.shape, -1)


def convolved(inputs: Inputs) -> Callable[[], Tensor]:
    """The published PatchEmbed and apply_masks: everything embedded, then gathered; once more for each mask."""
    pixels, ids, weight, bias, pos = (inputs[n] for n in ("pixels", "ids", "weight", "bias", "pos_embed"))
    convolve, size, batch = F.conv3d if weight.dim() == 5 else F.conv2d, weight.shape[2:], len(pixels)

    def dense() -> Tensor:
        return convolve(pixels, weight, bias, stride=size).flatten(2).transpose(1, 2) + pos

    if ids is None:
        return dense
    if inputs.get("packing") is None:
        index = ids[..., None].expand(-1, -1, len(weight))
        return lambda: dense().gather(1, index)
    rows = ids.split([batch * n for n in inputs["packing"].lengths[::batch]])
    masks = [row.view(batch, -1, 1).expand(-1, -1, len(weight)) for row in rows]
    return lambda: torch.cat([dense().gather(1, index).flatten(0, 1) for index in masks])


def rivals(inputs: Inputs) -> dict[str, Callable[[], Any]]:
    pixels, ids, *layer = (inputs[n] for n in ("pixels", "ids", "weight", "bias", "pos_embed"))
    rows = None if ids is None else rows_of(inputs)
    found = {"unfold": lambda: unfolded(pixels, rows, ids, *layer)}
    # PyTorch's bf16 convolution takes a second a call where the processor has no bf16 instructions.
    return found if pixels.dtype == torch.bfloat16 and pixels.is_cpu else {"conv": convolved(inputs), **found}


def compiled_rivals(inputs: Inputs) -> dict[str, Callable[[], Any]]:
    """For one workload: each stage takes five seconds to compile."""
    pixels, ids, *layer = (inputs[n] for n in ("pixels", "ids", "weight", "bias", "pos_embed"))
    rows = rows_of(inputs)
    fast = compiled(unfolded)
    return {**rivals(inputs), "compile": lambda: fast(pixels, rows, ids, *layer)}


def normalised(inputs: Inputs) -> Tensor:
    shape = (-1, *(1,) * (inputs["pixels"].dim() - 2))
    mean, std = (torch.tensor(inputs[n], device=inputs["pixels"].device).view(shape) for n in ("mean", "std"))
    return ((inputs["pixels"] / 255 - mean) / std).to(inputs["weight"].dtype)


def of_floats(inputs: Inputs) -> dict[str, Callable[[], Any]]:
    """Our own floats, normalised before the timing; and everything normalised first, then unfolded."""
    floats, rows = {**inputs, "pixels": normalised(inputs), "mean": None, "std": None}, rows_of(inputs)
    ids, *layer = (inputs[n] for n in ("ids", "weight", "bias", "pos_embed"))
    return {
        "float": lambda: jk.embed_patches(**floats),
        "convert": lambda: unfolded(normalised(inputs), rows, ids, *layer),
    }


def repeated(inputs: Inputs) -> dict[str, Callable[[], Any]]:
    """An image as the published models show it to a layer for clips."""
    pixels, weight = inputs["pixels"], inputs["weight"]
    repeats = (1, 1, weight.shape[2], 1, 1)
    return {"repeat": lambda: convolved({**inputs, "pixels": pixels.unsqueeze(2).repeat(repeats)})()}


def workload(name: str, make: Callable[[torch.Generator], Inputs], rivals: Any = rivals, **options: Any) -> Workload:
    """The published models freeze pos_embed."""
    options = {"grads": ("weight", "bias"), **options}
    return Workload(name, make, rivals=rivals, **options)


GPU = dict(dtypes=("bfloat16",), devices=("cuda",))
WORKLOADS = (
    workload(
        "ijepa_vit_h14_27_b4",
        rectangular(Images(4, *VIT_H14), 1, 69),
        dtypes=("float32", "bfloat16"),
        smoke=True,
    ),
    workload("ijepa_vit_h14_27_b8", rectangular(Images(8, *VIT_H14), 1, 69), compiled_rivals),
    workload("ijepa_vit_h14_27_uint8", rectangular(Images(4, *VIT_H14, uint8=True), 1, 69), of_floats),
    workload("ijepa_vit_h14_all_b4", whole(Images(4, *VIT_H14))),
    workload(
        "vit_s16_27_b16_learned",
        rectangular(Images(16, *VIT_S16), 1, 53),
        grads=("weight", "bias", "pos_embed"),
        reference_timed=False,
    ),
    workload("vjepa2_vit_l_31_b1", clips(1, VIT_L16_CLIP), reference_timed=False),
    workload("vjepa2_vit_l_31_uint8", clips(1, VIT_L16_CLIP, uint8=True), of_floats, reference_timed=False),
    workload("vjepa2_vit_l_image_b4", whole(Images(4, 3, (16, 16), 16, 1024, tubelet=2)), repeated),
    workload(
        "ijepa_vit_h14_27_b128",
        rectangular(Images(128, *VIT_H14), 1, 70),
        small=rectangular(Images(4, *VIT_H14), 1, 70),
        **GPU,
    ),
    workload("vjepa2_vit_g_31_b24", clips(24, VIT_G16_CLIP), small=clips(1, VIT_G16_CLIP), **GPU),
)
SMALL = (workload("small", rectangular(Images(2, 3, (8, 8), 8, 96), 1, 17), dtypes=("float32", "bfloat16")),)


@each("embed_patches", WORKLOADS)
def test_embed_patches(bench, op, workload, stage, dtype):
    bench(op, workload, stage, dtype)
