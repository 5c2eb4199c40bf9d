"""Each target of `make ci` says what a Python that has torch lacks, before it runs anything with it; each test runs."""

import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tests import __main__ as runner

ROOT = Path(__file__).parents[1]
STAGES = re.search(r"^STAGES = (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
NEEDS = {"lint": "mypy", "docs": "mkdocs", "smoke": "pytest_benchmark", "test": "yaml", "floors": "pytest"}


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A Python with torch and nothing else."""
    folder = tmp_path_factory.mktemp("bare")
    (folder / "torch.py").touch()
    (folder / "python").write_text(f'#!/bin/sh\nPYTHONPATH={folder} exec {sys.executable} -S "$@"\n')
    (folder / "python").chmod(0o755)
    return folder / "python"


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_names_the_modules_that_are_not_there(stage, bare):
    done = subprocess.run(["make", stage, f"PY={bare}"], cwd=ROOT, capture_output=True, text=True)
    said = f"make: {bare} must have the modules that this target needs, got no setuptools, pybind11"
    assert done.returncode == 2 and said in done.stderr, done.stdout + done.stderr
    assert NEEDS.get(stage, "setuptools") in re.findall(r"\w+", done.stderr.split("got no ")[1])


@pytest.mark.parametrize("marker", [runner.PLAIN, runner.COMPILE])
def test_each_file_is_of_one_of_two_processes_of_a_kind(marker):
    left_out = [more for kind, _, more in runner.STAGES.values() if kind == marker]
    assert len(left_out) == 2
    for path in (ROOT / "tests").rglob("test_*.py"):
        takes = [not any(fnmatch(path, option.split("=")[1]) for option in more) for more in left_out]
        assert sorted(takes) == [False, True], path
