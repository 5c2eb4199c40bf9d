"""Every CUDA kernel as it was built, with no GPU: its machine code inspected, its source free of warnings."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from jepa_kernels import _C
from tests.kernels.target import REGISTERS, SHARED_BYTES, TOOLS, Binary, inspect, kernels_of

pytestmark = pytest.mark.compile
CSRC = Path(__file__).parents[2] / "csrc"
SOURCES = sorted(CSRC.glob("*/cuda*.cu"))
CASES = [(source, arch) for source in SOURCES for arch in ("80", "90a") if arch == "90a" or "_sm90a" not in source.name]
IDS = [f"sm_{arch}-{source.parent.name}-{source.stem}" for source, arch in CASES]
OBJECTS = CSRC.parent / "build" / sys.implementation.cache_tag / "CMakeFiles" / "jepa_cuda.dir" / "csrc"


def streams(binary: Binary, loads: int, stores: int, load: str = r"LDG\.E\.128") -> None:
    """At least so many 16-byte accesses, with ordinary caching; addresses known to be global memory."""
    assert binary.count(load) >= loads and binary.count(r"STG\.E\.128") >= stores, binary.instructions
    assert not binary.count(r"(LD|ST)\.E.*|.*\.STRONG.*"), "generic or ordered addressing"


def averages(binary: Binary) -> None:
    """Target and fp32 online weights; low-precision ones come 8 bytes a time, as do three addresses and the momentum.
    Roundings are kept apart."""
    whole = "EfEE" in binary.name
    streams(binary, 2 if whole else 1, 1)
    assert (binary.count(r"LDG\.E\.64") == 4) == whole, binary.instructions
    ijepa = "7EmaFormE1E" in binary.name  # the form whose products may not be fused into the sum
    assert (binary.count("FFMA.*") == 0) == ijepa, f"{binary.name}: {binary.instructions}"


def steps(binary: Binary) -> None:
    """Parameter, both moments, target and fp32 gradient; a gradient of 2 bytes comes 8 bytes a time, as do eight
    addresses and three scalars."""
    whole = "kernelIfE" in binary.name
    streams(binary, 5 if whole else 4, 4)
    assert binary.count(r"LDG\.E\.64") == (11 if whole else 12), binary.instructions


def squares(binary: Binary) -> None:
    """Four of a gradient, squared in double; sums of chunks are read 8 bytes a thread, four in flight."""
    if "sum" in binary.name:
        assert binary.count(r"LDG\.E\.64") >= 4, binary.instructions
    else:
        streams(binary, 4, 0, r"LDG\.E\.EF\.128")
        assert binary.count("DFMA") and not binary.count("FFMA.*|FMUL.*"), binary.instructions


def width(binary: Binary) -> int:
    """Channels a kernel is built for."""
    return int(re.search(r"16ELi(\d+)E", binary.name)[1])


def tile_bytes(width: int) -> int:
    """64 rows in shared memory: 128 bytes for every 64 channels, a power of two for the rest."""
    rest = width % 64
    return 64 * (width // 64 * 128 + (0 if rest == 0 else 32 if rest <= 16 else 64 if rest <= 32 else 128))


def attention(binary: Binary) -> None:
    """Fetched by tensor maps, multiplied by warpgroups, written 16 bytes a store; no 16-byte word is split.
    Several products are under way at a time: where ptxas must put them in a row, it waits after each."""
    assert binary.count("HGMMA.*") > binary.count("WARPGROUP.DEPBAR.*") > 0 and binary.count("HMMA.*") == 0
    assert binary.count("UTMALDG.4D") > 0 and binary.count(r"STG\.E.*\.128") > 0
    assert not binary.count(r"(LD|ST)\.E.*"), "generic addressing"
    if "backward" in binary.name:  # out, for delta; all else comes by tensor maps
        assert binary.count(r"LDG\.E\.128.*") >= 2


def turning(binary: Binary) -> None:
    """Where channels are taken 16 bytes at a time: two such loads in flight, no 16-byte word split."""
    if "Lb1E" in binary.name:
        assert binary.count(r"LDG\.E.*\.128.*") >= 2 and binary.count(r"STG\.E.*\.128") >= 2, binary.instructions
        assert not binary.count(r"STG\.E(\.U16)?"), binary.instructions
    assert binary.count("FFMA.*") > 0 and not binary.count(r"(LD|ST)\.E.*"), "generic addressing"


@dataclass(frozen=True)
class Expected:
    """Of one source: kernels in it, threads a block, what machine code must hold, blocks that registers must allow."""

    kernels: int
    threads: int
    check: Callable[[Binary], None]
    blocks: Callable[[Binary], int] = lambda binary: 2


EXPECTED = {
    "adamw_ema/cuda.cu": Expected(3, 256, steps, lambda b: 4),
    "ema_update/cuda.cu": Expected(9, 256, averages, lambda b: 4),
    "grad_norm/cuda.cu": Expected(4, 256, squares, lambda b: 4),
    "masked_attention/cuda_backward_sm90a.cu": Expected(32, 128, attention, lambda b: 3 if width(b) <= 32 else 2),
    "masked_attention/cuda_forward_sm90a.cu": Expected(32, 256, attention, lambda b: 2 if width(b) <= 96 else 1),
    "rope/cuda.cu": Expected(12, 256, turning, lambda b: 3 if "Halves" in b.name else 4),
}


def test_every_source_says_what_to_expect():
    assert [str(s.relative_to(CSRC)) for s in SOURCES] == sorted(EXPECTED)


@cache
def built(source: Path, arch: str) -> list[Binary]:
    """Its kernels, as CMake left them for the extension; attention takes a minute to compile."""
    made = OBJECTS / source.relative_to(CSRC).with_suffix(".cu.o")
    with TemporaryDirectory() as folder:
        subprocess.run([TOOLS / "cuobjdump", "-xelf", f"sm_{arch[:2]}", made], cwd=folder, check=True)
        (cubin,) = Path(folder).iterdir()
        return inspect(kernels_of(cubin), int(arch[:2]))


needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH: nothing is compiled here")
needs_build = pytest.mark.skipif(not _C.build_info()["cuda"], reason="built without CUDA: `make build-cuda` needs nvcc")


@needs_nvcc
@pytest.mark.parametrize("source, arch", CASES, ids=IDS)
def test_sources_have_no_warnings(source, arch):
    command = ["nvcc", "-ptx", "-Xcicc", "-O0", "-std=c++17", "-O3", "--expt-relaxed-constexpr", f"-I{CSRC}",
               f"-gencode=arch=compute_{arch},code=compute_{arch}", source, "-o", os.devnull]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr


@needs_build
@pytest.mark.parametrize("source, arch", CASES, ids=IDS)
def test_machine_code(source, arch):
    expected = EXPECTED[str(source.relative_to(CSRC))]
    binaries = built(source, arch)
    assert len(binaries) == expected.kernels
    for binary in binaries:
        assert binary.stack == 0 and not binary.count(r"(LDL|STL).*"), f"spills: {binary}"
        assert binary.shared <= SHARED_BYTES[int(arch[:2])]
        fitting = REGISTERS // (binary.registers * expected.threads)
        assert fitting >= expected.blocks(binary), f"{binary.name}: {binary.registers} registers"
        expected.check(binary)


HALF = (228 // 2 - 1) * 1024  # shared memory of each of two blocks of a multiprocessor


def warpgroups_and_bytes(name: str, width: int) -> tuple[int, int]:
    """Of a block at 256 queries and keys: four tiles each of keys and values, or of the other side; and own tiles."""
    if name == "forward":
        most = 5 if width <= 40 else 4 if width <= 96 else 3
        sizes = [(w, 1024 + (w * queries + 8) * tile_bytes(width)) for w in (2, 1) for queries in (2, 1)]
        fitting = [size for size in sizes if size[1] <= SHARED_BYTES[90]]
        return max(fitting, key=lambda size: min(most // size[0], 228 * 1024 // (size[1] + 1024)) * size[0])
    tile = tile_bytes(width)
    whole = 3072 + 8 * tile + (2 if tile >= 8192 else 4) * 8192 if width <= 80 else 0  # of sequences of 128
    shared = [max(whole, 3072 + 2 * (warpgroups + 4) * tile) for warpgroups in (1, 2)]
    return (2, shared[1]) if shared[0] > HALF and width <= 96 else (1, shared[0])


def table_of_attention() -> str:
    """What the Hopper kernels take at 256 queries and keys, and how many blocks a multiprocessor holds."""
    lines = [
        "| D | pass | threads | registers | shared memory | blocks a multiprocessor |",
        "|---:|---|---:|---:|---:|---:|",
    ]
    for name in ("forward", "backward"):
        binaries = built(CSRC / "masked_attention" / f"cuda_{name}_sm90a.cu", "90a")
        for binary in sorted((b for b in binaries if "bf16" in b.name), key=width):
            warpgroups, shared = warpgroups_and_bytes(name, width(binary))
            assert shared <= SHARED_BYTES[90]
            registers = REGISTERS // (-(-binary.registers // 8) * 8 * 128 * warpgroups)
            blocks = min(registers, 228 * 1024 // (shared + 1024))
            assert blocks >= 1, binary.name
            row = (width(binary), name, 128 * warpgroups, binary.registers, f"{shared / 1024:.0f} KB", blocks)
            lines.append(f"| {' | '.join(map(str, row))} |")
    return "\n".join(lines)


@needs_build
def test_the_table_of_attention_kernels_is_up_to_date():
    if "release 13.0" not in subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout:
        pytest.skip("the table is of nvcc 13.0")
    table = table_of_attention()
    assert table in (CSRC / "masked_attention" / "README.md").read_text(), f"write into it:\n{table}"
