"""I-JEPA's masks."""

from __future__ import annotations

from torch import Tensor

from jepa_kernels._core.check import fail
from jepa_kernels.masks.batch import MaskBatch
from jepa_kernels.masks.sampler import MAX_ASPECT, Range, Sampler, check_count, check_range, native, sides


class MultiBlock2d(Sampler):
    """Sample I-JEPA's multi-block masks: per image one large context block minus `num_targets` target blocks.

    A block covers a share of the grid and has an aspect ratio (height / width), both drawn with one uniform
    number. One target block size and one context block size hold for the whole batch; places are drawn per
    image. Context patches inside a target are dropped. If `min_keep` or fewer remain, the context is drawn
    again, and after every 20 tries one more target (the last first) is allowed to overlap it.

    Every patch can be chosen and every chosen patch is kept: rows differ in length, ids are packed.

    grid: patches per side, G or (Gh, Gw).
    target_scale, context_scale: (least, most) share of the grid, in 0..1.
    target_aspect_ratio: (least, most) height / width; a context block has that of the grid.
    truncate: cut the context of every image to the shortest in the batch, in raster order, as the published
        code does: rectangular ids, but the bottom rows are rarely seen.
    truncate_group: not 0: cut to the shortest of so many images that follow one another, as published training on many
        GPUs does with each one's own; ids are packed then.
    upstream: reproduce the published collator bit for bit, quirks included: masks are truncated, no block touches
        the last row or column, a context block is square; sizes come from a torch generator seeded with seed + step,
        places from torch's global one, or from the `generator` of a call. (Target blocks of `min_keep` or fewer
        patches, of which that code finds none, are taken.)
    bucket: not 0: packed token axes are padded up to multiples of it, so that compiled code and CUDA graphs see few
        shapes (see `MaskBatch`).
    seed: masks depend on (seed, step) alone: counter-based Philox4x32-10, unbiased in every range. `step` counts
        calls. In the workers of a DataLoader with one call per batch it is the batch's number, whatever the number
        of workers, and runs on from epoch to epoch; set it to resume, or after an epoch that was left early. With
        persistent workers the numbers of later epochs are new ones too, but depend on how many workers there are, and
        setting it has no effect once they run.

    Source: Assran et al., Self-Supervised Learning from Images with a Joint-Embedding Predictive Architecture
    (arXiv:2301.08243), section 3 and appendix A.
    """

    def __init__(
        self,
        grid: int | tuple[int, int],
        *,
        target_scale: Range = (0.15, 0.2),
        target_aspect_ratio: Range = (0.75, 1.5),
        context_scale: Range = (0.85, 1.0),
        num_targets: int = 4,
        min_keep: int = 10,
        truncate: bool = False,
        truncate_group: int = 0,
        upstream: bool = False,
        bucket: int = 0,
        seed: int = 0,
    ) -> None:
        self.grid = sides(self.name, grid, "Gh, Gw")
        if min(self.grid) < 2:
            fail(self.name, "grid", "have at least 2 patches per side", self.grid, "use a larger image")
        check_range(self.name, "target_scale", target_scale, 1.0, "pass shares of the grid")
        check_range(self.name, "context_scale", context_scale, 1.0, "pass shares of the grid")
        check_range(self.name, "target_aspect_ratio", target_aspect_ratio, MAX_ASPECT, "pass height / width")
        check_count(self.name, "num_targets", num_targets, 1, "the published value is 4")
        check_count(self.name, "min_keep", min_keep, 0, "the published value is 10")
        super().__init__(truncate, truncate_group, upstream, seed, bucket)
        self.target_scale, self.target_aspect_ratio = target_scale, target_aspect_ratio
        self.context_scale = context_scale
        self.num_targets, self.min_keep = num_targets, min_keep
        height, width = native(self.name).multiblock2d_smallest_context(vars(self))
        if height * width <= min_keep:
            fail(
                self.name,
                "min_keep",
                f"be less than the smallest context block, {height} x {width} patches",
                min_keep,
                "lower it, or raise context_scale or the image size",
            )

    def _draw(self, batch: int, step: int, state: Tensor | None) -> MaskBatch:
        return self._finished(MaskBatch(batch, *native(self.name).multiblock2d(vars(self), batch, step, state)))
