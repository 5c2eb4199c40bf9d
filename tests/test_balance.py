"""Which part takes which images: as many each, as much to do for each, the same on every process."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import balance as simulation
from benchmarks import tables
from jepa_kernels.masks import MaskBatch
from jepa_kernels.training import balance


def work(width, depth, ratio, *lengths):
    return sum(depth * (2 * (4 + 2 * ratio) * width**2 * n + 4 * width * n**2) for n in lengths)


def test_costs_are_the_work_of_both_networks():
    sizes = SimpleNamespace(embed_dim=10, depth=3, mlp_ratio=2.5, predictor_embed_dim=4, predictor_depth=2)
    none = np.empty(0, dtype=np.int64)
    photos = MaskBatch(2, none, np.array([5, 7]), none, np.array([1, 2, 3, 4]))  # one context, two targets an image
    assert balance.costs(photos, sizes).tolist() == [
        work(10, 3, 2.5, 5) + work(4, 2, 4, 5 + 1, 5 + 3),
        work(10, 3, 2.5, 7) + work(4, 2, 4, 7 + 2, 7 + 4),
    ]
    assert simulation.tokens(photos).tolist() == [5 + 6 + 8, 7 + 9 + 11]
    clips = MaskBatch(2, none, np.array([5, 7, 1, 2]), none, np.array([3, 1, 7, 6]))  # two contexts a clip
    assert balance.costs(clips, sizes).tolist() == [
        work(10, 3, 2.5, 5, 1) + work(4, 2, 4, 5 + 3, 1 + 7),
        work(10, 3, 2.5, 7, 2) + work(4, 2, 4, 7 + 1, 2 + 6),
    ]
    assert simulation.tokens(clips).tolist() == [5 + 1 + 8 + 8, 7 + 2 + 8 + 8]


def test_the_most_costly_go_first_to_the_part_with_the_least_that_has_room():
    assert balance.in_order(6, 2).tolist() == [[0, 1, 2], [3, 4, 5]]
    # 9 to part 0, 8 to part 1, 7 to part 1 (8 < 9), 3 to part 0, 2 to part 0 (12 < 15), which is full; 1 to part 1.
    assert balance.balanced(np.array([1, 9, 7, 2, 8, 3]), 2).tolist() == [[1, 3, 5], [0, 2, 4]]
    assert balance.balanced(np.array([4, 4, 4, 4]), 2).tolist() == [[0, 2], [1, 3]]  # ties in order
    # 10 to part 0, then 1, 1, 1 to part 1, which has least, up to its room; what is left goes to part 0.
    assert balance.balanced(np.array([10, 1, 1, 1, 1, 1]), 2).tolist() == [[0, 4, 5], [1, 2, 3]]
    assert balance.balanced(np.array([3, 1, 2]), 1).tolist() == [[0, 1, 2]]
    with pytest.raises(ValueError, match=r"^balance: costs must be a multiple of 2 in number, got 3; use another"):
        balance.balanced(np.array([1, 2, 3]), 2)


@pytest.mark.parametrize("run", simulation.RUNS[:2], ids=lambda run: run.name)
def test_parts_of_sampled_masks_wait_for_each_other_far_less(run):
    before, after = [], []
    for step in range(4):
        costs = balance.costs(run.sampler(16 * 12, step=step), run.model)
        found = balance.balanced(costs, 16)
        assert found.shape == (16, 12) and np.array_equal(np.sort(found.ravel()), np.arange(16 * 12))
        assert np.array_equal(found, balance.balanced(balance.costs(run.sampler(16 * 12, step=step), run.model), 16))
        assert (np.diff(found, axis=1) > 0).all()
        before.append(simulation.idle(costs.reshape(16, 12).sum(1)))
        after.append(simulation.idle(costs[found].sum(1)))
    assert np.mean(before) > 0.01 and np.mean(after) < 0.1 * np.mean(before)


def test_the_simulation_counts_what_is_waited_for():
    assert simulation.idle(np.array([3.0, 4.0, 1.0])) == pytest.approx(1 - (8 / 3) / 4)
    run = replace(simulation.RUNS[0], each=4)
    found = simulation.one_step(run, 0, ranks=8)
    masks = run.sampler(32, step=0)
    loads = simulation.tokens(masks).reshape(8, 4).sum(1)
    flops = [run.flops(run.model, masks.part(part, 8)) for part in balance.in_order(32, 8)]
    assert found[0, 0] == simulation.idle(loads)
    assert found[1, 0] == pytest.approx(simulation.idle(np.array(flops)), rel=1e-9)  # a part's are its images'
    assert (found[:, 1:] < found[:, :1]).all()


def test_intervals_hold_95_percent_of_what_was_drawn():
    assert simulation._estimate(0.5, np.linspace(0, 1, 201)) == {"mean": 0.5, "ci95": pytest.approx([0.025, 0.975])}


def test_its_table_shows_the_committed_numbers():
    one = {"mean": 0.04, "ci95": [0.03, 0.05]}
    row = {"name": "A", "each": 4, "ranks": 8, "steps": 9, "unit": "tokens", "in_order": one, "balanced": one}
    document = {"commit": "0123456789abcdef", "rows": [{**row, "balanced_by_tokens": one, "cut": one}]}
    assert "| A | 4 | tokens | 4.00% (3.00% to 5.00%) | 4.00% (3.00% to 5.00%) | **-4.0%** (3.0% to 5.0%) |" in (
        tables.balance(document)
    )
