"""V-JEPA's masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from jepa_kernels._core.check import check_number, fail
from jepa_kernels.masks.batch import MaskBatch
from jepa_kernels.masks.sampler import MAX_ASPECT, Range, Sampler, check_count, check_range, native, sides


@dataclass(frozen=True)
class Spec3d:
    """One kind of mask of a clip.

    num_blocks: blocks whose union is the target (as published, `npred`).
    spatial_scale: (least, most) share of a frame's patches that a block covers, in 0..1.
    temporal_scale: (least, most) share of the clip's frames of patches that it spans, in 0..1.
    aspect_ratio: (least, most) height / width of a block.
    max_context_frames_ratio: share of the frames, from the first on, in which the context may lie, in 0..1; the
        patches of later frames belong to the target.
    max_keep: most patches in a context: a random choice of them, or the first ones when truncated. None: all.
    full_complement: the target is everything but the context as cut by `max_keep` and truncation.
    pred_full_complement: the context is everything but the target as cut by truncation.
    inv_block: context and target change places.
    """

    num_blocks: int = 8
    spatial_scale: Range = (0.15, 0.15)
    temporal_scale: Range = (1.0, 1.0)
    aspect_ratio: Range = (0.75, 1.5)
    max_context_frames_ratio: float = 1.0
    max_keep: int | None = None
    full_complement: bool = False
    pred_full_complement: bool = False
    inv_block: bool = False

    def __post_init__(self) -> None:
        check_count("Spec3d", "num_blocks", self.num_blocks, 1, "the published values are 8 and 2")
        check_range("Spec3d", "spatial_scale", self.spatial_scale, 1.0, "pass shares of a frame")
        check_range("Spec3d", "temporal_scale", self.temporal_scale, 1.0, "pass shares of the clip")
        check_range("Spec3d", "aspect_ratio", self.aspect_ratio, MAX_ASPECT, "pass height / width")
        ratio = self.max_context_frames_ratio
        check_number("Spec3d", "max_context_frames_ratio", ratio)
        if not 0 < ratio <= 1:
            fail("Spec3d", "max_context_frames_ratio", "be in (0, 1]", ratio, "pass a share of the clip")
        if self.max_keep is not None:
            check_count("Spec3d", "max_keep", self.max_keep, 1, "pass None to keep all")
        if self.full_complement and self.pred_full_complement:
            fail("Spec3d", "full_complement", "not go with pred_full_complement", "both", "choose one")


SHORT_RANGE, LONG_RANGE = Spec3d(), Spec3d(num_blocks=2, spatial_scale=(0.7, 0.7))


class MultiBlock3d(Sampler):
    """Sample V-JEPA's multi-block masks of clips: the target is a union of blocks, the context all the rest.

    Of each spec one block size holds for the whole batch: share of the frames, share of the patches and aspect ratio
    are drawn with one uniform number each. Places are drawn per clip, again where no context patch remains.

    One MaskBatch holds every spec's masks of every clip: contexts and targets [specs * B], so that one packed pass
    does them all. Every chosen patch is kept. Ids are time-major: t * Gh * Gw + h * Gw + w.

    grid: (Gt, Gh, Gw): frames of patches (video frames / tubelet size) and patches per side.
    specs: the kinds of masks; the published two are short range (8 blocks of 15 % of a frame, all frames long) and
        long range (2 of 70 %).
    truncate: of each spec, cut contexts and targets to the shortest in the batch, in time-major order, as the
        published code does: the last frames are rarely seen. One spec alone then gives rectangular ids.
    truncate_group: not 0: cut to the shortest of so many images that follow one another, as published training on many
        GPUs does with each one's own; ids are packed then. Not with specs whose rows depend on what is cut.
    upstream: reproduce the published collators bit for bit: masks are truncated; each spec draws its sizes from a torch
        generator of its own, all seeded with seed + step, and places from torch's global one, or from the `generator`
        of a call, one spec after another.
    bucket: not 0: packed token axes are padded up to multiples of it, so that compiled code and CUDA graphs see few
        shapes (see `MaskBatch`).
    seed: masks depend on (seed, step) alone, and specs draw independently: counter-based Philox4x32-10, unbiased in
        every range. `step` counts calls. In the workers of a DataLoader with one call per batch it is the batch's
        number, whatever the number of workers, and runs on from epoch to epoch; set it to resume, or after an epoch
        that was left early. With persistent workers the numbers of later epochs are new ones too, but depend on how
        many workers there are, and setting it has no effect once they run.

    Source: Bardes et al., Revisiting Feature Prediction for Learning Visual Representations from Video
    (arXiv:2404.08471), section 3; Assran et al., V-JEPA 2 (arXiv:2506.09985).
    """

    def __init__(
        self,
        grid: tuple[int, int, int],
        specs: Sequence[Spec3d] = (SHORT_RANGE, LONG_RANGE),
        *,
        truncate: bool = False,
        truncate_group: int = 0,
        upstream: bool = False,
        bucket: int = 0,
        seed: int = 0,
    ) -> None:
        self.grid = sides(self.name, grid, "Gt, Gh, Gw")
        if min(self.grid) < 1:
            fail(self.name, "grid", "have at least 1 patch per side", self.grid, "use a larger clip")
        if isinstance(specs, Spec3d) or not specs or not all(isinstance(spec, Spec3d) for spec in specs):
            fail(self.name, "specs", "be a sequence of Spec3d", repr(specs), "pass (Spec3d(...),)", TypeError)
        self.specs = tuple(specs)
        for spec in self.specs:
            self._check_room(spec)
        super().__init__(truncate, truncate_group, upstream, seed, bucket)
        if truncate_group and any(s.max_keep or s.full_complement or s.pred_full_complement for s in self.specs):
            requirement, remedy = "be 0 with max_keep and complements, which follow from the cut", "cut whole batches"
            fail(self.name, "truncate_group", requirement, truncate_group, remedy)
        native(self.name)

    def _check_room(self, spec: Spec3d) -> None:
        """A single block never covers every patch of every frame."""
        frames, height, width = self.grid
        patches = max(int(height * width * spec.spatial_scale[1]), 1)
        # aspect ratios with which these patches, rounded, reach both sides
        narrowest, widest = (height - 0.5) ** 2 / patches, patches / (width - 0.5) ** 2
        least, most = spec.aspect_ratio
        if int(frames * spec.temporal_scale[1]) >= frames and max(narrowest, least) <= min(widest, most):
            fail(self.name, "spatial_scale", "leave patches beside a block", spec.spatial_scale, "lower it")

    def _draw(self, batch: int, step: int, state: Tensor | None) -> MaskBatch:
        drawn = MaskBatch(batch, *native(self.name).multiblock3d(vars(self), batch, step, state))
        if not len(drawn.context_lengths):
            remedy = "lower num_blocks or spatial_scale"
            fail(self.name, "specs", "leave patches for every context", "none in 10000 draws of a clip", remedy)
        return self._finished(drawn)
