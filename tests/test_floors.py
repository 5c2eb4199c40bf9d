"""The floors of the architecture: who may import whom, read from the source."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "jepa_kernels"
FREE = {"numpy", "safetensors"}  # besides the standard library and torch
FLOORS = {
    "_core": 1,
    "agreement": 1,
    "chunks": 1,
    "cost": 1,
    "files": 1,
    "kept": 1,
    "lists": 1,
    "packing": 1,
    "pairs": 1,
    "poses": 1,
    "rotary": 1,
    "schedules": 1,
    "sharding": 1,
    "triton_chunks": 1,
    "ops": 2,
    "nn": 3,
    "optim": 3,
    "masks": 3,
    "models": 4,
}  # everything else: 5


def floor(module: str) -> int:
    return FLOORS.get(module.split(".")[1], 5) if "." in module else 5


def imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    return imported_names(path.read_text(), package(path), top_level_only=top_level_only)


def imported_names(source: str, package: str, *, top_level_only: bool = False) -> set[str]:
    """Full dotted names of what `source`, of `package`, imports: `from a import b` is a.b, be it module or not."""
    tree = ast.parse(source)
    found = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def package(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).parent.parts)


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def sources(*folders: str) -> list[Path]:
    return sorted(p for folder in folders for p in (PACKAGE / folder).rglob("*.py"))


each_source = pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=module_name)


@each_source
def test_a_module_imports_no_higher_floor(path):
    name = module_name(path)
    if name in ("jepa_kernels", "jepa_kernels.testing"):
        return
    assert not too_high(name, imports(path, top_level_only=True)), f"{name} is of floor {floor(name)}"


def too_high(name: str, imported: set[str]) -> list[str]:
    return [i for i in sorted(imported) if i.startswith("jepa_kernels.") and floor(i) > floor(name)]


@pytest.mark.parametrize(
    "line, module",
    [
        ("import jepa_kernels.models", "jepa_kernels.models"),
        ("from jepa_kernels import models", "jepa_kernels.models"),
        ("from jepa_kernels import packing, models as m", "jepa_kernels.models"),
        ("from jepa_kernels.models import ijepa", "jepa_kernels.models.ijepa"),
        ("from ... import train", "jepa_kernels.train"),
        ("from ...nn import Encoder", "jepa_kernels.nn.Encoder"),
        ("from ...nn.block import Block", "jepa_kernels.nn.block.Block"),
    ],
)
def test_an_op_that_imports_a_higher_floor_is_caught(line, module):
    source = f"import torch\n{line}\nfrom jepa_kernels._core.check import fail\nfrom . import reference\n"
    found = imported_names(source, "jepa_kernels.ops.gather_tokens", top_level_only=True)
    assert too_high("jepa_kernels.ops.gather_tokens.op", found) == [module]


@pytest.mark.parametrize("path", sources("ops"), ids=module_name)
def test_ops_do_not_import_each_other(path):
    op = path.relative_to(PACKAGE / "ops").parts[0]
    for imported in imports(path):
        if imported.startswith("jepa_kernels.ops."):
            assert imported.split(".")[2] == op, f"{path.name} of {op} imports {imported}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "ops").glob("*/reference.py")), ids=module_name)
def test_references_are_plain_pytorch(path):
    allowed = {"torch", "math", "collections", "typing", "__future__"}
    for imported in imports(path):
        shared = imported.startswith(("jepa_kernels.packing.", "jepa_kernels.rotary.")) or ".visible." in imported
        assert imported.split(".")[0] in allowed or shared, imported


@pytest.mark.parametrize("path", sources("_core"), ids=module_name)
def test_core_knows_no_op_by_name(path):
    from jepa_kernels.ops import OPS

    assert not [op for op in OPS if f'"{op}"' in path.read_text().replace('explain("masked_attention"', "")]


def test_core_stays_small():
    assert sum(len(p.read_text().splitlines()) for p in sources("_core")) < 850


@pytest.mark.parametrize("path", sorted([*(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]))
def test_tests_and_benchmarks_call_no_kernel_function(path):
    for imported in imports(path):
        parts = imported.split(".")
        private = (
            parts[:2] == ["jepa_kernels", "ops"]
            and len(parts) > 3
            and (parts[3].startswith("triton") or parts[3] == "cpu")
        )
        assert not private or "kernels" in path.parts, f"{path.name} imports {imported}"


def test_import_needs_torch_alone():
    for path in PACKAGE.rglob("*.py"):
        if path.name.startswith("triton") and (
            "ops" in path.parts or path.name in ("triton_chunks.py", "triton_rows.py")
        ):
            continue  # loaded on first use of that backend
        if path.parts[-2:] == ("verify", "interpreter.py"):
            continue  # loaded where Triton interprets
        for imported in imports(path, top_level_only=True):
            root = imported.split(".")[0]
            known = root in ("torch", "jepa_kernels", *FREE) or root in __import__("sys").stdlib_module_names
            assert known, f"{module_name(path)} imports {imported} at its top"
