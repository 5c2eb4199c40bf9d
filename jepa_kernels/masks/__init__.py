"""Samplers of context and target patches, in C++. Numpy in and out, so that data-loader workers hold no tensors."""

from jepa_kernels.masks.batch import MaskBatch, Masks
from jepa_kernels.masks.multiblock2d import MultiBlock2d
from jepa_kernels.masks.multiblock3d import LONG_RANGE, SHORT_RANGE, MultiBlock3d, Spec3d

__all__ = ["LONG_RANGE", "SHORT_RANGE", "MaskBatch", "Masks", "MultiBlock2d", "MultiBlock3d", "Spec3d"]
