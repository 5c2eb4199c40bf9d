"""The library for programs without Python: what it is built of, what it installs, and the example that uses it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jepa_kernels import _C

ROOT = Path(__file__).parents[1]
BUILT = ROOT / "build" / sys.implementation.cache_tag / "libjepa_kernels.a"  # beside it lie builds for sanitizers


def run(*command: str | Path) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    """Where this build is installed."""
    if not BUILT.exists():
        pytest.skip("the build's folder is not here (installed from a wheel)")
    folder = tmp_path_factory.mktemp("prefix")
    run("cmake", "--install", BUILT.parent, "--prefix", folder)
    return folder


def test_the_library_alone_asks_for_neither_python_nor_pybind11(tmp_path):
    given = "-DJEPA_PYTHON=OFF", "-DPython_EXECUTABLE=/no/python", "-Dpybind11_DIR=/no/pybind11"
    run("cmake", "-S", ROOT, "-B", tmp_path, "-G", "Ninja", *given)
    commands = json.loads((tmp_path / "compile_commands.json").read_text())
    files = {Path(c["file"]).relative_to(ROOT / "csrc").as_posix() for c in commands}
    ops = {path.parent.name for path in (ROOT / "csrc").glob("*/cpu.cpp")}
    assert {f"{op}/cpu.cpp" for op in ops} < files and "dispatch.cpp" in files
    assert not [name for name in files if "bind" in name] and "python" not in json.dumps(commands).lower()


def test_the_example_runs_and_its_loops_agree(prefix, tmp_path):
    run("cmake", "-S", ROOT / "examples" / "cpp", "-B", tmp_path, "-G", "Ninja", f"-DCMAKE_PREFIX_PATH={prefix}")
    run("cmake", "--build", tmp_path)
    said = run(tmp_path / "example").splitlines()
    levels = [line for line in said if " " not in line]
    assert levels[-1] == _C.isa(), "the best of this processor is the last one tried"
    assert len(said) == 3 * len(levels) and sum(line.endswith(", as expected") for line in said) == 2 * len(levels)
    program = tmp_path / "example"
    needed = run("readelf", "-d", program)
    assert not re.search(r"NEEDED.*(python|torch|c10)", needed) and "libgomp" in needed


def test_threads_of_the_callers_own_may_call(prefix, tmp_path):
    """Four of an OpenMP region, each with a call of one thread; and with 0 threads, which is 1."""
    source, library = ROOT / "tests" / "kernels" / "callers.cpp", prefix / "lib" / "libjepa_kernels.a"
    program = tmp_path / "callers"
    run("c++", "-std=c++17", "-O1", "-fopenmp", f"-I{prefix / 'include'}", source, library, "-o", program)
    same, calls, overrun, asked = map(int, re.findall(r"\d+", run(program)))
    assert same == calls >= 15 and overrun == 0 and asked >= calls


def test_headers_are_those_of_every_op_and_stand_alone(prefix):
    headers = prefix / "include" / "jepa_kernels"
    ops = {path.parent.name for path in (ROOT / "csrc").glob("*/cpu.cpp")} | {"masks"}
    assert {path.parent.name for path in headers.glob("*/*.h")} == ops | {"common"}
    whole = (headers / "jepa_kernels.h").read_text()
    assert {f"{op}/{op}.h" for op in ops} <= set(re.findall(r'#include "(.+)"', whole))
    source = "".join(f"#include <jepa_kernels/{path.relative_to(headers)}>\n" for path in sorted(headers.rglob("*.h")))
    check = ["c++", "-std=c++17", "-fsyntax-only", "-Wall", "-Werror", f"-I{prefix / 'include'}", "-x", "c++", "-"]
    done = subprocess.run(check, input=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_another_minor_version_is_not_taken(prefix, tmp_path):
    text = "cmake_minimum_required(VERSION 3.24)\nproject(p LANGUAGES NONE)\nfind_package(jepa_kernels 0.2 REQUIRED)\n"
    (tmp_path / "CMakeLists.txt").write_text(text)
    command = ["cmake", "-S", tmp_path, "-B", tmp_path / "b", "-G", "Ninja", f"-DCMAKE_PREFIX_PATH={prefix}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0 and "0.1.0" in done.stderr
