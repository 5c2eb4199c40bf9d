"""Samplers against an independent statement of their algorithm, bit for bit: with torch's generators, and our own."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from benchmarks.rival_forms.collators import Collator2d, Collator3d, PhiloxDraws, TorchDraws, seeded
from jepa_kernels.masks import LONG_RANGE, SHORT_RANGE, MultiBlock2d, MultiBlock3d, Spec3d


def rows(ids, lengths):
    return [row.tolist() for row in np.split(ids.reshape(-1), np.cumsum(lengths)[:-1])]


def assert_same(masks, contexts, targets):
    assert rows(masks.context_ids, masks.context_lengths) == [row.tolist() for row in contexts]
    assert rows(masks.target_ids, masks.target_lengths) == [row.tolist() for row in targets]


def test_philox_gives_the_published_words():
    # The known answers that come with the authors' own library.
    zero, ones, pi = PhiloxDraws(0, 0), PhiloxDraws(2**64 - 1, 0), PhiloxDraws(0x299F31D0A4093822, 0)
    ones.counter, pi.counter = 2**128 - 1, 0x0370734413198A2E85A308D3243F6A88
    assert zero.block() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert ones.block() == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    assert pi.block() == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


GRIDS = [(16, 16), (14, 14), (28, 28), (6, 9)]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("batch", [1, 5, 32])
def test_2d_draws_what_the_published_collator_draws(grid, batch):
    min_keep = 10 if min(grid) > 10 else 3
    sampler, collator = MultiBlock2d(grid, upstream=True, min_keep=min_keep), Collator2d(grid, min_keep=min_keep)
    torch.manual_seed(batch)
    mine = torch.Generator().manual_seed(batch)
    for step in range(12):
        masks = sampler(batch, generator=mine)
        assert_same(masks, *collator(batch, seeded(step), TorchDraws()))
        assert torch.equal(mine.get_state(), torch.get_rng_state())
        assert not masks.packed


@pytest.mark.parametrize(
    "options",
    [
        {"target_scale": (0.3, 0.6), "num_targets": 3, "min_keep": 30},  # targets are given up
        {"target_scale": (0.5, 0.9), "target_aspect_ratio": (0.2, 5.0), "num_targets": 1},
        {"context_scale": (0.3, 0.4), "num_targets": 2, "min_keep": 0},
    ],
)
def test_2d_options(options):
    sampler, collator = MultiBlock2d(12, upstream=True, **options), Collator2d((12, 12), **options)
    mine, published = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    for step in range(30):
        assert_same(sampler(8, generator=mine), *collator(8, seeded(step), TorchDraws(published)))
    assert torch.equal(mine.get_state(), published.get_state())


VIDEO = [((8, 16, 16), 6), ((8, 14, 14), 3), ((32, 16, 16), 2), ((1, 16, 16), 9), ((4, 5, 9), 4)]


@pytest.mark.parametrize("grid, batch", VIDEO)
def test_3d_draws_what_the_published_collators_draw_one_after_another(grid, batch):
    specs = (SHORT_RANGE, LONG_RANGE)
    sampler = MultiBlock3d(grid, specs, upstream=True)
    torch.manual_seed(batch)
    mine = torch.Generator().manual_seed(batch)
    for step in range(8):
        contexts, targets = [], []
        for spec in specs:
            context, target = Collator3d(grid, **asdict(spec))(batch, seeded(step), TorchDraws())
            contexts, targets = contexts + context, targets + target
        masks = sampler(batch, generator=mine)
        assert_same(masks, contexts, targets)
        assert masks.packed and torch.equal(mine.get_state(), torch.get_rng_state())


OPTIONS = [
    {"temporal_scale": (0.3, 0.9), "spatial_scale": (0.2, 0.6), "num_blocks": 3},
    {"max_context_frames_ratio": 0.5},
    {"max_context_frames_ratio": 0.05, "temporal_scale": (0.5, 0.5), "aspect_ratio": (0.3, 3.0)},
    {"max_keep": 40},
    {"max_keep": 40, "full_complement": True},
    {"full_complement": True},
    {"pred_full_complement": True, "max_keep": 7},
    {"inv_block": True},
    {"inv_block": True, "full_complement": True, "max_keep": 100, "num_blocks": 2, "spatial_scale": (0.7, 0.7)},
    {"num_blocks": 10, "spatial_scale": (0.8, 0.85), "aspect_ratio": (1.0, 1.0)},  # contexts are drawn again
]


@pytest.mark.parametrize("options", OPTIONS)
def test_3d_options(options):
    grid, spec = (6, 10, 12), Spec3d(**options)
    sampler, collator = MultiBlock3d(grid, (spec,), upstream=True), Collator3d(grid, **options)
    mine, published = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    for step in range(10):
        masks = sampler(5, generator=mine)
        assert_same(masks, *collator(5, seeded(step), TorchDraws(published)))
        assert masks.context_ids.shape == (5, masks.context_lengths[0])
    assert torch.equal(mine.get_state(), published.get_state())


@pytest.mark.parametrize("seed", [0, 2**31, 2**63 - 5])
def test_the_default_is_the_same_algorithm_on_philox(seed):
    ratio = {"context_aspect": 6 / 9, "min_keep": 3, "edge": 1, "truncate": False}
    for grid, options in (((16, 16), {"edge": 1, "truncate": False}), ((6, 9), ratio)):
        sampler = MultiBlock2d(grid, seed=seed, min_keep=options.get("min_keep", 10))
        for step in (0, 1, 2**40):
            draws = PhiloxDraws(seed, step)
            assert_same(sampler(7, step=step), *Collator2d(grid, **options)(7, draws, draws))


@pytest.mark.parametrize("options", OPTIONS)
def test_the_default_is_the_same_algorithm_on_philox_3d(options):
    grid, specs = (6, 10, 12), (Spec3d(**options), replace(SHORT_RANGE, max_keep=50))
    sampler = MultiBlock3d(grid, specs, seed=3)
    for step in range(3):
        contexts, targets = [], []
        for stream, spec in enumerate(specs):
            draws = PhiloxDraws(3, step, stream)
            context, target = Collator3d(grid, **asdict(spec), truncate=False)(4, draws, draws)
            contexts, targets = contexts + context, targets + target
        assert_same(sampler(4), contexts, targets)


def test_the_state_goes_on_wherever_torch_left_it():
    """Between any two twists, with a normal number kept, and into torch's own draws."""
    sampler, collator = MultiBlock2d(14, upstream=True), Collator2d((14, 14))
    for drawn in (0, 1, 623, 624, 625, 1000):
        torch.manual_seed(drawn)
        torch.randint(0, 9, (drawn,))
        torch.randn(1)
        before = torch.get_rng_state()
        mine = torch.Generator()
        mine.set_state(before)
        assert_same(sampler(4, step=5, generator=mine), *collator(4, seeded(5), TorchDraws()))
        assert torch.equal(torch.randn(9), torch.randn(9, generator=mine))
        torch.set_rng_state(before)
        sampler(4, step=5)
        torch.randn(9)
        assert torch.equal(torch.get_rng_state(), mine.get_state()), "None is the global generator"


def test_sizes_come_from_seed_plus_step():
    a, b = MultiBlock2d(16, upstream=True, seed=7), MultiBlock2d(16, upstream=True)
    first, second = (s(3, step=n, generator=torch.Generator()) for s, n in ((a, 2), (b, 9)))
    assert np.array_equal(first.context_ids, second.context_ids)


def test_a_generator_is_one_of_torch():
    with pytest.raises(TypeError) as error:
        MultiBlock2d(14, upstream=True)(2, generator=5)
    assert str(error.value) == (
        "MultiBlock2d: generator must be a torch.Generator of the CPU, got 5; pass torch.Generator()"
    )


def test_a_generator_needs_upstream():
    with pytest.raises(ValueError) as raised:
        MultiBlock2d(14)(2, generator=torch.Generator())
    assert str(raised.value) == (
        "MultiBlock2d: generator must be None without upstream=True, got a generator; set seed and step instead"
    )
