"""MultiBlock2d: the published shapes, hand-checked cases, coverage, reproducibility, errors."""

import copy
import pickle
import threading
import time

import numpy as np
import pytest
import torch

import jepa_kernels as jk
from jepa_kernels._core import extension
from jepa_kernels.masks import LONG_RANGE, MultiBlock2d, MultiBlock3d
from jepa_kernels.pairs import Pairs
from tests.processes import forked


def rows(ids, lengths):
    return np.split(ids.reshape(-1), np.cumsum(lengths)[:-1])


@pytest.mark.parametrize(
    "grid, batch, context, target, targets",
    [
        (16, 128, 68.2, 44.2, (35, 54)),
        (16, 32, 77.6, 44, (35, 54)),
        (28, 16, 271, 137.7, (108, 154)),
        (14, 16, 60.6, 33.4, (30, 40)),
    ],
)
def test_upstream_lengths_are_the_published_ones(grid, batch, context, target, targets):
    sampler, generator = MultiBlock2d(grid, upstream=True), torch.Generator().manual_seed(1)
    masks = [sampler(batch, generator=generator) for _ in range(400)]
    lengths = np.array([m.context_ids.shape[1] for m in masks])
    sizes = np.array([m.target_ids.shape[1] for m in masks])
    assert lengths.mean() == pytest.approx(context, rel=0.02)
    assert sizes.mean() == pytest.approx(target, rel=0.02)
    assert (sizes.min(), sizes.max()) == targets
    if batch == 128:
        assert np.quantile(lengths, (0.05, 0.95)) == pytest.approx((54, 81), abs=5)


def test_packed_lengths_are_the_published_ones():
    sampler = MultiBlock2d(16, seed=1)
    masks = [sampler(128) for _ in range(100)]
    lengths = np.concatenate([m.context_lengths for m in masks])
    assert lengths.mean() == pytest.approx(110, rel=0.03)
    assert lengths.min() >= 35 and lengths.max() <= 185


@pytest.mark.parametrize("truncate", [False, True])
@pytest.mark.parametrize("grid", [16, (6, 9)])
def test_rows_are_sorted_disjoint_and_rectangular_blocks(grid, truncate):
    height, width = (grid, grid) if isinstance(grid, int) else grid
    masks = MultiBlock2d(grid, truncate=truncate, min_keep=2)(8)
    contexts = rows(masks.context_ids, masks.context_lengths)
    targets = rows(masks.target_ids, masks.target_lengths)
    assert (len(contexts), len(targets)) == (8, 4 * 8)
    for s, target in enumerate(targets):
        y, x = np.divmod(target, width)
        block = (np.arange(y.min(), y.max() + 1)[:, None] * width + np.arange(x.min(), x.max() + 1)).ravel()
        assert np.array_equal(target, block) and y.max() < height
        assert not np.isin(contexts[s % 8], target).any()
    for context in contexts:
        assert (np.diff(context) > 0).all() and context.min() >= 0 and context.max() < height * width
    for ids in (masks.context_ids, masks.target_ids):
        assert ids.dtype == np.int64 and ids.flags["C_CONTIGUOUS"]
    assert masks.packed != truncate


def test_hand_checked_2_by_2():
    # Blocks are 1 x 1 (a block is smaller than the grid): the target is one patch, the context another one.
    sampler = MultiBlock2d(2, num_targets=1, min_keep=0, target_scale=(0.25, 0.25), target_aspect_ratio=(1, 1))
    masks = sampler(64)
    assert masks.target_lengths.tolist() == [1] * 64 and masks.context_lengths.tolist() == [1] * 64
    assert (masks.context_ids != masks.target_ids).all()
    assert set(masks.target_ids) == {0, 1, 2, 3}


def test_truncation_keeps_the_first_patches_in_raster_order():
    full, cut = (MultiBlock2d(16, truncate=t)(16) for t in (False, True))
    shortest = full.context_lengths.min()
    for row, short in zip(rows(full.context_ids, full.context_lengths), cut.context_ids, strict=True):
        assert np.array_equal(row[:shortest], short)
    assert np.array_equal(full.target_ids, cut.target_ids.ravel())


def test_every_patch_is_chosen_equally_often_on_opposite_sides():
    sampler = MultiBlock2d(14)
    context, target = np.zeros(196), np.zeros(196)
    for _ in range(150):
        masks = sampler(32)
        context += np.bincount(masks.context_ids, minlength=196)
        target += np.bincount(masks.target_ids, minlength=196)
    for counts in (context.reshape(14, 14), target.reshape(14, 14)):
        assert counts.min() > 0
        edges = [counts[0].sum(), counts[-1].sum(), counts[:, 0].sum(), counts[:, -1].sum()]
        assert max(edges) < 1.15 * min(edges)


def test_upstream_never_sees_the_last_row_and_column_and_rarely_the_bottom():
    sampler, generator = MultiBlock2d(16, upstream=True), torch.Generator().manual_seed(1)
    context, target = np.zeros((16, 16)), np.zeros((16, 16))
    for _ in range(100):
        masks = sampler(128, generator=generator)
        context += np.bincount(masks.context_ids.ravel(), minlength=256).reshape(16, 16)
        target += np.bincount(masks.target_ids.ravel(), minlength=256).reshape(16, 16)
    for counts in (context, target):
        assert not counts[-1].any() and not counts[:, -1].any() and counts[:-1, :-1].min() > 0
    rows = context.mean(1) / (100 * 128)  # share of images whose context holds a patch of the row
    assert rows[0] == pytest.approx(0.78, abs=0.02) and rows[14] == pytest.approx(0.02, abs=0.01)


def test_targets_are_respected_unless_too_few_patches_remain():
    # The targets leave at most 7 of 16 patches: they are given up, the last first, until 8 remain.
    scales = {"target_scale": (0.75, 0.8), "context_scale": (0.6, 0.6)}
    masks = MultiBlock2d(4, target_aspect_ratio=(1, 1), min_keep=7, **scales)(16)
    assert (masks.context_lengths > 7).all()
    overlap = [np.isin(c, masks.target_ids).any() for c in rows(masks.context_ids, masks.context_lengths)]
    assert all(overlap)


def test_masks_depend_on_seed_and_step_alone():
    first, again, other = MultiBlock2d(14, seed=3), MultiBlock2d(14, seed=3), MultiBlock2d(14, seed=4)
    a = [first(4).context_ids for _ in range(3)]
    again.step = 2
    assert np.array_equal(a[2], again(4).context_ids)
    assert np.array_equal(a[1], first(4, step=1).context_ids) and first.step == 3
    assert not np.array_equal(a[0], other(4).context_ids)


class Collate:
    def __init__(self, sampler):
        self.sampler = sampler

    def __call__(self, samples):
        return self.sampler(len(samples))


SAMPLERS = [MultiBlock2d(14), MultiBlock3d((4, 7, 7))]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=["2d", "3d"])
@pytest.mark.parametrize("workers, start", [(0, None), (2, "fork"), (1, "spawn")])
def test_the_number_of_workers_does_not_change_the_masks(sampler, workers, start):
    tokens, ids = torch.ones(64, 256, 64), torch.arange(200).expand(64, 200).contiguous()
    jk.gather_tokens(tokens, ids)  # starts the parent's threads: a forked child that wants them waits for ever
    loader = torch.utils.data.DataLoader(
        range(10), batch_size=2, num_workers=workers, collate_fn=Collate(pickle.loads(pickle.dumps(sampler))),
        multiprocessing_context=start, timeout=60 if workers else 0,
    )  # fmt: skip
    for step, masks in enumerate(loader):
        expected = sampler(2, step=step)
        assert np.array_equal(masks.context_ids, expected.context_ids)
        assert np.array_equal(masks.target_ids, expected.target_ids)


class CollateStep:
    """Stands for the masks: their number, by which they are drawn."""

    def __init__(self, sampler):
        self.sampler = sampler

    def __call__(self, samples):
        return self.sampler._steps.take()


def epochs(sampler, workers, start=None, persistent=False, count=3):
    loader = torch.utils.data.DataLoader(
        range(6), batch_size=2, num_workers=workers, collate_fn=CollateStep(sampler), persistent_workers=persistent,
        multiprocessing_context=start, timeout=60 if workers else 0,
    )  # fmt: skip
    return [list(loader) for _ in range(count)]


@pytest.mark.parametrize("workers, start", [(0, None), (1, "fork"), (2, "fork"), (2, forked())])
def test_steps_run_on_from_epoch_to_epoch(workers, start):
    sampler = pickle.loads(pickle.dumps(MultiBlock2d(14, upstream=workers == 1)))
    assert epochs(sampler, workers, start, count=2) == [[0, 1, 2], [3, 4, 5]] and sampler.step == 6
    sampler.step = 2
    assert epochs(sampler, workers, start, count=1) == [[2, 3, 4]]


def test_persistent_workers_never_repeat_a_step():
    sampler = MultiBlock2d(14)
    first, *rest = epochs(sampler, 2, "fork", persistent=True)
    steps = [*first, *rest[0], *rest[1]]
    assert first == [0, 1, 2] and len(set(steps)) == 9 and sampler.step == max(steps) + 1


def test_a_copy_counts_for_itself():
    sampler = MultiBlock2d(14)
    sampler(1)
    other = copy.deepcopy(sampler)
    other(1)
    assert (sampler.step, other.step) == (1, 2)


@pytest.mark.parametrize("sampler, batch", [(SAMPLERS[0], 60_000), (SAMPLERS[1], 30_000)], ids=["2d", "3d"])
def test_other_threads_run_meanwhile(sampler, batch):
    seen, bounds = [], []

    def draw():
        bounds.append(time.perf_counter())
        sampler(batch, step=0)
        bounds.append(time.perf_counter())

    worker = threading.Thread(target=draw)
    worker.start()
    while worker.is_alive():
        seen.append(time.perf_counter())
        time.sleep(0.002)
    begin, end = bounds
    assert any(begin + 0.2 * (end - begin) < t < begin + 0.8 * (end - begin) for t in seen)


@pytest.mark.parametrize("name, build", [("MultiBlock2d", lambda: MultiBlock2d(14)),
                                         ("MultiBlock3d", lambda: MultiBlock3d((8, 14, 14)))])  # fmt: skip
def test_without_the_compiled_module_the_remedy_is_named(name, build, monkeypatch):
    monkeypatch.setitem(extension._state, "C", "jepa_kernels._C is not built")
    with pytest.raises(jk.BackendError) as error:
        build()
    assert str(error.value) == (
        f"{name}: the compiled module must be there, got jepa_kernels._C is not built; build it with `pip install .`"
    )


def test_to_gives_ids_packings_and_pairs():
    host = MultiBlock2d(14)(3)
    masks = host.to("cpu")
    assert masks.context_packing.lengths == tuple(host.context_lengths)
    assert masks.target_packing.lengths == tuple(host.target_lengths)
    assert torch.equal(masks.target_ids, torch.from_numpy(host.target_ids))
    expected = [c + t for c, t in zip(list(host.context_lengths) * 4, host.target_lengths, strict=True)]
    assert list(masks.pairs.packing.lengths) == expected
    cut = MultiBlock2d(14, truncate=True)(3).to("cpu")
    assert cut.context_ids.shape[0] == 3 and cut.target_ids.shape[0] == 12 and cut.pairs is None


def test_pairs_by_hand():
    pairs = Pairs.from_lengths([2, 1], [1, 2, 0, 1])  # c0 c0 t | c1 t t | c0 c0 | c1 t
    assert pairs.packing.lengths == (3, 3, 2, 2)
    assert pairs.source.tolist() == [0, 1, 3, 2, 4, 5, 0, 1, 2, 6]  # rows of [3 context tokens; 4 target tokens]
    assert pairs.target_rows.tolist() == [2, 4, 5, 9]


def test_pairs_of_no_images():
    pairs = Pairs.from_lengths([], [])
    assert pairs.packing.lengths == () and pairs.source.numel() == pairs.target_rows.numel() == 0
    with pytest.raises(ValueError, match="Pairs: target lengths must be a multiple of the 0 contexts in number, got 1"):
        Pairs.from_lengths([], [1])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"grid": 1}, r"MultiBlock2d: grid must have at least 2 patches per side, got \(1, 1\); "),
        ({"target_scale": (0.3, 0.2)}, r"target_scale must satisfy 0 < least <= most <= 1, got \(0.3"),
        ({"context_scale": (0.5, 1.5)}, r"context_scale must satisfy 0 < least <= most <= 1, got \(0.5"),
        ({"target_aspect_ratio": (0, 1)}, r"target_aspect_ratio must satisfy 0 < least <= most <= 1000, got"),
        ({"target_aspect_ratio": (1, float("inf"))}, r"target_aspect_ratio must satisfy 0 < .* <= 1000, got \(1, inf"),
        ({"target_scale": (float("nan"), 0.2)}, r"target_scale must satisfy 0 < least <= most <= 1, got \(nan"),
        ({"min_keep": -5}, "MultiBlock2d: min_keep must be at least 0, got -5; the published value is 10"),
        ({"seed": -1}, "MultiBlock2d: seed must be at least 0, got -1; pass any such number"),
        ({"num_targets": 0}, "num_targets must be at least 1, got 0"),
        ({"seed": 2**63}, "MultiBlock2d: seed must be at most 9223372036854775807, got 9223372036854775808; pass any"),
        (
            {"grid": 2000},
            r"MultiBlock2d: grid must have at most 1048576 patches, got \(2000, 2000\); use larger",
        ),
        ({"num_targets": 2**20 + 1}, "num_targets must be at most 1048576, got 1048577; the published value is 4"),
        ({"grid": 3}, "min_keep must be less than the smallest context block, 2 x 2 patches, got 10; "),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        MultiBlock2d(**{"grid": 14, **arguments})


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"grid": 14.5}, "grid must be patches per side, G or (Gh, Gw), got 14.5; pass integers"),
        ({"grid": "14"}, "grid must be patches per side, G or (Gh, Gw), got '14'; pass integers"),
        ({"grid": (14, 14, 14)}, "grid must be patches per side, G or (Gh, Gw), got (14, 14, 14); pass integers"),
        ({"target_scale": None}, "target_scale must be two numbers (least, most), got None; pass shares of the grid"),
        ({"context_scale": 0.9}, "context_scale must be two numbers (least, most), got 0.9; pass shares of the grid"),
        ({"target_aspect_ratio": ("a", 1)}, "target_aspect_ratio must be two numbers (least, most), got ('a', 1); "),
        ({"num_targets": 2.5}, "num_targets must be an int, got 2.5; the published value is 4"),
        ({"min_keep": None}, "min_keep must be an int, got None; the published value is 10"),
        ({"seed": 0.5}, "seed must be an int, got 0.5; pass any such number"),
    ],
)
def test_type_errors(arguments, message):
    with pytest.raises(TypeError) as error:
        MultiBlock2d(**{"grid": 14, **arguments})
    assert str(error.value).startswith("MultiBlock2d: " + message)


def test_numpy_numbers_are_numbers():
    sampler = MultiBlock2d(np.int64(14), target_scale=(np.float32(0.15), 1 / 5), min_keep=np.int32(10))
    assert sampler.grid == (14, 14) and sampler(np.int64(2)).batch == 2


def test_batch_and_pairs_errors():
    with pytest.raises(ValueError, match="MultiBlock2d: batch must be at least 1, got 0"):
        MultiBlock2d(14)(0)
    with pytest.raises(TypeError, match=r"MultiBlock2d: batch must be an int, got 2\.5; pass the number of images"):
        MultiBlock2d(8, min_keep=2)(2.5)
    with pytest.raises(ValueError, match="MultiBlock2d: step must be at least 0, got -1; leave it out to count calls"):
        MultiBlock2d(14)(2, step=-1)
    with pytest.raises(ValueError, match="MultiBlock2d: batch must be at most 1048576, got 1048577; pass the"):
        MultiBlock2d(14)(2**20 + 1)
    with pytest.raises(ValueError, match="Pairs: target lengths must be a multiple of the 2 contexts in num"):
        Pairs.from_lengths([1, 2], [1, 2, 3])


SAMPLERS = {
    "images": (MultiBlock2d, (14,)),
    "clips": (MultiBlock3d, ((4, 8, 8),)),
    "clips of one kind": (MultiBlock3d, ((4, 8, 8), (LONG_RANGE,))),
}


@pytest.mark.parametrize("kind", SAMPLERS)
def test_a_group_of_the_whole_batch_is_cut_as_the_batch_is(kind):
    make, given = SAMPLERS[kind]
    ours, whole = make(*given, truncate=True, truncate_group=9, seed=1)(7), make(*given, truncate=True, seed=1)(7)
    assert ours.packed
    for name in ("context", "target"):
        ids, lengths = (getattr(whole, f"{name}_{what}") for what in ("ids", "lengths"))
        assert np.array_equal(getattr(ours, f"{name}_ids"), ids.ravel())
        assert np.array_equal(getattr(ours, f"{name}_lengths"), lengths)


@pytest.mark.parametrize("kind", SAMPLERS)
def test_groups_are_cut_each_to_its_shortest(kind):
    make, given = SAMPLERS[kind]
    ours = make(*given, truncate=True, truncate_group=3, seed=1, bucket=64)(8)
    assert len(ours.context_ids) % 64 == 0
    loose, lengths = make(*given, seed=1)(8), set()
    for images in ([0, 1, 2], [3, 4, 5], [6, 7]):
        expected, found = loose.part(images, 3).truncated(3), ours.part(images, 3)
        used = int(found.context_lengths.sum()), int(found.target_lengths.sum())
        assert np.array_equal(found.context_ids[: used[0]], expected.context_ids)
        assert np.array_equal(found.target_ids[: used[1]], expected.target_ids)
        lengths.add(tuple(found.context_lengths.reshape(-1, len(images))[:, 0]))
        assert all(len(set(row)) == 1 for row in found.context_lengths.reshape(-1, len(images)))
    assert len(lengths) > 1


@pytest.mark.parametrize("how", [{}, {"truncate": True, "upstream": True}])
def test_groups_without_what_is_cut_are_refused(how):
    with pytest.raises(ValueError, match=r"^MultiBlock2d: truncate_group must be 0 but with truncate=True, and wi"):
        MultiBlock2d(14, truncate_group=4, **how)
