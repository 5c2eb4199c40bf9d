"""Builds jepa_kernels._C with CMake and Ninja; everything else is in pyproject.toml and CMakeLists.txt."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
NO_COMPILER = (
    "jepa_kernels: the build must find a C++17 compiler, CMake >= 3.24 and Ninja, got no {missing}; "
    "install them (Debian: apt-get install -y g++ cmake ninja-build)"
)


class CMakeBuild(build_ext):
    """Runs CMake in build/<python tag> and places the module where setuptools wants it."""

    def build_extension(self, ext: Extension) -> None:
        cuda = os.environ.get("JEPA_CUDA", "0") == "1"
        for tool in ((os.environ.get("CXX") or "c++").split()[0], "cmake", "ninja"):
            if shutil.which(tool) is None:
                raise SystemExit(NO_COMPILER.format(missing=tool))
        if cuda and shutil.which("nvcc") is None:
            raise SystemExit(
                "jepa_kernels: JEPA_CUDA=1 must find nvcc, got none on PATH; unset JEPA_CUDA for a CPU build"
            )
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = ROOT / "build" / str(sys.implementation.cache_tag)  # with and without CUDA: most objects serve both
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}",  # the one of an earlier configuration may be gone
            f"-DPython_EXECUTABLE={sys.executable}", f"-DJEPA_CUDA={'ON' if cuda else 'OFF'}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={folder / 'out'}",
        ]  # fmt: skip
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(folder), "--target", "_C"], check=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(next((folder / "out").glob("_C*.so")), target)
        if not self.inplace:  # a wheel holds the C++ library too, where find_package(jepa_kernels) finds it
            subprocess.run(["cmake", "--install", str(folder), "--prefix", str(target.parent / "cpp")], check=True)


setup(ext_modules=[Extension("jepa_kernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
