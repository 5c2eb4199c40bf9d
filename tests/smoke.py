"""What an installed package must do under the torch beside it; run as a file of its own.

Every op's first case on every backend that runs here, forward and gradient, against the error budget; a graph without
breaks that gives eager's bits; autocast; an exported encoder. Prints a JSON line; the exit code is 1 where one is off.
With TRITON_INTERPRET=1: Triton's kernels alone, in its interpreter.
"""

import json
import os
import sys

import torch

import jepa_kernels as jk
from jepa_kernels.nn import Encoder
from jepa_kernels.testing import check_case, op_module
from jepa_kernels.verify.checks import dtypes_of

DTYPES = (torch.float32, torch.bfloat16)


def parity(only: str | None) -> tuple[int, list[str]]:
    """How many tensors were held against the budget, and those outside it."""
    count, off = 0, []
    for op in jk.ops.OPS:
        case = op_module(op, "cases").CASES[0]
        for backend in (b for b in jk.available_backends(op) if only in (None, b)):
            for dtype in DTYPES if backend == "reference" else set(DTYPES) & set(dtypes_of(op, backend, case)):
                found = check_case(op, backend, case, dtype, "cpu")
                count += len(found)
                off += [f"{op} {backend} {dtype} {p}" for p in found if not p.ok]
    return count, off


def attended(q: torch.Tensor, packing: jk.Packing) -> torch.Tensor:
    return jk.masked_attention(q, q, q, packing, rope=jk.Rope(torch.arange(9.0)[:, None]))


def compiled() -> bool:
    """One graph, forward and backward, with the bits of eager."""
    q, packing = torch.randn(9, 2, 16, requires_grad=True), jk.Packing.from_lengths([2, 7])
    graph = torch.compile(attended, fullgraph=True)
    results = []
    for function in (attended, graph):
        out = function(q, packing)
        results += [out.detach(), *torch.autograd.grad(out.square().sum(), q)]
    return torch.equal(results[0], results[2]) and torch.equal(results[1], results[3])


def autocast() -> bool:
    q = torch.randn(9, 2, 16)
    with torch.autocast("cpu", torch.bfloat16):
        out = attended(q, jk.Packing.from_lengths([9]))
    low = attended(q.bfloat16(), jk.Packing.from_lengths([9]))
    return out.dtype is torch.bfloat16 and torch.equal(out, low)


def exported() -> bool:
    """With a dynamic batch, saved by nothing: that is tests/models/test_export.py's."""
    encoder, images = Encoder(16, 8, 16, depth=1, num_heads=2).eval(), torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        program = torch.export.export(encoder, (images[:2],), dynamic_shapes=({0: torch.export.Dim.AUTO},))
        return torch.equal(program.module()(images), encoder(images))


def main() -> int:
    torch.manual_seed(0)
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if interpreted:
        from jepa_kernels.verify import interpreter

        interpreter.install()
    count, off = parity("triton" if interpreted else None)
    done = {} if interpreted else {f.__name__: f() for f in (compiled, autocast, exported)}
    triton = sys.modules["triton"].__version__ if "triton" in sys.modules else None
    versions = {"torch": torch.__version__, "triton": triton, "python": sys.version.split()[0]}
    print(json.dumps({**versions, "jepa_kernels": jk.__version__, "tensors": count, "off": off, **done}))
    return int(bool(off) or not all(done.values()) or count == 0)


if __name__ == "__main__":
    sys.exit(main())
