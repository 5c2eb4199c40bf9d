"""Which runs `python -m benchmarks` measures, and what it says of names that it does not know."""

import pytest

from benchmarks import __main__ as front
from benchmarks import targets
from benchmarks.measure import Run, Settings
from benchmarks.selection import ALSO, Selection, brief
from jepa_kernels.ops import OPS
from tests.test_benchmarks import PEAKS, document, rows, small

RUNS = [f"{op}/{workload}/{stage}/{dtype}" for op, workload in (("rope", "clip"), ("rope", "image"), ("sigreg", "clip"))
        for stage in ("forward", "backward") for dtype in ("float32", "bfloat16")]  # fmt: skip


@pytest.mark.parametrize(
    "selection, count",
    [
        (Selection(), 12),
        (Selection(op=["rope"]), 8),
        (Selection(op=["rope", "sigreg"], dtype=["float32"]), 6),
        (Selection(op=["rope"], workload=["clip"], dtype=["bfloat16"]), 2),
        (Selection(rows=["rope/clip", "sigreg/clip/forward/float32/compile"]), 5),
        (Selection(rows=["rope"], workload=["image"]), 4),
    ],
)
def test_names_of_a_field_add_up_and_fields_narrow(selection, count):
    assert len([run for run in RUNS if selection.takes(run)]) == count
    assert selection.problem(RUNS) is None and bool(selection) == (count < len(RUNS))


@pytest.mark.parametrize(
    "selection, why",
    [
        (Selection(op=["rope", "rop"]), "--op must name what is measured here, got 'rop'; nearest: rope"),
        (Selection(workload=["clips"]), "--workload must name what is measured here, got 'clips'; nearest: clip"),
        (Selection(dtype=["bf16"]), "--dtype must name what is measured here, got 'bf16'; nearest: bfloat16"),
        (Selection(dtype=["xyz"]), "got 'xyz'; one of bfloat16, float32"),
        (
            Selection(rows=["rope/clp/forward"]),
            "begin with a run that is measured here, got 'rope/clp/forward'; nearest",
        ),
        (Selection(op=["sigreg"], workload=["image"]), "must choose at least one run, got none"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(selection, why):
    assert why in selection.problem(RUNS)


@pytest.mark.parametrize(
    "words, named",
    [
        ([], "brief"),
        (["--budget", "1"], "brief"),
        (["--full"], "full"),
        (["--smoke"], "smoke"),
        (["--device", "cuda"], "full"),
        (["--op", "rope"], "chosen"),
        (["--smoke", "--row", "rope"], "chosen"),
        (["--backend", "cpu"], "chosen"),
        (["--full", "benchmarks/masks"], "chosen"),
    ],
)
def test_a_result_says_which_runs_it_is_of(words, named):
    args = front.parse(words)
    assert front.selection(args) == named
    assert ("--brief" in front.command(args)) == (named == "brief")


def test_the_brief_selection_has_every_op_and_the_steps_of_two_models():
    runs = ["/".join((t.name, t.workload, t.stage, t.dtype)) for t in targets.TARGETS]
    assert {run.split("/")[0] for run in runs if brief(run)} == {*OPS, "masks", "encoder", "ijepa", "vjepa2"}
    assert brief("ijepa/vit_small_16_packed/step/float32") and brief("vjepa2/vit_l_4_layers_truncated/step/float32")
    assert not brief("huggingface/vjepa2_vit_l_4_layers/backward/float32"), "a minute"
    assert not brief("latent_loss/ijepa_vit_h14_b128/backward/bfloat16")
    for name, workload, stage, dtype in (run.split("/") for run in ALSO):
        at = name, stage, dtype
        assert any((t.name, t.stage, t.dtype) == at and workload.startswith(t.workload) for t in targets.TARGETS)


def test_a_refusal_ends_with_2_and_writes_nothing(tmp_path, capsys):
    paths = ["benchmarks/ops/bench_gather_tokens.py", "--out", str(tmp_path)]
    assert front.main(["--op", "gather_tokens", "--backend", "cpuu", *paths]) == 2
    assert "bench: --backend must name a backend of ours, got 'cpuu'; nearest: cpu" in capsys.readouterr().err
    assert not (tmp_path / "latest.json").exists()


def test_what_leaves_nothing_to_measure_is_refused(tmp_path, capsys):
    words = ["--smoke", "--dtype", "bfloat16", "--backend", "cpu", "benchmarks/ops/bench_gather_tokens.py"]
    assert front.main([*words, "--out", str(tmp_path)]) == 2
    given = "--dtype, --smoke, --backend, --device cpu"
    said = f"bench: {given} must leave at least one run to measure, got none; leave one of them out\n"
    assert capsys.readouterr().err == said and not (tmp_path / "latest.json").exists()


def test_a_backend_that_can_not_run_is_a_failed_row_with_the_reason():
    settings = Settings(budget_s=0.0, min_rounds=3, peaks=PEAKS, backend="cpu")
    (found,) = Run("gather_tokens", small(), "forward", "float32", settings).rows()
    assert (found["backend"], found["status"]) == ("cpu", "ok") and found["repro"].endswith(" --backend cpu")
    settings = Settings(peaks=PEAKS, backend="sdpa")
    (found,) = Run("gather_tokens", small(), "forward", "float32", settings).rows()
    assert found["status"] == "failed" and "gather_tokens has no sdpa kernel" in found["error"]
    assert rows.problems(document(found)) == []


def test_a_missing_package_is_named_with_the_extra(monkeypatch, capsys):
    real = front.importlib.util.find_spec
    monkeypatch.setattr(
        front.importlib.util, "find_spec", lambda name: None if name == "pytest_benchmark" else real(name)
    )
    assert front.main([]) == 2
    said = capsys.readouterr().err
    assert said == "bench: pytest_benchmark must be installed, got none; pip install 'jepa_kernels[bench]'\n"
