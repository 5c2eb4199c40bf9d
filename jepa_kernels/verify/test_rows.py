"""`pytest --pyargs jepa_kernels.verify`: a test for each op x backend x dtype x case; missing hardware is skipped."""

from typing import Any

from jepa_kernels._core.case import Case
from jepa_kernels.verify.rows import Row, prepare, rows, run_case, title

prepare()


def pytest_generate_tests(metafunc: Any) -> None:
    """One parameter per case; a row that can't run here is one test, skipped."""
    runs = [(row, case) for row in rows() for case in (row.cases if row.reason is None else [None])]
    names = [f"{title(row)}-{case.name if case else 'unavailable'}" for row, case in runs]
    metafunc.parametrize("row, case", runs, ids=names)


def test_case_is_within_the_budget_and_exact(row: Row, case: Case | None) -> None:
    """The error budget, and what is exact."""
    import pytest  # not needed to verify without it

    if case is None:
        pytest.skip(f"{row.backend} on {row.device}: {row.reason}")
    result = run_case(row, case)
    assert not result.problems, "\n".join(result.problems)
    if result.refused is not None:
        pytest.skip(result.refused)
