"""What the project asks of its own numbers: which row a target speaks of, and when it holds."""

import pytest

from benchmarks import targets, text
from tests.test_benchmarks import model_row, row


def test_targets_speak_of_the_worst_fp32_row():
    found = [row(), row(ours_s=4e-3), row(dtype="bfloat16", ours_s=9.0), model_row()]
    verdicts = {(t.name, t.workload, t.baseline): (worst, holds) for t, worst, holds in targets.check(found)}
    worst, holds = verdicts["ema_update", "vit_s16", "lerp"]
    assert worst["ratio"] == pytest.approx(0.5) and holds is False
    assert verdicts["ijepa", "vit_small_16_truncated", "reference"][1] is True
    assert verdicts["masked_attention", "ragged_1572", "loop"] == (None, None)


def test_lejepas_small_patches_are_held_to_what_was_asked():
    def holds(ratio):
        step = {"kind": "model", "name": "lejepa", "workload": "vit_tiny_16_64px", "pass": "step", "bytes": None}
        measured = row(1e-3, ratio * 1e-3, **step, baseline="recipe")
        return [found for _, worst, found in targets.check([measured]) if worst is measured]

    assert holds(1.29) == [False] and holds(1.31) == [True]


def test_targets_of_a_gpu_ask_for_a_ratio_and_a_time():
    def holds(workload, ours_s):
        measured = {**row(ours_s, 2 * ours_s), "device": "cuda", "workload": workload}
        return {t.workload: found for t, _, found in targets.check([measured]) if t.name == "ema_update"}

    others = dict.fromkeys(("vit_h14_bf16_shadow", "vit_g16", "vit_g16_bf16_shadow"))
    assert holds("vit_h14", 1.9e-3) == {"vit_h14": True, **others}
    assert holds("vit_g16_bf16_shadow", 3.6e-3)["vit_g16_bf16_shadow"] is True
    assert holds("vit_g16_bf16_shadow", 3.7e-3)["vit_g16_bf16_shadow"] is False
    assert holds("vit_h14", 2.1e-3)["vit_h14"] is False, "faster than the other, but late"


def test_whole_steps_on_a_gpu_may_take_no_more_memory_than_their_rivals():
    def holds(baseline, ours, theirs):
        step = {**model_row(), "workload": "vit_h14_b128_truncated", "device": "cuda", "dtype": "bfloat16"}
        measured = {**step, "baseline": baseline, "ratio": 2.0, "peak_bytes": ours, "baseline_peak_bytes": theirs}
        return [found for _, worst, found in targets.check([measured]) if worst is measured]

    for baseline in ("reference", "sdpa"):
        assert holds(baseline, 35, 35) == [True] and holds(baseline, 36, 35) == [False]
    asked = {(t.name, t.workload, t.least) for t in targets.ON_GPU if t.stage == "step" and t.baseline == "compile"}
    assert asked == {
        ("ijepa", "vit_h14_b128_truncated", 1.05),
        ("ijepa", "vit_h14_b128_packed", 1.3),
        ("vjepa2", "vit_l_b24_truncated", 1.3),
        ("vjepa2", "vit_l_b24_packed_per_token", 1.3),
    }


def test_a_target_of_memory_asks_for_a_share_of_the_baselines():
    asked = targets.Target("ema_update", "vit_s16", "forward", "lerp", 1.0, "lerp", most_memory=0.05)
    assert asked.holds(row(peak_bytes=50, baseline_peak_bytes=1000))
    assert not asked.holds(row(peak_bytes=51, baseline_peak_bytes=1000)), "more than a share"
    assert not asked.holds(row(4e-3, peak_bytes=50, baseline_peak_bytes=1000)), "little memory, but slow"
    assert not asked.holds(row(peak_bytes=50)), "not measured"
    assert text.asked(asked) == "1 x, 5 % memory"


def test_a_target_of_the_peak_asks_for_a_share_of_it():
    asked = targets.Target("ema_update", "vit_s16", "forward", "lerp", 1.0, "lerp", least_share=0.85)
    assert asked.holds(row(share_of_peak=0.85)) and not asked.holds(row(share_of_peak=0.84))
    assert not asked.holds(row(share_of_peak=None)), "not measured"
    assert not asked.holds(row(4e-3, share_of_peak=0.9)), "near the peak, but slow"
    assert text.asked(asked) == "1 x, 85 % of the peak"
    assert text.reached(asked, row(share_of_peak=0.84)) == "2.00 x, 84 %"


def test_a_row_that_misses_what_is_asked_goes_before_one_of_a_smaller_ratio():
    quick, near = row(1e-3, 3e-3, share_of_peak=0.5), row(1e-3, 1.5e-3, share_of_peak=0.9)
    both = [{**r, "workload": "vit_b16"} for r in (quick, near)]
    found = {(t.workload, t.baseline): (worst, holds) for t, worst, holds in targets.check(both)}
    assert found["vit_b16", "lerp"] == (both[0], False)


def test_a_table_is_held_to_its_own_time():
    asked = targets.Target("ema_update", "tiny_1000", "forward", "table", 0.0, "", most_us=400, timed="baseline_us")
    assert asked.holds(row(1e-3, 0.4e-3)) and not asked.holds(row(1e-3, 0.41e-3))
    assert text.asked(asked) == "400 us" and text.reached(asked, row(1e-3, 0.4e-3)) == "400 us"
