"""The page of a run: made from the log alone, one file, every curve, marks where they belong."""

import json
import math
import re

import pytest

from jepa_kernels.training import log as training_log
from jepa_kernels.training import page

RUN = {
    "config": {"architecture": "ijepa", "model": {"depth": 4}, "mask": None, "optimization": {"steps": 100}, "seed": 3},
    "machine": {"cpu": "A <Processor>", "threads": 2, "torch": "2.13.0"},
    "world": 2, "peak_flops": 2e11, "commit": "0123456789abcdef",
}  # fmt: skip


def row(step, **changes):
    return {
        "step": step, "loss": 1 / step, "std": 0.5, "rank": 3.0, "grad_norm": 1.0, "skipped": 0.0, "lr": 1e-3,
        "step_s": 0.5, "data_wait_s": 0.1, "tokens_per_s": 1000.0 * step, "share_of_peak": 0.2, **changes,
    }  # fmt: skip


def log(folder, rows):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


ROWS = [row(1, run=RUN), row(2), row(3, skipped=1.0, loss=math.nan, grad_norm=math.inf), row(4, run=RUN), row(5)]


def test_a_page_is_one_file_of_the_log_alone(tmp_path, capsys):
    out = log(tmp_path / "my run", ROWS)
    assert page.main([str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out / "run.html")
    text = (out / "run.html").read_text()
    assert not re.search(r"(src|href)=|https?://|@import|url\(", text), "nothing is fetched"
    known = {"loss", "std", "rank", "grad_norm", "lr", "tokens_per_s", "share_of_peak", "step_s", "data_wait_s"}
    assert set(re.findall(r'<figure id="(\w+)"', text)) == known
    assert text.count('<line class="resumed"') == text.count('<line class="skipped"') == len(known)
    for said in ("5 of 100", "A &lt;Processor&gt;", "0123456789<", "ijepa", "depth", "my run", "the run was resumed"):
        assert said in text, said
    assert "Probes" not in text


def test_probes_beside_the_log_are_shown(tmp_path):
    out = log(tmp_path / "run", [row(1)])
    scores = {"trained": {"mean": 0.25, "ci95": [0.2, 0.3]}}
    (out / "probe.json").write_text(json.dumps({"probes": [{"question": "Which?", "chance": 0.05, "knn": scores}]}))
    text = page.write(out).read_text()
    assert "Which?" in text and "0.200 to 0.300" in text and "chance: 0.050" in text


def test_curves_lie_where_the_numbers_are():
    found = page.chart("loss", "loss", [row(1, loss=1.0), row(11, loss=0.0)], [6], [11])
    left, right = page.LEFT, page.WIDTH - page.RIGHT
    top = page.TOP + (page.HEIGHT - page.BOTTOM - page.TOP) * 0.06 / 1.06
    first, second = (tuple(map(float, point.split(","))) for point in found["line"].split())
    assert first == pytest.approx((left, top), abs=0.1) and second == pytest.approx((right, page.HEIGHT - page.BOTTOM))
    assert found["resumed"] == [(left + right) / 2] and found["skipped"] == [right]
    assert found["last"] == "0" and ("0.5" in [text for _, text in found["y"]])


@pytest.mark.parametrize("rows", [[row(1, loss=0.0)], [row(7, loss=-2.0)], [row(1, loss=5.0), row(2, loss=5.0)]])
def test_a_single_value_has_a_chart(rows):
    found = page.chart("loss", "loss", rows, [], [])
    places = [float(x) for point in found["line"].split() for x in point.split(",")]
    assert all(0 <= place <= page.WIDTH for place in places) and len(found["y"]) >= 2


def test_long_curves_keep_their_extremes_in_order():
    points = [(n, 50.0 if n == 7777 else -50.0 if n == 7778 else math.sin(n)) for n in range(100_000)]
    kept = page.thinned(points)
    assert len(kept) <= page.POINTS and {(7777, 50.0), (7778, -50.0)} <= set(kept) and kept == sorted(kept)
    assert page.thinned(points[:400]) == points[:400]


@pytest.mark.parametrize(
    "value, text",
    [
        (0.0, "0"),
        (0.35, "0.35"),
        (1.2e-5, "1.2e-05"),
        (250.0, "250"),
        (12345.0, "12.35k"),
        (3.4e6, "3.4M"),
        (2e11, "200G"),
    ],
)
def test_labels_are_short(value, text):
    assert page.label(value) == text


def test_a_torn_last_row_is_left_out(tmp_path):
    out = log(tmp_path / "run", ROWS)
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')
    assert len(page.read(out / "metrics.jsonl")) == 5


def test_numbers_that_json_lacks_are_null_in_the_log(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    with open(metrics, "ab", buffering=0) as file:
        training_log._append(file, row(1, loss=math.nan, grad_norm=math.inf))
    strict = json.loads(metrics.read_text(), parse_constant=pytest.fail)
    assert strict["loss"] is strict["grad_norm"] is None and strict["step"] == 1
    assert math.isnan(page.read(metrics)[0]["loss"])


def test_what_is_no_run_is_refused(tmp_path, capsys):
    assert page.main([str(tmp_path)]) == page.main([]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first == (
        f"page: OUT must be the folder of a training run, got no {tmp_path / 'metrics.jsonl'}; "
        "pass what train had as --out"
    )
    assert second == "page: arguments must be one folder, got none; pass the --out of a training run"
    for text in ("", '{"step": 1, "lo'):
        (log(tmp_path / "run", []) / "metrics.jsonl").write_text(text)
        assert page.write(tmp_path / "run") is None and page.main([str(tmp_path / "run")]) == 2
        assert capsys.readouterr().err.endswith("metrics.jsonl must hold a step, got none; let the run take one\n")
    assert not (tmp_path / "run/run.html").exists()


def test_medians_are_of_the_rows_that_have_the_measure():
    rows = [row(n) for n in (1, 2, 3)] + [{"step": 4, "loss": 0.5}]
    assert dict(page.facts(rows, {}, 0, 0))["tokens / s, median"] == "2000"
    assert "tokens / s, median" not in dict(page.facts(rows[3:], {}, 0, 0))
