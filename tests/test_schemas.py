"""The schemas of `torch.ops.jepa_kernels.*`, which exported programs and other libraries hold on to.

docs/schemas.txt has them all. A change is a decision: docs/versions.md says which are allowed, and what they take.
`python -m tests.test_schemas` writes the file anew.
"""

from pathlib import Path

import torch

import jepa_kernels as jk

FILE = Path(__file__).parents[1] / "docs" / "schemas.txt"


def registered() -> list[str]:
    found = sorted(str(s) for s in torch._C._jit_get_all_schemas() if s.name.startswith("jepa_kernels::"))
    return [schema.removeprefix("jepa_kernels::") for schema in found]


def test_schemas_are_those_of_the_committed_list():
    assert registered() == FILE.read_text().splitlines(), "see docs/versions.md: what may change, and how"


def test_every_op_is_in_the_list_and_takes_its_backend_last():
    names = {schema.split("(")[0] for schema in registered()}
    assert set(jk.ops.OPS) <= {name.removesuffix("_forward") for name in names}
    for schema in registered():
        assert schema.split(" -> ")[0].endswith("str backend)"), schema


if __name__ == "__main__":
    FILE.write_text("\n".join(registered()) + "\n")
