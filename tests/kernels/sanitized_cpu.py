"""CPU kernels under gcc's sanitizers: `python -m tests.kernels.sanitized_cpu`, each in a build and process of its own.

AddressSanitizer and UndefinedBehaviorSanitizer watch every case of the conformance suite; ThreadSanitizer the calls of
the short benchmark, which two threads share. They see plain code alone, not masked intrinsics, so that one instruction
set says as much as all; torch is not built with them: what it does is ignored, but its memory is guarded.
"""

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
USED = ROOT / "build" / sys.implementation.cache_tag
COMPILER = os.environ.get("CXX", "c++")
KINDS = {
    "address": ("address,undefined", "libasan.so", {"ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1"}),
    "thread": (
        "thread", "libtsan.so", {"TSAN_OPTIONS": "ignore_noninstrumented_modules=1:halt_on_error=1:exitcode=66"},
    ),
}  # fmt: skip


def run_or_exit(*command: str | Path) -> str:
    done = subprocess.run([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"{done.stdout[-5000:]}\nsanitized_cpu: {command[0]} must succeed, got exit code {done.returncode}")
    return done.stdout


def build(kind: str) -> Path:
    """The kernels, built anew where a source changed, under the bindings of the build in use: these read arguments."""
    folder, flag = ROOT / "build" / kind, KINDS[kind][0]
    configure = ["-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", "-DJEPA_PYTHON=OFF", "-DJEPA_AVX512=OFF"]
    run_or_exit("cmake", "-S", ROOT, "-B", folder, *configure, f"-DJEPA_SANITIZE={flag}")
    run_or_exit("cmake", "--build", folder)
    module = folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    inputs = run_or_exit("ninja", "-C", USED, "-t", "inputs", f"out/{module.name}").splitlines()
    bindings = [USED / x for x in inputs if x.endswith(".o") and re.search(r"(_C|jepa_bindings)\.dir/", x)]
    linked = [f"-fsanitize={flag}", "-shared", "-fopenmp", "-o", module, *bindings]
    # Whatever CUDA is in the bindings is in the archive of their own build.
    archives = [folder / "libjepa_kernels.a", USED / "libjepa_kernels.a", *cudart()]
    run_or_exit(COMPILER, *linked, *archives, "-ldl", "-lrt", "-lpthread")
    return module


def cudart() -> list[str]:
    found = re.search(r"^CUDA_cudart_static_LIBRARY:FILEPATH=(.+\.a)$", (USED / "CMakeCache.txt").read_text(), re.M)
    return [found[1]] if found else []


def use(module: Path) -> None:
    """Let this process's jepa_kernels load this build."""
    spec = importlib.util.spec_from_file_location("jepa_kernels._C", module)
    sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[spec.name])


def run_shared(op: str) -> int:
    import torch

    from jepa_kernels.testing import cast, public, run

    workloads = importlib.import_module(f"benchmarks.ops.bench_{op}").WORKLOADS
    workloads = [w for w in workloads if w.smoke] or workloads[:1]
    for w in workloads:
        drawn = w.make(torch.Generator().manual_seed(0))
        run(public(w.function or op, "cpu"), cast(drawn, torch.float32, "cpu", w.keep), w.case)
    return len(workloads)


def watched(kind: str, module: Path) -> None:
    """In a process that the sanitizer watches."""
    use(module)
    import torch

    from jepa_kernels.masks import MultiBlock2d, MultiBlock3d
    from jepa_kernels.ops import OPS
    from tests.kernels.sanitized_cuda import run_op

    torch.set_num_threads(2)
    for op in OPS:
        print(f"  {op}: {run_op(op, 'cpu') if kind == 'address' else run_shared(op)} calls", flush=True)
    if kind == "address":
        for step in range(20):
            for sampler in (MultiBlock2d((14, 14)), MultiBlock3d((4, 8, 8)), MultiBlock2d((14, 14), upstream=True)):
                sampler(4, step=step)
        print("  masks: 60 batches", flush=True)


def watch(kind: str) -> int:
    began = time.monotonic()
    module = build(kind)
    built = time.monotonic()
    runtime, options = KINDS[kind][1:]
    preload = run_or_exit(COMPILER, f"-print-file-name={runtime}").strip()
    command = [sys.executable, "-m", "tests.kernels.sanitized_cpu", "--inside", kind, str(module)]
    environment = {**os.environ, **options, "LD_PRELOAD": preload, "PYTHONMALLOC": "malloc"}
    code = subprocess.run(command, cwd=ROOT, env=environment).returncode
    verdict = "nothing found" if code == 0 else f"exit code {code}"
    print(f"{kind}: {verdict}; built in {built - began:.0f} s, ran {time.monotonic() - built:.0f} s", flush=True)
    return code


def kinds(argv: list[str]) -> list[str]:
    parser = argparse.ArgumentParser("python -m tests.kernels.sanitized_cpu", description=__doc__.splitlines()[0])
    parser.add_argument("kind", nargs="*", metavar="KIND", help=f"of {', '.join(KINDS)}; all without one")
    chosen = parser.parse_args(argv).kind
    for kind in set(chosen) - {*KINDS}:
        parser.error(f"a kind must be one of {', '.join(KINDS)}, got {kind!r}")
    return chosen or [*KINDS]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        watched(sys.argv[2], Path(sys.argv[3]))
    else:
        sys.exit(max([abs(watch(kind)) for kind in kinds(sys.argv[1:])]))
