"""Hugging Face's V-JEPA 2 on a real clip, patched against as it is: ViT-L's width, a few of its layers."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.patched import Inputs, Patched
from benchmarks.workload import each
from jepa_kernels import _C
from jepa_kernels.integrations import huggingface
from jepa_kernels.video import clip_batch

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'jepa_kernels[bench]'")

CONTEXT = 400  # of 2048 patches; the others are the target


def build(layers: int, **changes: Any) -> nn.Module:
    sizes = dict(hidden_size=1024, num_attention_heads=16, frames_per_clip=16)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        depth = dict(num_hidden_layers=layers, pred_num_hidden_layers=layers)
        return transformers.VJEPA2Model(transformers.VJEPA2Config(**{**sizes, **depth, **changes}))


def inputs(model: nn.Module, *, draw: int = 0, masked: bool = True, **more: Any) -> Inputs:
    config = model.config
    clip = clip_batch(1, config.frames_per_clip, config.crop_size).transpose(1, 2)  # frames before channels
    side, frames = config.crop_size // config.patch_size, config.frames_per_clip // config.tubelet_size
    order = torch.randperm(frames * side**2, generator=torch.Generator().manual_seed(draw))
    kept = CONTEXT * len(order) // 2048
    masks = {"context_mask": [order[:kept].sort()[0][None]], "target_mask": [order[kept:].sort()[0][None]]}
    return {"pixel_values_videos": clip, **(masks if masked else {}), **more}


def predicted(out: Any) -> tuple[Tensor, ...]:
    return out.last_hidden_state, out.predictor_output.last_hidden_state


def context(out: Any) -> tuple[Tensor, ...]:
    return (out.masked_hidden_state,)


def kept_alone(model: nn.Module, pixel_values_videos: Tensor, context_mask: list[Tensor], **_: Any) -> tuple[Tensor]:
    """The context's tokens through the encoder's own layers."""
    (ids,) = context_mask
    x = model.encoder.embeddings(pixel_values_videos)
    x = x.gather(1, ids[..., None].expand(-1, -1, x.shape[-1]))
    for layer in model.encoder.layer:
        x = layer(x, ids)[0]
    return (model.encoder.layernorm(x),)


SMALL = partial(build, 2, hidden_size=128, num_attention_heads=2, crop_size=64, frames_per_clip=4)


def workload(name: str, **options: Any) -> Patched:
    given = dict(model=partial(build, 4), small=SMALL, patch=huggingface.patch, inputs=inputs, outputs=predicted)
    return Patched(name, **{**given, **options})


# PyTorch's bf16 products take seconds on processors without them: one layer is measured there.
PRODUCTS = _C.isa() == "avx512_bf16"
LOW = {"dtypes": ("bfloat16",), "stages": ("forward",)}

WORKLOADS = (
    workload("vjepa2_vit_l_4_layers"),
    workload("vjepa2_vit_l_4_layers", devices=("cpu", "cuda") if PRODUCTS else ("cuda",), **LOW),
    workload("vjepa2_vit_l_1_layer", model=partial(build, 1), devices=() if PRODUCTS else ("cpu",), **LOW),
    workload(
        "vjepa2_vit_l_encoder_400_of_2048",
        patch=partial(huggingface.patch, masked_encoder=True),
        inputs=partial(inputs, skip_predictor=True),
        outputs=context,
        own=kept_alone,
        stages=("forward",),
    ),
    workload("smoke", model=SMALL, smoke=True, stages=("forward",)),
)


@each("huggingface", WORKLOADS)
def test_huggingface(bench_patched, op, workload, stage, dtype):
    bench_patched(op, workload, stage, dtype)
