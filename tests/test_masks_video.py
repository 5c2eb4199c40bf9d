"""MultiBlock3d: the published shapes, hand-checked cases, coverage, what each option does, errors."""

import numpy as np
import pytest
import torch

from jepa_kernels.masks import LONG_RANGE, SHORT_RANGE, MultiBlock3d, Spec3d

WHOLE = {"spatial_scale": (1.0, 1.0), "aspect_ratio": (1.0, 1.0)}  # a block as large as a frame


def rows(ids, lengths):
    return np.split(ids.reshape(-1), np.cumsum(lengths)[:-1])


def drawn(sampler, batch, count):
    """Lengths [count, rows] of contexts and of targets."""
    generator = torch.Generator().manual_seed(1) if sampler.upstream else None
    masks = [sampler(batch, generator=generator) for _ in range(count)]
    return np.stack([m.context_lengths for m in masks]), np.stack([m.target_lengths for m in masks])


@pytest.mark.parametrize(
    "grid, batch, short, long, dropped",
    [
        ((8, 14, 14), 24, (362, 748), (103, 1102), (0.29, 0.23)),
        ((8, 24, 24), 10, (1306, 2310), (422, 3323), (0.22, 0.19)),
        ((8, 16, 16), 24, (503, 965), (132, 1440), (0.28, 0.23)),
        ((32, 16, 16), 12, (2176, 4008), (632, 5839), (0.25, 0.21)),
        ((32, 24, 24), 6, (5497, 9587), (2023, 13544), (0.18, 0.16)),
    ],
)
def test_upstream_lengths_are_the_published_ones(grid, batch, short, long, dropped):
    contexts, targets = drawn(MultiBlock3d(grid, upstream=True), batch, 500)
    for i, means in enumerate((short, long)):
        context, target = contexts[:, i * batch], targets[:, i * batch]
        assert (context.mean(), target.mean()) == pytest.approx(means, rel=0.03)
        assert 1 - (context + target).mean() / np.prod(grid) == pytest.approx(dropped[i], abs=0.011)
        assert (contexts[:, i * batch : (i + 1) * batch] == context[:, None]).all()
        assert not (context % grid[0]).any() and not (target % grid[0]).any()


def test_an_image_is_a_clip_of_one_frame():
    (context,), (target,) = (
        x[:, :1].T for x in drawn(MultiBlock3d((1, 16, 16), (Spec3d(10),), upstream=True), 36, 500)
    )
    assert (context.mean(), target.mean()) == pytest.approx((45.6, 132), rel=0.03)


def test_packed_lengths_are_the_published_ones():
    contexts, targets = drawn(MultiBlock3d((8, 16, 16)), 24, 200)
    assert (contexts[:, :24].mean(), contexts[:, 24:].mean()) == pytest.approx((773, 388), rel=0.02)
    assert (targets[:, :24].mean(), targets[:, 24:].mean()) == pytest.approx((1275, 1660), rel=0.02)
    assert (contexts + targets == 2048).all()


def test_truncation_drops_the_last_frames_and_packing_none():
    def per_frame(sampler, batches=200):
        generator = torch.Generator().manual_seed(1) if sampler.upstream else None
        drawn = [sampler(24, generator=generator).context_ids.ravel() for _ in range(batches)]
        return np.bincount(np.concatenate(drawn) // 256, minlength=8) / (24 * batches)

    cut = per_frame(MultiBlock3d((8, 16, 16), (SHORT_RANGE,), upstream=True))
    assert cut == pytest.approx([99, 99, 99, 92, 67, 36, 14, 5], abs=2.5)
    assert np.ptp(per_frame(MultiBlock3d((8, 16, 16), (SHORT_RANGE,)))) == 0


def test_every_patch_is_chosen():
    context, target = np.zeros(4 * 49), np.zeros(4 * 49)
    sampler = MultiBlock3d((4, 7, 7), (Spec3d(temporal_scale=(0.5, 0.5)),))
    for _ in range(100):
        masks = sampler(32)
        context += np.bincount(masks.context_ids, minlength=196)
        target += np.bincount(masks.target_ids, minlength=196)
    for counts in (context.reshape(4, 7, 7), target.reshape(4, 7, 7)):
        assert counts.min() > 0
        for axis in range(3):
            first, last = np.take(counts, 0, axis).sum(), np.take(counts, -1, axis).sum()
            assert first == pytest.approx(last, rel=0.05)


@pytest.mark.parametrize("truncate", [False, True])
@pytest.mark.parametrize("grid", [(8, 14, 14), (3, 5, 9), (1, 2, 3)])
def test_rows_are_sorted_and_disjoint(grid, truncate):
    masks = MultiBlock3d(grid, truncate=truncate)(5)
    contexts, targets = rows(masks.context_ids, masks.context_lengths), rows(masks.target_ids, masks.target_lengths)
    assert masks.batch == 5 and len(contexts) == len(targets) == 10 and masks.packed
    for context, target in zip(contexts, targets, strict=True):
        for row in (context, target):
            assert len(row) and (np.diff(row) > 0).all() and row[0] >= 0 and row[-1] < np.prod(grid)
        assert not np.isin(context, target).any()
    for ids in (masks.context_ids, masks.target_ids, masks.context_lengths, masks.target_lengths):
        assert ids.dtype == np.int64 and ids.flags["C_CONTIGUOUS"]


def test_one_truncated_spec_is_rectangular():
    masks = MultiBlock3d((4, 8, 8), (LONG_RANGE,), truncate=True)(3)
    assert masks.context_ids.shape == (3, masks.context_lengths[0]) and masks.target_ids.shape[0] == 3
    assert not masks.packed and masks.to("cpu").pairs is None


def test_specs_draw_independently_and_pairs_join_row_to_row():
    masks = MultiBlock3d((2, 6, 6), (SHORT_RANGE, SHORT_RANGE))(40)
    assert not np.array_equal(masks.context_lengths[:40], masks.context_lengths[40:])
    pairs = masks.to("cpu").pairs
    assert pairs.packing.lengths == (72,) * 80 and len(pairs.source) == 72 * 80


def test_hand_checked_1_by_1_by_2():
    # A block is 1 x 1: one patch is the target and the other the context.
    spec = Spec3d(num_blocks=1, spatial_scale=(0.5, 0.5), aspect_ratio=(1.0, 1.0))
    masks = MultiBlock3d((1, 1, 2), (spec,))(64)
    assert (masks.context_ids == 1 - masks.target_ids).all() and set(masks.context_ids) == {0, 1}


def test_hand_checked_frames():
    # A block is all of two of the four frames, and the context lies in the first three.
    half = {"temporal_scale": (0.5, 0.5), "max_context_frames_ratio": 0.75}
    masks = MultiBlock3d((4, 2, 2), (Spec3d(num_blocks=1, **half, **WHOLE),))(64)
    found = {tuple(row.tolist()) for row in rows(masks.context_ids, masks.context_lengths)}
    assert found == {(8, 9, 10, 11), (0, 1, 2, 3), (0, 1, 2, 3, 4, 5, 6, 7)}


def test_max_keep_takes_a_random_choice_unless_truncated():
    spec = Spec3d(num_blocks=1, max_keep=5)
    packed, cut = (MultiBlock3d((4, 6, 6), (spec,), truncate=t)(200) for t in (False, True))
    assert (packed.context_lengths == 5).all() and cut.context_ids.shape == (200, 5)
    frames = np.bincount(packed.context_ids // 36, minlength=4)
    assert frames == pytest.approx(np.full(4, 250), rel=0.15) and not (cut.context_ids // 36).any()


def test_complements_and_swaps():
    grid, patches = (4, 6, 6), set(range(144))
    plain, *others = (
        MultiBlock3d(grid, (Spec3d(**options),), truncate=True)(6)
        for options in ({}, {"full_complement": True}, {"pred_full_complement": True}, {"inv_block": True})
    )
    full, pred_full, inverse = others
    assert np.array_equal(full.context_ids, plain.context_ids) and np.array_equal(
        pred_full.target_ids, plain.target_ids
    )
    for masks in (full, pred_full):
        for context, target in zip(masks.context_ids, masks.target_ids, strict=True):
            assert set(context) | set(target) == patches and len(context) + len(target) == 144
    assert np.array_equal(inverse.context_ids, plain.target_ids)
    assert np.array_equal(inverse.target_ids, plain.context_ids)


def test_masks_depend_on_seed_and_step_alone():
    first, again, other = (MultiBlock3d((4, 8, 8), seed=s) for s in (3, 3, 4))
    a = [first(4).context_ids for _ in range(3)]
    again.step = 2
    assert np.array_equal(a[2], again(4).context_ids)
    assert np.array_equal(a[1], first(4, step=1).context_ids) and first.step == 3
    assert not np.array_equal(a[0], other(4).context_ids)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_blocks": 0}, "num_blocks must be at least 1, got 0; the published values are 8 and 2"),
        (
            {"spatial_scale": (0.3, 0.2)},
            "spatial_scale must satisfy 0 < least <= most <= 1, got (0.3, 0.2); ",
        ),
        ({"temporal_scale": (0.5, 2)}, "temporal_scale must satisfy 0 < least <= most <= 1, got (0.5, 2); pass shares"),
        ({"aspect_ratio": (0, 1)}, "aspect_ratio must satisfy 0 < least <= most <= 1000, got (0, 1); pass height"),
        (
            {"max_context_frames_ratio": 0},
            "max_context_frames_ratio must be in (0, 1], got 0; pass a share",
        ),
        (
            {"max_context_frames_ratio": float("nan")},
            "max_context_frames_ratio must be in (0, 1], got nan; pass",
        ),
        ({"max_keep": 0}, "max_keep must be at least 1, got 0; pass None to keep all"),
        ({"full_complement": True, "pred_full_complement": True}, "full_complement must not go with pred_full"),
    ],
)
def test_spec_errors(arguments, message):
    with pytest.raises(ValueError) as error:
        Spec3d(**arguments)
    assert str(error.value).startswith("Spec3d: " + message)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_blocks": 2.5}, "num_blocks must be an int, got 2.5; the published values are 8 and 2"),
        ({"spatial_scale": 0.15}, "spatial_scale must be two numbers (least, most), got 0.15; pass shares of a frame"),
        ({"max_keep": "all"}, "max_keep must be an int, got 'all'; pass None to keep all"),
        ({"max_context_frames_ratio": "half"}, "max_context_frames_ratio must be a number, got str; pass a float"),
    ],
)
def test_spec_type_errors(arguments, message):
    with pytest.raises(TypeError) as error:
        Spec3d(**arguments)
    assert str(error.value).startswith("Spec3d: " + message)


@pytest.mark.parametrize(
    "grid, specs, error, message",
    [
        ((8, 16), (SHORT_RANGE,), TypeError, "grid must be patches per side, (Gt, Gh, Gw), got (8, 16); pass integers"),
        (16, (SHORT_RANGE,), TypeError, "grid must be patches per side, (Gt, Gh, Gw), got 16; pass integers"),
        ((0, 16, 16), (SHORT_RANGE,), ValueError, "grid must have at least 1 patch per side, got (0, 16, 16); use a"),
        ((64, 999, 999), (SHORT_RANGE,), ValueError, "grid must have at most 1048576 patches, got (64, 999, 999); use"),
        ((8, 16, 16), SHORT_RANGE, TypeError, "specs must be a sequence of Spec3d, got Spec3d("),
        ((8, 16, 16), (), TypeError, "specs must be a sequence of Spec3d, got (); pass (Spec3d(...),)"),
        ((8, 16, 16), (Spec3d(1, **WHOLE),), ValueError, "spatial_scale must leave patches beside a block, got (1.0,"),
        ((1, 1, 1), (SHORT_RANGE,), ValueError, "spatial_scale must leave patches beside a block, got (0.15, 0.15); "),
    ],
)  # fmt: skip
def test_errors(grid, specs, error, message):
    with pytest.raises(error) as raised:
        MultiBlock3d(grid, specs)
    assert str(raised.value).startswith("MultiBlock3d: " + message)


@pytest.mark.parametrize("option", [{"max_keep": 9}, {"full_complement": True}, {"pred_full_complement": True}])
def test_groups_are_not_cut_of_rows_that_follow_from_the_cut(option):
    given = (4, 8, 8), (SHORT_RANGE, Spec3d(**option))
    MultiBlock3d(*given, truncate=True)
    with pytest.raises(ValueError, match=r"^MultiBlock3d: truncate_group must be 0 with max_keep and complements, whi"):
        MultiBlock3d(*given, truncate=True, truncate_group=2)


def test_blocks_that_leave_nothing_are_named():
    many = Spec3d(num_blocks=999, spatial_scale=(0.8, 0.8), aspect_ratio=(1.0, 1.0))
    sampler, generator = MultiBlock3d((1, 8, 8), (SHORT_RANGE, many), upstream=True), torch.Generator()
    before = generator.get_state()
    with pytest.raises(ValueError) as error:
        sampler(2, generator=generator)
    assert torch.equal(generator.get_state(), before), "nothing was drawn"
    assert str(error.value) == (
        "MultiBlock3d: specs must leave patches for every context, got none in 10000 draws of a clip; "
        "lower num_blocks or spatial_scale"
    )
