"""The README's tables: written from committed results, and which results may be committed."""

import json

from benchmarks import readme, targets
from tests.test_benchmarks import document, model_row, row


def test_readme_shows_the_committed_results():
    page = readme.README.read_text()
    assert page == readme.insert(page, readme.tables())
    assert "x** |" in page and "| trained minus random, paired |" in page, "both kinds of results are committed"


PROBE_SCORES = {
    name: {"mean": mean, "ci95": [mean - 0.02, mean + 0.02]}
    for name, mean in (("trained", 0.6), ("random_init", 0.4), ("raw_pixels", 0.3), ("trained_minus_random_init", 0.2))
}
PROBE = {
    "probes": [{"question": question, "chance": 0.05, "seeds": 5, "per_seed": 400, "knn": PROBE_SCORES,
                "linear": PROBE_SCORES} for question in ("Which one?", "Which way?")],
    "step": 1000, "seconds": 200.0, "commit": "0123456789abcdef", "config": {"architecture": "vjepa2"},
    "machine": {"cpu": "A Processor", "threads": 2, "torch": "2.13.0"},
}  # fmt: skip


ANSWERS = {
    **PROBE, "config": {"architecture": "vl_jepa"},
    "probes": [{"question": "Which answer?", "chance": 1 / 18, "score": "recall@1", "held out": {
        "trained": {"mean": 0.4, "ci95": [0.37, 0.43]}, "linear_map": {"mean": 0.1, "ci95": [0.08, 0.12]}}}],
}  # fmt: skip


PLAN = {
    "problem": "pusht", "complete": True, "actions": 20, "seed": 1, "seconds": 300.0, "commit": "0123456789abcdef",
    "machine": PROBE["machine"],
    "summary": {
        name: {"median_distance": end, "ci95": [end - 9, end + 9], "ratio_to_random": end / 120, "ratio_ci95": [0.3, 1]}
        for name, end in (("random", 120.0), ("cem", 54.0))
    },
    "episodes": [{"policies": {name: {"total": [148.0, end]} for name, end in (("random", 120.0), ("cem", 54.0))}}] * 2,
}  # fmt: skip


def every_target():
    """A row for each of targets.TARGETS."""
    for t in targets.TARGETS:
        made = model_row() if t.name == "ijepa" else row()
        yield {
            **made,
            "name": t.name,
            "workload": t.workload,
            "pass": t.stage,
            "baseline": t.baseline,
            "dtype": t.dtype,
            "peak_bytes": 30,
            "baseline_peak_bytes": 1000,
        }


def test_adopted_results_are_trimmed_and_tabulated(tmp_path):
    run, training, results = tmp_path / "latest.json", tmp_path / "probe.json", tmp_path / "results"
    run.write_text(json.dumps(document(*every_target(), command="python -m benchmarks --out /somewhere")))
    training.write_text(json.dumps(PROBE))
    path = readme.adopt(run, results)
    assert (
        path.name == "a-processor-avx2-2-threads.json" and readme.adopt(training, results).name == "vjepa2-probe.json"
    )
    kept = json.loads(path.read_text())
    assert "command" not in kept and not {"host", "env"} & {*kept["machine"]} and "branch" not in kept["git"]
    tables = readme.tables(results)
    assert "| `ema_update` | vit_s16, forward | 1 ms | _foreach_lerp_ | 2 ms | **2.00 x** | 2.00 to 2.00 |" in tables
    assert "ijepa vit_small_16_truncated: 1 ms a step, batch 4, 2.00 x against reference; 500 tokens/s" in tables
    assert "| the eager chain, eight views of 64 images; 3 % of its memory | 2 ms |" in tables
    assert tables.count("| raw pixels | 0.300 (0.280 to 0.320) | 0.300 (0.280 to 0.320) |") == 2
    assert "| V-JEPA 2, trained | 0.600 (" in tables and "Which way? Chance: 0.050; 5 seeds of 400:" in tables
    assert tables.count("commit 0123456789") == 2


def test_an_adopted_plan_keeps_where_episodes_ended(tmp_path):
    run = tmp_path / "plan.json"
    run.write_text(json.dumps(PLAN))
    path = readme.adopt(run, tmp_path / "results")
    kept = json.loads(path.read_text())
    assert path.name == "pusht-plan.json" and "episodes" not in kept
    assert kept["final_distances"] == {"random": [120.0, 120.0], "cem": [54.0, 54.0]}
    tables = readme.tables(tmp_path / "results")
    assert "plan --seed 1 --episodes 2`: held-out starts and goals, 20 actions each, in 300 s (A Processor" in tables
    assert "| CEM, world model | 54 (45 to 63) | 0.45 (0.30 to 1.00) |" in tables


def test_only_complete_runs_are_adopted(tmp_path, capsys):
    run = tmp_path / "latest.json"
    for spoilt, why in (
        (document(*every_target(), status="partial"), "status is 'partial', not 'ok'"),
        (document(row()), "ema_update against the published per-parameter loop was not measured"),
        ({**PROBE, "config": None}, "the README can't show it, TypeError"),
        ({**PROBE, "config": {"architecture": "ajepa"}}, "the README can't show it, KeyError('ajepa')"),
        ({name: PROBE[name] for name in PROBE if name != "config"}, "the README can't show it, KeyError('config')"),
        ({**PLAN, "complete": False}, "it was interrupted"),
        ({**PLAN, "summary": {"cem": PLAN["summary"]["cem"]}}, "the README can't show it, KeyError('random')"),
    ):
        run.write_text(json.dumps(spoilt))
        assert readme.main(["--adopt", str(run)]) == 1
        assert why in capsys.readouterr().err


def test_answers_are_shown_beside_what_they_are_held_against(tmp_path):
    run, results = tmp_path / "probe.json", tmp_path / "results"
    run.write_text(json.dumps(ANSWERS))
    assert readme.adopt(run, results).name == "vl_jepa-probe.json"
    page = readme.tables(results)
    assert "`python -m jepa_kernels train vl_jepa`: 1000 steps" in page
    assert "Which answer? Chance: 0.056; recall@1:" in page and "|  | held out |" in page
    assert "| VL-JEPA, trained | 0.400 (0.370 to 0.430) |" in page
    assert "| linear map | 0.100 (0.080 to 0.120) |" in page
