"""A Triton driver with no GPU behind it: launches compile for a chosen target and are recorded; nothing runs."""

import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Per block, the most that a kernel may ask for. That of sm_86 and sm_89 for sm_80 too, whose kernels they run: an A100
# has 166912.
SHARED_BYTES = {80: 101376, 90: 232448, 100: 232448, 120: 101376}
REGISTERS = 65536  # of a multiprocessor


@dataclass(frozen=True)
class Binary:
    """What the compiler made of one kernel."""

    name: str
    registers: int
    stack: int  # bytes; more than 0 where registers were spilled
    shared: int  # bytes
    instructions: Counter[str]  # LDG.E.128: 4, ...

    def count(self, pattern: str) -> int:
        """How many of its instructions match."""
        return sum(n for name, n in self.instructions.items() if re.fullmatch(pattern, name))


def tool(name: str, *args: str) -> str:
    return subprocess.run([TOOLS / name, *args], check=True, capture_output=True, text=True).stdout


class Loaded(NamedTuple):
    """A kernel of a cubin file, its machine code not yet read."""

    name: str
    registers: int
    stack: int
    shared: int
    code: bytes


def kernels_of(cubin: Path) -> list[Loaded]:
    """Every kernel of an ELF file: its machine code is the section `.text.<name>`."""
    elf = cubin.read_bytes()
    (start,), (size, count, names) = struct.unpack_from("Q", elf, 40), struct.unpack_from("HHH", elf, 58)
    parts = [struct.unpack_from("IIQQQQ", elf, start + i * size) for i in range(count)]  # name, .., offset, bytes
    titles = elf[parts[names][4] :]
    code = {titles[p[0] : titles.index(0, p[0])].decode(): elf[p[4] : p[4] + p[5]] for p in parts}
    used = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", tool("cuobjdump", "-res-usage", cubin))
    return [Loaded(name, *map(int, numbers), code[f".text.{name}"]) for name, *numbers in used]


def inspect(kernels: list[Loaded], capability: int) -> list[Binary]:
    """The instructions of all by one run of the disassembler, which takes longer to start than to read a kernel."""
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(kernel.code for kernel in kernels))
        file.flush()
        text = tool("nvdisasm", "--binary", f"SM{capability}", "--no-dataflow", file.name) if kernels else ""
    opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", text)
    assert len(opcodes) == sum(len(kernel.code) for kernel in kernels) // 16
    each = iter(opcodes)
    return [Binary(*kernel[:4], Counter(islice(each, len(kernel.code) // 16))) for kernel in kernels]


class _Utils:
    def __init__(self, target: "Target"):
        self.target = target

    def get_device_properties(self, device: int) -> dict[str, int]:
        return dict(max_shared_mem=SHARED_BYTES[device], multiprocessor_count=132, max_num_regs=REGISTERS, warpSize=32)

    def load_binary(self, name: str, cubin: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(cubin)
            file.flush()
            (kernel,) = kernels_of(Path(file.name))
        self.target.loaded.append(kernel._replace(shared=shared))
        return 1, 1, kernel.registers, kernel.stack, REGISTERS // max(kernel.registers, 1) // 32 * 32


class Target(DriverBase):
    """The driver: `capability` chooses the target and stands in for the device index, one kernel cache each."""

    def __init__(self) -> None:
        self.capability = 90
        self.utils = _Utils(self)
        self.loaded: list[Loaded] = []  # since the last reset
        self.launches: list[str] = []
        self.threads: dict[str, int] = {}  # of a block, by kernel

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """A kernel that another module's tests compiled launches on the driver of the day. The grid is one of CUDA."""
        self.threads[metadata.name] = metadata.num_warps * 32
        assert metadata.global_scratch_size == 0, f"{metadata.name}: its memory would be asked of an allocator"

        def launch(x: int, y: int, z: int, *args: Any) -> None:
            assert max(y, z) < 1 << 16 and x * y * z < 1 << 31, f"{metadata.name}: grid {x, y, z}"
            driver.active.launches.append(metadata.name)

        return launch

    @property
    def binaries(self) -> list[Binary]:
        """What was loaded since the last reset."""
        return inspect(self.loaded, self.capability)

    def reset(self, capability: int) -> None:
        self.capability = capability
        self.loaded.clear()
        self.launches.clear()

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_interface(self) -> SimpleNamespace:
        return SimpleNamespace(current_device=self.get_current_device, synchronize=lambda: None)

    def get_benchmarker(self) -> Callable[..., list[float]]:
        return lambda function, quantiles=None: [1.0] * 3

    def get_empty_cache_for_benchmark(self) -> None:
        return None

    def clear_cache(self, cache: Any) -> None:
        return None
