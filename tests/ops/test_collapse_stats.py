"""collapse_stats: values by hand, what each number sees, and messages."""

import math

import pytest
import torch

import jepa_kernels as jk

TRITON = pytest.param("triton", marks=pytest.mark.interp)


@pytest.fixture(params=["reference", "cpu", TRITON])
def backend(request):
    return request.param


def numbers(z, backend=None):
    return [float(x) for x in jk.collapse_stats(z, backend=backend)]


def test_four_rows_by_hand(backend):
    # deviations: 1 and 3 of two uncorrelated features: eigenvalues 1 and 9; rows (+-1, +-3) in opposite pairs
    z = torch.tensor([[1.0, 3.0], [1.0, -3.0], [-1.0, 3.0], [-1.0, -3.0]])
    assert numbers(z, backend) == pytest.approx([2.0, 1.0, 100 / 82, -1 / 3], rel=1e-6)
    stats = jk.collapse_stats(z, backend=backend)
    assert all(x.dtype == torch.float32 and x.shape == () for x in stats)
    assert stats._fields == ("std", "min_std", "rank", "cosine")


def test_equal_rows_have_no_spread_no_rank_and_one_direction(backend):
    z = (torch.randn(24) * 100 + 7).repeat(50, 1)
    std, min_std, rank, cosine = numbers(z, backend)
    assert (std, min_std, rank) == (0.0, 0.0, 0.0) and cosine == pytest.approx(1.0, abs=1e-6)


def test_independent_features_fill_the_space(backend):
    std, min_std, rank, cosine = numbers(torch.randn(3000, 16), backend)
    assert std == pytest.approx(1.0, abs=0.03) and min_std > 0.9 and 15 < rank <= 16 and abs(cosine) < 0.01


def test_one_direction_has_rank_one(backend):
    std, _, rank, _ = numbers(torch.randn(200, 1) * torch.randn(32), backend)
    assert std > 0.3 and rank == pytest.approx(1.0, abs=1e-5)


def test_a_dead_feature_shows_in_the_least_std_alone(backend):
    z = torch.randn(100, 20)
    z[:, 7] = 3.0
    std, min_std, *_ = numbers(z, backend)
    assert min_std == 0.0 and std > 0.8


def test_spread_far_from_zero_keeps_its_digits(backend):
    z = torch.randn(500, 8)
    moved = z + 4096.0
    found, exact = numbers(moved, backend), numbers(moved.double(), "reference")
    assert found[:3] == pytest.approx(exact[:3], rel=1e-5)


def test_rows_of_all_leading_dimensions_count_alike(backend):
    z = torch.randn(4, 5, 6, 12)
    assert numbers(z, backend) == numbers(z.flatten(0, 2), backend)


def test_rank_is_taken_from_1024_rows_evenly_spaced(backend):
    z = torch.randn(3000, 4)
    chosen = z[torch.arange(1024) * 3000 // 1024]
    assert numbers(z, backend)[2] == numbers(chosen, backend)[2]


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (2, 0, 4)])
def test_no_rows_or_no_features_give_zeros(backend, shape):
    assert numbers(torch.zeros(shape), backend) == [0.0] * 4


def test_one_row_gives_zeros(backend):
    assert numbers(torch.randn(1, 9), backend) == [0.0] * 4


@pytest.mark.parametrize("rows, row", [(6, 0), (6, 3), (2000, 1)])  # of 2000 rows, the rank leaves out the second
def test_nan_reaches_every_number(backend, rows, row):
    z = torch.randn(rows, 5)
    z[row, 2] = math.nan
    assert all(math.isnan(x) for x in numbers(z, backend))


@pytest.mark.parametrize("size", [1e-36, 1e-24, 1e18, 1e30])
def test_rank_of_tiny_and_huge_spreads(backend, size):
    z = torch.randn(200, 12)
    assert numbers(z * size, backend)[2] == pytest.approx(numbers(z, backend)[2], rel=1e-5)


def test_no_gradient_and_nothing_lowered_under_autocast(backend):
    z = torch.randn(70, 40, requires_grad=True)
    plain = numbers(z.detach(), backend)
    with torch.autocast("cpu", torch.bfloat16):
        found = jk.collapse_stats(z, backend=backend)
    assert not any(x.requires_grad for x in found) and [float(x) for x in found] == plain


@pytest.mark.parametrize(
    "z, error, message",
    [
        (1.0, TypeError, r"collapse_stats: z must be a tensor, got float; .+"),
        (torch.zeros(3), ValueError, r"collapse_stats: z must have shape \[N, E\], got \(3,\); .+"),
        (torch.zeros(3, 2, dtype=torch.int64), TypeError, r"collapse_stats: z must be of dtype .+, got int64; .+"),
    ],
)
def test_messages(z, error, message):
    with pytest.raises(error, match=message):
        jk.collapse_stats(z)
