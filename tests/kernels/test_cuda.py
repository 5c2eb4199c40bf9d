"""Every CUDA source through nvcc for its targets, with no GPU; machine code inspected."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.kernels.target import REGISTERS, SHARED_BYTES, Binary, inspect

pytestmark = pytest.mark.compile
CSRC = Path(__file__).parents[2] / "csrc"
SOURCES = sorted(CSRC.glob("*/cuda*.cu"))
CASES = [(source, arch) for source in SOURCES for arch in ("80", "90a") if arch == "90a" or "_sm90a" not in source.name]


def quads(binary: Binary) -> None:
    """16 bytes of fp32 a load, four in flight; addresses known to be global memory; roundings kept apart."""
    assert binary.count(r"LDG\.E.*\.128") >= 4 and binary.count(r"STG\.E.*\.128") >= 4, binary.instructions
    assert not binary.count(r"(LD|ST)\.E.*"), "generic addressing"
    ijepa = "7EmaFormE1E" in binary.name  # the form whose products may not be fused into the sum
    assert (binary.count("FFMA.*") == 0) == ijepa, f"{binary.name}: {binary.instructions}"


# Per source: kernels in it, threads a block, and what its machine code must hold.
EXPECTED = {"ema_update/cuda.cu": (36, 256, quads)}


def test_every_source_says_what_to_expect():
    assert [str(s.relative_to(CSRC)) for s in SOURCES] == sorted(EXPECTED)


@pytest.mark.parametrize("source, arch", CASES, ids=[f"sm_{arch}-{s.parent.name}-{s.stem}" for s, arch in CASES])
def test_machine_code(source, arch, tmp_path):
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH: CUDA sources are not compiled here")
    cubin = tmp_path / "kernels.cubin"
    command = ["nvcc", "-cubin", "-std=c++17", "-O3", f"-I{CSRC}", f"-gencode=arch=compute_{arch},code=sm_{arch}",
               "-Xptxas", "-v,-warn-spills", source, "-o", cubin]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "warning" not in done.stderr.lower(), done.stderr
    assert set(re.findall(r"(\d+) bytes spill", done.stderr)) == {"0"}
    count, threads, check = EXPECTED[str(source.relative_to(CSRC))]
    binaries = inspect(cubin)
    assert len(binaries) == count
    for binary in binaries:
        assert binary.stack == 0 and not binary.count(r"(LDL|STL).*"), f"spills: {binary}"
        assert binary.shared <= SHARED_BYTES[int(arch[:2])]
        assert binary.registers * threads <= REGISTERS // 2, f"two blocks must fit: {binary.registers}"
        check(binary)
