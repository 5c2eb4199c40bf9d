"""What is made from committed results (README's section, the page of all tables, pictures); which may be committed."""

import json
import re

import pytest

from benchmarks import headlines, pictures, readme, tables, targets
from benchmarks.adopt import adopt
from tests.test_benchmarks import document, model_row, row


@pytest.fixture(scope="module")
def files():
    return readme.written()


def test_all_that_is_made_from_results_is_as_committed(files):
    assert readme.stale(files) == []
    assert "x** (" in files[readme.README] and "`train ijepa` (I-JEPA)" in files[readme.README]
    page = files[readme.PAGE]
    assert "x** |" in page and "| trained minus random, paired |" in page, "both kinds of results are committed"


def test_the_readme_links_to_what_the_page_has(files):
    section = files[readme.README].split(readme.BEGIN)[1].split(readme.END)[0]
    titles = re.findall(r"^## (.+)$", files[readme.PAGE], re.MULTILINE)
    anchors = re.findall(r"docs/measured\.md#([\w-]+)", section)
    assert len(anchors) >= 5 and set(anchors) <= {t.lower().replace(" ", "-") for t in titles}
    shown = re.findall(r"\((?:docs/)?(measured/.+?\.svg)\)", section + files[readme.PAGE])
    assert {readme.PICTURES.parent / name for name in shown} == {f for f in files if f.suffix == ".svg"}


def test_what_is_out_of_date_is_named_and_written_again(files, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    monkeypatch.setattr(readme, "PICTURES", tmp_path / "measured")
    for path in (old := tmp_path / "old.md", gone := tmp_path / "measured" / "gone.svg"):
        path.parent.mkdir(exist_ok=True)
        path.write_text("old")
    monkeypatch.setattr(readme, "written", lambda: {old: "new"})
    assert readme.main(["--check"]) == 1 and old.read_text() == "old" and gone.exists()
    assert capsys.readouterr().out == "".join(
        f"{name}: out of date; run make results\n" for name in ("old.md", "measured/gone.svg")
    )
    assert readme.main([]) == 0 and old.read_text() == "new" and not gone.exists()
    assert readme.main(["--check"]) == 0


def test_a_headline_is_a_target_and_every_name_has_one():
    asked = {(t.name, t.workload, t.stage, t.baseline) for t in targets.TARGETS}
    assert set(headlines.HEADLINES) <= asked
    assert {name for name, *_ in headlines.HEADLINES} == {t.name for t in targets.TARGETS}


def test_a_picture_of_other_numbers_is_another_whatever_drew_it():
    def drawn(ours_s, version):
        found = document(row(ours_s))
        return re.sub(r"Matplotlib v[\d.]+", f"Matplotlib v{version}", pictures.draw({"a": found})["a"])

    mine = drawn(1e-3, "3.9")
    assert mine == drawn(1e-3, "3.9") and "2025" not in mine
    assert pictures.same(mine, drawn(1e-3, "4.0").replace("miter", "bevel")), "drawn by another version"
    assert not pictures.same(mine, mine.replace("miter", "bevel")), "by the same version"
    assert not pictures.same(mine, drawn(1.1e-3, "4.0")), "of another number"


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
    path = adopt(run, results)
    assert path.name == "a-processor-avx2-2-threads.json" and adopt(training, results).name == "vjepa2-probe.json"
    kept = json.loads(path.read_text())
    assert "command" not in kept and not {"host", "env"} & {*kept["machine"]} and "branch" not in kept["git"]
    page = readme.page(tables.load(results))
    assert "| `ema_update` | vit_s16, forward | 1 ms | _foreach_lerp_ | 2 ms | **2.00 x** | 2.00 to 2.00 |" in page
    assert "ijepa vit_small_16_truncated: 1 ms a step, batch 4, 2.00 x against reference; 500 tokens/s" in page
    assert "| the eager chain, eight views of 64 images; 3 % of its memory | 2 ms |" in page
    assert page.count("| raw pixels | 0.300 (0.280 to 0.320) | 0.300 (0.280 to 0.320) |") == 2
    assert "| V-JEPA 2, trained | 0.600 (" in page and "Which way? Chance: 0.050; 5 seeds of 400:" in page
    assert page.count("commit 0123456789") == 2
    section = headlines.section(tables.load(results))
    assert "softmax written out; step | **2.00 x** (2.00 to 2.00), 1 ms, 500 tokens/s |" in section
    assert "| 0.200 (0.180 to 0.220) | 0.300 (0.280 to 0.320) |" in section, "raw pixels stand beside them"


def test_an_adopted_plan_keeps_where_episodes_ended(tmp_path):
    run = tmp_path / "plan.json"
    run.write_text(json.dumps(PLAN))
    path = adopt(run, tmp_path / "results")
    kept = json.loads(path.read_text())
    assert path.name == "pusht-plan.json" and "episodes" not in kept
    assert kept["final_distances"] == {"random": [120.0, 120.0], "cem": [54.0, 54.0]}
    page = readme.page(tables.load(tmp_path / "results"))
    assert "plan --seed 1 --episodes 2`: held-out starts and goals, 20 actions each, in 300 s (A Processor" in page
    assert "| CEM, world model | 54 (45 to 63) | 0.45 (0.30 to 1.00) |" in page


def test_only_complete_runs_are_adopted(tmp_path, capsys):
    run = tmp_path / "latest.json"
    for spoilt, why in (
        (document(*every_target(), status="partial"), "status is 'partial', not 'ok'"),
        (document(*every_target(), selection="brief"), "it has the brief selection alone; run make bench FULL=1"),
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
    assert adopt(run, results).name == "vl_jepa-probe.json"
    page = readme.page(tables.load(results))
    assert "`python -m jepa_kernels train vl_jepa`: 1000 steps" in page
    assert "Which answer? Chance: 0.056; recall@1:" in page and "|  | held out |" in page
    assert "| VL-JEPA, trained | 0.400 (0.370 to 0.430) |" in page
    assert "| linear map | 0.100 (0.080 to 0.120) |" in page
