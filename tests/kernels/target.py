"""A Triton driver with no GPU behind it: launches compile for a chosen target and are recorded; nothing runs."""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED_BYTES = {80: 166912, 90: 232448, 100: 232448}  # per block, the most a kernel may ask for
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


def inspect(cubin: Path, shared: dict[str, int] | None = None) -> list[Binary]:
    """Every kernel of a cubin file, from its machine code."""
    used = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", tool("cuobjdump", "-res-usage", cubin))
    code = dict(re.findall(r"Function : (\S+)\n(.*?)(?=\n\s*Function : |\Z)", tool("cuobjdump", "-sass", cubin), re.S))
    found = []
    for name, registers, stack, static in used:
        opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", code[name])
        size = int(static) if shared is None else shared[name]
        found.append(Binary(name, int(registers), int(stack), size, Counter(opcodes)))
    return found


class _Utils:
    def __init__(self, target: "Target"):
        self.target = target

    def get_device_properties(self, device: int) -> dict[str, int]:
        return dict(max_shared_mem=SHARED_BYTES[device], multiprocessor_count=132, max_num_regs=REGISTERS, warpSize=32)

    def load_binary(self, name: str, cubin: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(cubin)
            file.flush()
            (binary,) = inspect(Path(file.name), {name: shared})
        self.target.binaries.append(binary)
        return 1, 1, binary.registers, binary.stack, REGISTERS // max(binary.registers, 1) // 32 * 32


class Target(DriverBase):
    """The driver: `capability` chooses the target and stands in for the device index, one kernel cache each."""

    def __init__(self) -> None:
        self.capability = 90
        self.utils = _Utils(self)
        self.binaries: list[Binary] = []  # loaded since the last reset
        self.launches: list[str] = []
        self.threads: dict[str, int] = {}  # of a block, by kernel

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """A kernel that another module's tests compiled launches on the driver of the day."""
        self.threads[metadata.name] = metadata.num_warps * 32
        return lambda *args, **kwargs: driver.active.launches.append(metadata.name)

    def reset(self, capability: int) -> None:
        self.capability = capability
        self.binaries.clear()
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
