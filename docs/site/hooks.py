"""What the site says of every op from the code and from committed results, and mathematics without a script.

`mkdocs build` runs it from the repository's root; pages of ops get their backends, measured times and API appended.
"""

from __future__ import annotations

import ast
import html
import importlib
import json
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks.text import duration, interval, percent, size  # noqa: E402
from jepa_kernels._core.select import short  # noqa: E402
from jepa_kernels.ops import OPS  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
FORMS = {
    "masked_attention": ("masked_attention_qkv", "masked_attention_lse", "merge_attention", "Rope"),
    "rope": ("rope_qk", "Rope", "patch_positions"),
    "ema_update": ("EmaTable",),
    "adamw_ema": ("AdamWEMA",),
}
MODELS = {
    name: f"{name}.{shown}"
    for name, shown in {
        "ijepa": "IJEPA", "vjepa": "VJEPA", "vjepa2": "VJEPA2", "vjepa2_1": "VJEPA2_1", "vjepa2_ac": "WorldModel",
        "lewm": "LeWorldModel", "vl_jepa": "VLJEPA", "lejepa": "LeJEPA",
    }.items()
}  # fmt: skip
METHODS = (
    "forward", "loss", "losses", "objective", "encode", "embed", "imagine", "unroll", "prefix_loss",
    "load", "from_checkpoint", "load_encoder", "save",
)  # fmt: skip
FIELDS = (
    "crop_size", "patch_size", "num_frames", "embed_dim", "depth", "num_heads",
    "predictor_embed_dim", "predictor_depth", "predictor_num_heads", "levels", "conditioning", "window",
)  # fmt: skip
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
UNITS = re.compile(r"(?<=\d) (to (?=\d)|(?:ms|us|s|x|%|[kMG]?B)(?=</))")
MATHS = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """A page's hand-written part, then what is generated for it."""
    path = page.file.src_uri
    name = Path(path).stem
    if path.startswith("ops/") and name in OPS:
        return "\n\n".join([markdown, backends(name), floor(name), *measured(name), api(name)])
    if path.startswith("models/") and name in MODELS:
        return "\n\n".join([markdown, *sizes(name), *published(name), model_api(name)])
    if path == "ops/index.md":
        return markdown.replace("<!-- ops -->", overview())
    return markdown


def on_page_content(content: str, **_: Any) -> str:
    """TeX to MathML, which browsers set by themselves; numbers stay on a line with their units."""
    content = UNITS.sub(lambda found: "&nbsp;" + found[1].replace(" ", "&nbsp;"), content)
    return MATHS.sub(lambda found: mathematics(found[3], found[2] == "["), content)


def mathematics(tex: str, display: bool) -> str:
    return convert(html.unescape(tex).strip(), display="block" if display else "inline")


def kernels(op: str) -> tuple[Any, ...]:
    return importlib.import_module(f"jepa_kernels.ops.{op}.op").KERNELS


def summary(op: str) -> str:
    """The first line of the op's docstring, with its code marked."""
    source = ast.parse((ROOT / "jepa_kernels" / "ops" / op / "op.py").read_text())
    function = next(n for n in source.body if isinstance(n, ast.FunctionDef) and n.name == op)
    return re.sub(r"([\[\]*_|])", r"\\\1", (ast.get_docstring(function) or "").split("\n")[0])


def overview() -> str:
    """Every op, what it does, and the backends that have a kernel of it."""
    names = ("cpu", "triton", "cuda", "sdpa")
    lines = ["| op | what it does | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(names)]
    for op in OPS:
        have = {kernel.backend for kernel in kernels(op)}
        marks = " | ".join("yes" if name in have else "" for name in names)
        lines.append(f"| [`{op}`]({op}.md) | {summary(op)} | {marks} |")
    return "\n".join(lines)


def backends(op: str) -> str:
    """The op's table of kernels, in its order of preference."""
    lines = ["## Backends", "", "In order of preference; automatic choice is the first that takes the call.", ""]
    lines += ["| backend | dtypes | limits |", "|---|---|---|"]
    for kernel in kernels(op):
        limits = "some calls: `explain` says which" if kernel.limit or kernel.automatic else ""
        lines.append(f"| `{kernel.backend}` | {', '.join(short(d) for d in kernel.dtypes)} | {limits} |")
    lines.append("| `reference` | any floating | plain PyTorch, the specification |")
    return "\n".join(lines)


def floor(op: str) -> str:
    """What the benchmark counts as the least that has to be moved and computed, in its own words."""
    source = (ROOT / "benchmarks" / "ops" / f"bench_{op}.py").read_text()
    said = (ast.get_docstring(ast.parse(source)) or "").split("\n\n")
    said = [re.sub(r"([\[\]*_])", r"\\\1", " ".join(part.split("\n"))) for part in said]
    return "\n\n".join(["## Measured, and the floor", *said])


def measured(op: str) -> list[str]:
    """A table for each committed machine that measured the op."""
    documents = [(path, json.loads(path.read_text())) for path in sorted(RESULTS.glob("*.json"), reverse=True)]
    found = [(path, d, rows) for path, d in documents if (rows := rows_of(d, op))]
    return [table(path, document, rows, opened=i == 0) for i, (path, document, rows) in enumerate(found)]


def rows_of(document: dict[str, Any], op: str) -> list[dict[str, Any]]:
    rows = document.get("rows", []) if "peaks" in document else []
    return [row for row in rows if row["kind"] == "op" and row["name"] == op and row["ratio"] is not None]


def table(path: Path, document: dict[str, Any], rows: list[dict[str, Any]], opened: bool) -> str:
    """A line for each baseline; what is said of a run, our time, what must move and the floor's share, stands once."""
    about = document["machine"]
    head = f"{about['cpu']}, {about['threads']} threads, {about['isa']}, commit {document['git']['sha'][:10]}"
    lines = [f'???{"+" if opened else ""} note "{head}"', ""]
    lines += ["    | workload | pass | dtype | ours | must move | floor / ours | against | ratio | 95 % interval |"]
    lines += ["    |---|---|---|---|---|---|---|---|---|"]
    before = None
    for row in rows:
        run = row["workload"], row["pass"], row["dtype"]
        stage = {"backward": "forward + backward"}.get(row["pass"], row["pass"])
        ours = duration(row["ours_us"]["p50"]), size(row["bytes"]), percent(row["share_of_peak"])
        told = ("",) * 6 if run == before else (run[0], stage, SHORT.get(run[2], run[2]), *ours)
        cells = (*told, row["baseline"], f"**{row['ratio']:.2f}**", interval(row))
        lines.append(f"    | {' | '.join(cells)} |".replace("_", r"\_"))
        before = run
    lines += ["", f"    From `benchmarks/results/{path.name}`; medians, interleaved in one process."]
    return "\n".join(lines)


def sizes(model: str) -> list[str]:
    """The named configs of a model, by those of FIELDS that they have."""
    named = getattr(importlib.import_module(f"jepa_kernels.models.{model}"), "SIZES", {})
    if not named:
        return []
    configs = {name: asdict(make()) for name, make in named.items()}
    fields = [f for f in FIELDS if all(f in c for c in configs.values())]
    lines = ["## Sizes", "", f"| | {' | '.join(f'`{name}`' for name in named)} |", "|---|" + "---|" * len(named)]
    lines += [f"| {f} | {' | '.join(str(c[f]) for c in configs.values())} |".replace("_", r"\_") for f in fields]
    return ["\n".join(lines)]


def published(model: str) -> list[str]:
    """Names of the shipped runs of the papers."""
    files = sorted((ROOT / "jepa_kernels" / "configs" / "published").glob("*.yaml"))
    found = [p.stem for p in files if re.search(rf"^architecture: {model}\b", p.read_text(), re.MULTILINE)]
    if not found:
        return []
    names = ", ".join(f"`{name}`" for name in found)
    return [f"## Published runs\n\n`python -m jepa_kernels train NAME`: {names}; see [Many GPUs](../distributed.md)."]


def model_api(model: str) -> str:
    options = f"    options: {{inherited_members: true, members: [{', '.join(METHODS)}]}}"
    return f"## API\n\n::: jepa_kernels.models.{MODELS[model]}\n{options}"


def api(op: str) -> str:
    names = (op, *FORMS.get(op, ()))
    return "\n\n".join(["## API", *(f"::: jepa_kernels.{name}" for name in names)])
