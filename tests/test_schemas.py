"""What docs/versions.md promises: versions, and schemas of `torch.ops.jepa_kernels.*`, which others hold on to.

docs/schemas.txt has them all. A change is a decision: docs/versions.md says which are allowed, and what they take.
`python -m tests.test_schemas` writes the file anew.
"""

import json
import re
from pathlib import Path

import torch

import jepa_kernels as jk

ROOT = Path(__file__).parents[1]
FILE = ROOT / "docs" / "schemas.txt"


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


def test_versions_are_those_that_were_run():
    rows = json.loads((ROOT / "docs" / "versions.json").read_text())
    page = (ROOT / "docs" / "versions.md").read_text()
    for row in rows:
        tensors = f"{row['tensors']} of {row['tensors']} | {row.get('interpreted', '')} | yes | {row['commit'][:10]} |"
        assert f"| {row['torch']} | {row['triton'] or ''} | {tensors}" in page
        assert not row["off"] and row["compiled"] and row["autocast"] and row["exported"]
    run = [row["torch"].split("+")[0] for row in rows]
    assert f"| torch | {run[0]} | {run[-1]} |" in page
    assert re.search(r"^TORCHES \?= (.+)$", (ROOT / "Makefile").read_text(), re.M)[1].split() == run
    assert f'"torch>={run[0].rsplit(".", 1)[0]}"' in (ROOT / "pyproject.toml").read_text()


if __name__ == "__main__":
    FILE.write_text("\n".join(registered()) + "\n")
