"""CUDA kernels built for the host, and put where a call looks for the backend "cuda"."""

import importlib.util
import shutil
import subprocess
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pybind11
import pytest
import torch

from jepa_kernels._core import define, select

HERE, CSRC = Path(__file__).parent, Path(__file__).parents[2] / "csrc"
FLAGS = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wno-unknown-pragmas")


def build(folder: Path, name: str, headers: Path, sources: Mapping[Path, str], *flags: str) -> ModuleType:
    """Compile all sources at once, each with its own flag, without a warning, and load them as one module.

    name: that of its PYBIND11_MODULE, which no other module of the process has: Python keeps them by name.
    headers: where those are that stand in for CUDA's.
    """
    if shutil.which("g++") is None:
        pytest.skip("g++ is not on PATH: the kernels are not built for the host here")
    includes = [f"-I{place}" for place in (headers, CSRC, pybind11.get_include(), sysconfig.get_path("include"))]
    started = [
        subprocess.Popen(
            [
                "g++",
                *FLAGS,
                *flags,
                *includes,
                own,
                "-x",
                "c++",
                "-c",
                source,
                "-o",
                folder / f"{source.parent.name}_{source.stem}.o",
            ],
            stderr=subprocess.PIPE,
            text=True,
        )
        for source, own in sources.items()
    ]
    for process in started:
        errors = process.communicate()[1]
        assert process.returncode == 0 and not errors, errors
    path = folder / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run(["g++", "-shared", *folder.glob("*.o"), "-o", path], check=True)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def take_for_cuda(monkeypatch: pytest.MonkeyPatch, op: str, module: ModuleType) -> None:
    """The op's backend "cuda" runs this module on tensors of the CPU."""
    for stage in ("forward", "backward"):
        monkeypatch.setitem(define._implementations, (op, stage, "cuda"), getattr(module, f"{op}_{stage}_cuda"))
    monkeypatch.setitem(select._availability, ("cuda", "cpu"), None)
    monkeypatch.setattr(select, "_ready", {})  # what earlier calls found able
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
