"""The documents: every example runs and shows what its comments say, and the site has a page for every op and model."""

import argparse
import ast
import contextlib
import importlib.util
import io
import re
import shlex
import textwrap
import tokenize
from pathlib import Path

import pytest
import torch
import yaml

import jepa_kernels as jk
from jepa_kernels import __main__ as main
from jepa_kernels import configs
from jepa_kernels._core.info import kernels
from jepa_kernels.testing import op_module

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
BLOCK = re.compile(r"^( *)```python\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
PAGES = {
    str(page.relative_to(ROOT)): found
    for page in (ROOT / "README.md", *sorted(DOCS.rglob("*.md")))
    if (found := [textwrap.dedent(code) for _, code in BLOCK.findall(page.read_text())])
}
FENCED = re.compile(r"^```(.*?)\n(.*?)^```", re.DOTALL | re.MULTILINE)
ROW = re.compile(r"^\| `(\w+)` \| ([^|]*) \|", re.MULTILINE)


def comments(code: str) -> dict[int, str]:
    """Line -> the comment at its end."""
    tokens = tokenize.generate_tokens(io.StringIO(code).readline)
    return {t.start[0]: t.string.removeprefix("# ") for t in tokens if t.type == tokenize.COMMENT}


def run(code: str, names: dict, page: str = "example") -> int:
    """Run a block; `x = ...  # [3, T]` tells x's shape, `print(...)  # -> text` what is printed. How many were held."""
    said, held = comments(code), 0
    for statement in ast.parse(code).body:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(ast.Module([statement], []), page, "exec"), names)
        comment = said.get(statement.end_lineno, "")
        if comment.startswith("-> "):
            assert out.getvalue().strip() == comment.removeprefix("-> "), ast.unparse(statement)
            held += 1
        for inner in ast.walk(statement):
            if isinstance(inner, ast.Assign):
                held += hold_shape(inner.targets[0], said.get(inner.end_lineno, ""), names)
    return held


def hold_shape(target: ast.expr, comment: str, names: dict) -> int:
    """`[3, T]`: two dimensions, the first of 3; of several names where `each` follows."""
    found = re.match(r"\[([\w, ]*)\]( each)?", comment)
    several = isinstance(target, ast.Tuple)
    if not found or several != bool(found[2]):
        return 0
    wanted = [size.strip() for size in found[1].split(",")] if found[1] else []
    for one in target.elts if several else [target]:
        value = names.get(one.id) if isinstance(one, ast.Name) else None
        if isinstance(value, torch.Tensor):
            fits = [not size.isdigit() or int(size) == n for n, size in zip(value.shape, wanted, strict=False)]
            assert all(fits) and value.dim() == len(wanted), f"{ast.unparse(one)} is {list(value.shape)}"
    return 1


@pytest.mark.parametrize("page", PAGES)
def test_examples_run_and_show_what_they_say(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "example"}
    for code in PAGES[page]:
        run(code, names, page)


def test_a_wrong_shape_or_print_is_seen():
    assert run("x = torch.ones(2, 3)  # [2, E]\nprint(x.sum().item())  # -> 6.0\n", {"torch": torch}) == 2
    assert run("with torch.no_grad():\n    y, z = torch.ones(2, 4)  # [4] each\n", {"torch": torch}) == 1
    for wrong in ("x = torch.ones(2, 3)  # [2, 4]", "x = torch.ones(2, 3)  # [2, 3, 4]", "print(1)  # -> 2",
                  "x, y = torch.ones(2, 4)  # [3] each"):  # fmt: skip
        with pytest.raises(AssertionError):
            run(wrong, {"torch": torch})


def plain(page: Path) -> list[str]:
    """Blocks of no language."""
    return [block for language, block in FENCED.findall(page.read_text()) if not language]


def command_lines() -> list[tuple[str, list[str]]]:
    """(page, words) of each command in a block, without its comment."""
    found = []
    for page in (ROOT / "README.md", *sorted(DOCS.rglob("*.md"))):
        for block in plain(page):
            for line in block.replace("\\\n", " ").splitlines():
                if re.match(r"(make|srun|torchrun|python -m jepa_kernels) ", line):
                    found.append((str(page.relative_to(ROOT)), shlex.split(line, comments=True)))
    return found


COMMANDS = [pytest.param(words, id=f"{page}: {' '.join(words)}") for page, words in command_lines()]


def parser_of(verb: str) -> argparse.ArgumentParser:
    module = f"jepa_kernels.{main.COMMANDS[verb]}" if verb in main.COMMANDS else main.__name__
    return importlib.import_module(module)._parser()


@pytest.mark.parametrize("words", COMMANDS)
def test_commands_name_verbs_options_configs_and_targets_that_there_are(words):
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return
    verb, *rest = words[words.index("jepa_kernels") + 1 :]
    options = parser_of(verb).parse_args(rest if verb in main.COMMANDS else [verb, *rest])
    config = getattr(options, "config", None)
    if config and not config.endswith(".yaml"):
        assert configs.read(config, options.set)


def test_what_the_first_page_says_in_five_lines_is_tried():
    for page in ("README.md", "docs/index.md"):
        said = {" ".join(p.values[0][3:]) for p in COMMANDS if p.id.startswith(f"{page}: python")}
        assert said >= {"verify", "profile ijepa", "train ijepa"}
    (line,) = re.findall(r"^out = .*", plain(ROOT / "README.md")[0], re.MULTILINE)
    names: dict = {}
    run(PAGES["README.md"][0], names)
    out = names.pop("out")
    run(line, names)
    assert torch.equal(names["out"], out)


def pages_of(nav) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [page for part in (nav.values() if isinstance(nav, dict) else nav) for page in pages_of(part)]


def test_the_site_lists_every_page_and_every_op_and_model_has_its_own():
    listed = pages_of(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(listed) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))
    models = {"ijepa", "vjepa", "vjepa2", "vjepa2_1", "vjepa2_ac", "lewm", "vl_jepa", "lejepa"}
    assert models <= {path.stem for path in (ROOT / "jepa_kernels" / "models").glob("*.py")}
    wanted = {f"ops/{op}.md" for op in jk.ops.OPS} | {f"models/{model}.md" for model in models}
    assert wanted <= set(listed)
    for page in wanted:
        assert page.removeprefix("ops/") == page or f"docs/{page}" in PAGES, f"{page} has no example"


@pytest.mark.parametrize("op", jk.ops.OPS)
def test_the_shapes_of_an_op_page_are_those_of_its_cases(op):
    rows = dict(ROW.findall((DOCS / "ops" / f"{op}.md").read_text().split("## Shapes")[1].split("##")[0]))
    ranks = {
        name: {len(s.split(",")) if s else 0 for s in re.findall(r"\[([^\]]*)\]", text)} for name, text in rows.items()
    }
    for case in op_module(op, "cases").CASES:
        for name, value in case.make(torch.Generator().manual_seed(0)).items():
            if isinstance(value, torch.Tensor) and name in rows and "..." not in rows[name]:
                assert value.dim() in ranks[name], f"{op}: {name} of {case.name} is {list(value.shape)}"
            assert not isinstance(value, torch.Tensor) or name in rows, f"{op}: {name} is not on the page"


def site(name: str):
    """A module of the site's build, which needs the extra `docs`."""
    for needed in ("latex2mathml", "griffe"):
        pytest.importorskip(needed, reason=f"the extra docs is not installed: no {needed}")
    spec = importlib.util.spec_from_file_location(name, DOCS / "site" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_table_of_times_tells_a_run_once_and_every_baseline():
    hooks, run = site("hooks"), {"workload": "a_b", "pass": "backward", "dtype": "bfloat16", "bytes": 2e6}
    times = {"ours_us": {"p50": 1500.0}, "share_of_peak": 0.75}
    rows = [
        {**run, **times, "baseline": name, "ratio": ratio, "ci95": [1.5, 2.5]} for name, ratio in (("x", 2), ("y", 3))
    ]
    about = {"machine": {"cpu": "A", "threads": 2, "isa": "avx2"}, "git": {"sha": "0123456789abcdef"}}
    head, _, _, _, first, second, *_ = hooks.table(Path("a.json"), about, rows, opened=True).split("\n")
    assert head == '???+ note "A, 2 threads, avx2, commit 0123456789"'
    assert first == (r"    | a\_b | forward + backward | bf16 | 1.5 ms | 2 MB | 75 % | x | **2.00** | 1.50 to 2.50 |")
    assert second == "    |  |  |  |  |  |  | y | **3.00** | 1.50 to 2.50 |"
    assert all("| vjepa2\\_vit\\_l\\_masked |" in one for one in hooks.measured("rope")) and not hooks.measured("no_op")


def test_docstrings_become_equations_lists_and_paragraphs():
    shown = site("docstrings").markdown(
        "Turn x.\n\n    y = x * 2\n\nx: [T, E],\n    any strides.\nNo list: of x.\nReturns y.\nRaises *both*.", {"x"}
    )
    assert shown.split("\n\n") == [
        "Turn x.",
        "``` {.text .equation}\n    y = x * 2\n```",
        r"- `x`: \[T, E\], any strides.",
        "No list: of x.",
        "Returns y.",
        r"Raises \*both\*.",
    ]


@pytest.mark.parametrize("op", jk.ops.OPS)
def test_readme_tells_the_backends_of_the_code(op):
    titles, rows = (re.findall(pattern, (ROOT / "README.md").read_text(), re.MULTILINE) for pattern in (
        r"^\| op \| what it does \| reference \| (.*) \|$", rf"^\| `{op}` \| [^|]* \| yes \| (.*) \|$"))  # fmt: skip
    told = {name.strip() for name, cell in zip(titles[0].split("|"), rows[0].split("|"), strict=True) if cell.strip()}
    assert told == {kernel.backend for kernel in kernels(op)}
