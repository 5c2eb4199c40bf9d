"""The package as its users get it: `python -m tests.packages wheel`, or `torches VERSION ...`.

wheel: an sdist; from that alone, in pip's isolated environment without torch, a wheel; what both hold; a new
environment with this torch and the wheel, where every op runs (tests/smoke.py), `info` answers, and examples/cpp finds
the library. torches: the same wheel and tests/smoke.py under each of these versions of torch and the Triton it brings;
--adopt writes docs/versions.json. A build of torch for GPUs, which PyPI has, takes 5 GB of disk.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import venv
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from jepa_kernels import report

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "versions.json"
DEVELOPMENT = (".ci/", ".github/", ".gitignore", ".pre-commit-config.yaml")  # in the repository, in no package
DATA = (".py", ".typed", ".yaml", ".j2", ".safetensors")


class Wrong(Exception):
    """A package that is not as it must be."""


@contextmanager
def step(name: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    print(f"  {time.monotonic() - started:5.1f} s  {name}", flush=True)


def say(*command: str | Path, cwd: Path, **environment: str) -> str:
    """What a command prints; Wrong, with all of it, where it fails."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run([*map(str, command)], cwd=cwd, env={**kept, **environment}, capture_output=True, text=True)
    if done.returncode:
        raise Wrong(f"{' '.join(map(str, command))} ended with {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def tracked() -> list[str]:
    return say("git", "ls-files", cwd=ROOT).splitlines()


def missing(wanted: list[str], found: list[str]) -> None:
    gone = sorted(set(wanted) - set(found))
    if gone:
        raise Wrong(f"the package must hold {', '.join(gone)}")


def build_sdist(out: Path) -> Path:
    build = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"
    path = out / say(sys.executable, "-c", build, out, cwd=ROOT).splitlines()[-1]
    with tarfile.open(path) as archive:
        found = [name.split("/", 1)[1] for name in archive.getnames() if "/" in name]
    missing([name for name in tracked() if not name.startswith(DEVELOPMENT)], found)
    return path


def build_wheel(sdist: Path, out: Path) -> Path:
    """In an environment of its own, which has what pyproject.toml names alone: no torch."""
    say(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", out, sdist, cwd=out)
    (path,) = out.glob("*.whl")
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    if f"-{tag}-{tag}-{platform.system().lower()}_{platform.machine()}.whl" not in path.name:
        raise Wrong(f"a wheel with a compiled module must be named after Python and platform, got {path.name}")
    found = zipfile.ZipFile(path).namelist()
    ours = [name for name in tracked() if name.startswith("jepa_kernels/") and name.endswith(DATA)]
    missing(
        [*ours, "jepa_kernels/cpp/lib/libjepa_kernels.a", "jepa_kernels/cpp/include/jepa_kernels/jepa_kernels.h"], found
    )
    if not any(name.startswith("jepa_kernels/_C.") for name in found):
        raise Wrong("the wheel must hold the compiled module jepa_kernels/_C, got none")
    strangers = [n for n in found if not n.startswith(("jepa_kernels/", "jepa_kernels-"))]
    if strangers:
        raise Wrong(f"the wheel must hold jepa_kernels alone, got {', '.join(strangers)}")
    return path


def environment(folder: Path, wheel: Path, version: str) -> Path:
    """The Python of a new environment with this torch, and the wheel."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    say(python, "-m", "pip", "install", "-q", "--no-compile", f"torch=={version}", wheel, cwd=folder)
    return python


def smoke(python: Path, folder: Path, **environment: str) -> dict[str, object]:
    """tests/smoke.py where the repository is not to be seen."""
    shutil.copy(ROOT / "tests" / "smoke.py", folder)
    return json.loads(say(python, "smoke.py", cwd=folder, **environment).splitlines()[-1])


def example(package: Path, folder: Path) -> str:
    """examples/cpp, with nothing but the C++ library that lies in the package."""
    prefix = f"-DCMAKE_PREFIX_PATH={package / 'cpp'}"
    say("cmake", "-S", ROOT / "examples" / "cpp", "-B", folder / "example", "-G", "Ninja", prefix, cwd=folder)
    say("cmake", "--build", folder / "example", cwd=folder)
    return say(folder / "example" / "example", cwd=folder)


def wheel(folder: Path, built: Path | None) -> Path:
    if built is not None:
        return built.resolve()
    with step("sdist: holds every file of the repository"):
        sdist = build_sdist(folder)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with step("wheel from the sdist alone, no torch at hand"):
        path = build_wheel(sdist, folder)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"           {spent:.0f} s of processor time: {spent / 2:.0f} s on two cores that do nothing else")
    return path


def check_wheel(folder: Path, built: Path) -> None:
    print(f"           {built.name}, {built.stat().st_size / 1e6:.1f} MB")
    version = torch.__version__.split("+")[0]
    with step(f"new environment with torch {version} and the wheel"):
        python = environment(folder / "venv", built, version)
    with step("python -m jepa_kernels info"):
        report = json.loads(say(python, "-m", "jepa_kernels", "info", "--json", cwd=folder))
        if not all(backends["cpu"] is None for backends in report["ops"].values() if "cpu" in backends):
            raise Wrong(f"every CPU kernel must be ready, got {report['ops']}")
    with step("every op, a compiled graph, autocast, an exported encoder"):
        found = smoke(python, folder)
    print(f"           {found['tensors']} tensors within the error budget")
    with step("examples/cpp against the wheel's own C++ library"):
        said = example(next((folder / "venv" / "lib").glob("python*/site-packages/jepa_kernels")), folder)
    print("".join(f"           {line}\n" for line in said.splitlines()), end="")


def check_torches(folder: Path, built: Path, versions: list[str], commit: str, adopt: bool) -> None:
    """commit: the one the wheel is of; it may not be the present one when the last environment is done."""
    rows = []
    for version in versions:
        with step(f"new environment with torch {version}"):
            python = environment(folder / version, built, version)
        with step("every op, a compiled graph, autocast, an exported encoder"):
            row = {**smoke(python, folder), "commit": commit}
        if row["triton"] is not None:  # builds of torch for the CPU alone bring none
            with step("Triton's kernels in its interpreter"):
                row["interpreted"] = smoke(python, folder, TRITON_INTERPRET="1")["tensors"]
        shutil.rmtree(folder / version)
        print(f"           {json.dumps(row)}")
        rows.append(row)
    if adopt:
        RESULTS.write_text(json.dumps(adopted(json.loads(RESULTS.read_text()), rows), indent=1) + "\n")


def adopted(before: list[dict[str, Any]], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each version of torch, from the oldest on: those of other versions stay."""
    by_version = {row["torch"].split("+")[0]: row for row in (*before, *rows)}
    return [by_version[v] for v in sorted(by_version, key=lambda v: [int(n) for n in v.split(".")])]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.packages", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("wheel", "torches"))
    parser.add_argument("versions", nargs="*", metavar="VERSION", help="of torch, for torches")
    parser.add_argument("--adopt", action="store_true", help="write docs/versions.json")
    parser.add_argument("--wheel", type=Path, metavar="FILE", help="try this one, build none")
    options = parser.parse_args(argv)
    if (options.what == "torches") != bool(options.versions):
        parser.error("versions of torch come with `torches`, and with it alone")
    if options.adopt and options.what == "wheel":
        parser.error("--adopt must come with `torches`, got `wheel`; leave it out")
    with tempfile.TemporaryDirectory() as folder:
        commit = report.commit()
        try:
            built = wheel(Path(folder), options.wheel)
            if options.what == "wheel":
                check_wheel(Path(folder), built)
            else:
                check_torches(Path(folder), built, options.versions, commit, options.adopt)
        except Wrong as error:
            print(f"packages: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
