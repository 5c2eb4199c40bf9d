"""The report for bug reports: what a maintainer needs, nothing that tells who ran it."""

import getpass
import json
import platform
import re
from pathlib import Path

import numpy
import pytest
import safetensors
import torch

import jepa_kernels as jk
from jepa_kernels import _C
from jepa_kernels._core import extension
from jepa_kernels.about import _files_alone, text


def test_the_report_has_what_a_maintainer_needs(monkeypatch):
    monkeypatch.setenv("JEPA_KERNELS_LOG", "0")
    monkeypatch.setenv("TRITON_CACHE_DIR", "/home/someone/triton")
    monkeypatch.setenv("SOMETHING_ELSE", "1")
    report = jk.info()
    assert report["numpy"] == numpy.__version__ and report["safetensors"] == safetensors.__version__
    assert report["torch"] == torch.__version__ and report["threads"] == torch.get_num_threads()
    assert report["build"] == _C.build_info() and {"compiler", "cuda", "isa"} == set(report["build"])
    assert report["environment"]["JEPA_KERNELS_LOG"] == "0" and "SOMETHING_ELSE" not in report["environment"]
    assert report["environment"]["TRITON_CACHE_DIR"] == "(a path)"
    assert len(report["devices"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    lines = text(report).splitlines()
    for name in ("jepa_kernels", "torch", "numpy", "python", "cpu", "build", "environment"):
        assert any(line.startswith(f"{name} ") for line in lines), name
    assert "JEPA_KERNELS_LOG=0; " in text(report)


def test_the_report_tells_nothing_of_who_ran_it():
    said = text(jk.info()) + json.dumps(jk.info())
    for name in (platform.node(), str(Path.home()), str(Path.cwd())):
        assert len(name) < 4 or name not in said
    assert f"/{getpass.getuser()}" not in said


def test_a_library_that_does_not_load_is_told_without_its_folder(monkeypatch):
    why = "jepa_kernels._C does not load: /home/some one/lib/_C.so: undefined symbol: GOMP_5; ('/opt/x y/libgomp.so.1')"
    monkeypatch.setattr("jepa_kernels._core.extension._state", {"C": why})
    monkeypatch.setattr("jepa_kernels.about.why_not", extension.reason)
    report = jk.info()
    told = "jepa_kernels._C does not load: _C.so: undefined symbol: GOMP_5; ('libgomp.so.1')"
    assert report["build"] == told and report["ops"]["rope"]["cpu"] == f"{told}; build it with `pip install .`"
    assert not re.search("home|some one|opt|x y", text(report) + json.dumps(report))


@pytest.mark.parametrize("kept", ["needs AVX2 and/or FMA", "1/2 of it", "a / b / c", "torch/lib", None])
def test_what_is_no_folder_is_kept(kept):
    assert _files_alone(kept) == kept


def test_packages_that_are_not_there_have_no_line(monkeypatch):
    monkeypatch.setattr("jepa_kernels.about.BESIDE", ("numpy", "no-such-package"))
    assert jk.info()["no-such-package"] is None and "no-such-package" not in text(jk.info())
