"""Committed results as Markdown tables, one function for each kind of document."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import rows, targets, text

RESULTS = Path(__file__).parent / "results"
Document = dict[str, Any]
PROBES = {  # of runs: in ijepa-probe.json, ...
    "ijepa": "I-JEPA",
    "vjepa2": "V-JEPA 2",
    "vl_jepa": "VL-JEPA",
    "lejepa": "LeJEPA",
    "lejepa_photos": "LeJEPA",
}
PROBE_KINDS = {"knn": "k-NN", "linear": "linear", "centroid": "nearest centroid"}
POLICIES = {
    "random": "random actions",
    "greedy": "one step ahead, world model",
    "cem": "CEM, world model",
    "simulator": "CEM on the simulator's own state",
}


def load(results: Path = RESULTS) -> dict[str, Document]:
    """{name of the file without its ending: document}, sorted."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(results.glob("*.json"))}


def machines(documents: dict[str, Document]) -> dict[str, Document]:
    """Those of `python -m benchmarks`."""
    return {name: d for name, d in documents.items() if d.get("schema") == rows.SCHEMA}


def machine_title(document: Document) -> str:
    about = document["machine"]
    gpu = f"{about['gpu']['name']}, " if about.get("gpu") else ""
    return f"{gpu}{about['cpu']}, {about['threads']} threads, {about['isa']}"


def measured(name: str, document: Document) -> str:
    """The rows that the project holds itself to."""
    git, versions = document["git"], document["versions"]
    head = f"torch {versions['torch']}; {commit(git)}; all rows are in `benchmarks/results/{name}.json`."
    held = [(target, row) for target, row, _ in targets.check(document["rows"]) if row]
    cells = [row_cells(row, against(target, row)) for target, row in held]
    lines = [head, "", *table(("op", "workload", "ours", "against", "its time", "ratio", "95 % interval"), cells)]
    return "\n".join(lines + steps(document["rows"]))


def commit(git: dict[str, Any]) -> str:
    return f"commit {(git.get('sha') or 'unknown')[:10]}{' with changes' if git.get('dirty') else ''}"


def against(target: targets.Target, row: rows.Row) -> str:
    """The baseline, and the shares of its memory and of the machine's peak that we take where they are asked for."""
    what = target.what
    what += "" if target.most_memory is None else f"; {text.percent(targets.memory_share(row))} of its memory"
    return what if target.least_share is None else f"{what}; {text.percent(row['share_of_peak'])} of the peak"


def row_cells(row: rows.Row, what: str) -> tuple[str, ...]:
    stage = {"backward": "forward + backward"}.get(row["pass"], row["pass"])
    return (
        f"`{row['name']}`", f"{row['workload']}, {stage}", text.duration(row["ours_us"]["p50"]), what,
        text.duration(row["baseline_us"]["p50"]), f"**{text.times(row['ratio'])}**", text.interval(row),
    )  # fmt: skip


def steps(found: list[rows.Row]) -> list[str]:
    """One sentence for every training step."""
    lines = [
        f"- {row['name']} {row['workload']}: {text.duration(row['ours_us']['p50'])} a step, batch {row['images']}, "
        f"{text.times(row['ratio'])} against {row['baseline']}; {row['tokens_per_s']:.0f} tokens/s"
        for row in found
        if row["kind"] == "model" and row["ratio"] is not None
    ]
    return ["", "Training steps (tokens of contexts and targets, or of views):", "", *lines] if lines else []


def probe(model: str, document: Document) -> str:
    """Accuracy of trained features, of random initialisation and of raw pixels, with intervals."""
    about, shown = document["machine"], scores if model == "vl_jepa" else answers
    head = (
        f"`python -m jepa_kernels train {model}`: {document['step']} steps and the probes in "
        f"{document['seconds']:.0f} s ({about['cpu']}, {about['threads']} threads, torch {about['torch']}, "
        f"{commit({'sha': document['commit']})}), with 95 % intervals."
    )
    return "\n\n".join([head, *(shown(PROBES[model], asked) for asked in document["probes"])])


def plan(document: Document) -> str:
    """Distances to the goal after the last action, and their ratios to those of random actions."""
    about, episodes = document["machine"], len(document["final_distances"]["random"])
    head = (
        f"`python -m jepa_kernels plan --seed {document['seed']} --episodes {episodes}`: held-out starts and goals, "
        f"{document['actions']} actions each, in {document['seconds']:.0f} s "
        f"({about['cpu']}, {about['threads']} threads, torch {about['torch']}, "
        f"{commit({'sha': document['commit']})}). Median distance to the goal at the end, in pixels of 512, with 95 % "
        "intervals over episodes:"
    )
    cells = []
    for name, found in document["summary"].items():
        (low, high), (least, most) = found["ci95"], found["ratio_ci95"]
        ratio = f"{found['ratio_to_random']:.2f} ({least:.2f} to {most:.2f})"
        cells.append((POLICIES[name], f"{found['median_distance']:.0f} ({low:.0f} to {high:.0f})", ratio))
    return "\n".join([head, "", *table(("actions by", "distance", "of random's"), cells)])


def balance(document: Document) -> str:
    """What processes wait for the one with the most to do."""
    found = document["rows"]
    head = (
        f"`python -m benchmarks.balance`: share of a step, in tokens or in FLOPs, that {found[0]['ranks']} processes "
        f"wait for the one with the most to do, with images (or clips) in order and with `parallel.balance`; masks of "
        f"{found[0]['steps']} steps, no model runs ({commit({'sha': document['commit']})}). FLOPs are those of a whole "
        "step; the last column balances sums of tokens, without attention's pairs. With 95 % intervals over steps:"
    )
    cells = []
    for row in found:
        low, high = row["cut"]["ci95"]
        ways = [share(row[name]) for name in ("in_order", "balanced", "balanced_by_tokens")]
        cut = f"**-{row['cut']['mean']:.1%}** ({low:.1%} to {high:.1%})"
        cells.append((row["name"], str(row["each"]), row["unit"], *ways[:2], cut, ways[2]))
    columns = "training", "on each", "idle in", "in order", "balanced", "change", "by tokens alone"
    return "\n".join([head, "", *table(columns, cells)])


def scaling(document: Document) -> str:
    """What a second process costs."""
    found, about = document["rows"], document["machine"]
    head = (
        f"`python -m benchmarks.ranks` on {about['cpu']} ({about['isa']}): a step of two processes of `train "
        f"{document['scaling']}`, a core and half of the batch each, against one process with that half on one core; "
        f"{found[0]['rounds']} rounds ({commit({'sha': document['commit']})}). Beside it two processes that know "
        "nothing of each other, which tells what the cores cost one another without any exchange. With 95 % intervals:"
    )
    cells = []
    for row in found:
        step = {kind: f"{row['us'][kind]['p50'] / 1e3:.0f} ms" for kind in ("one", "together")}
        ratios = [f"{row[kind]['ratio']:.2f} ({span(row[kind])})" for kind in ("together", "apart")]
        cells.append((row["engine"], step["one"], step["together"], f"**{ratios[0]}**", ratios[1]))
    columns = "engine", "one process", "two", "ratio", "two without exchange"
    return "\n".join([head, "", *table(columns, cells)])


def saving(document: Document) -> str:
    """What checkpoints cost a run."""
    lines = []
    for one in document["saves"]:
        where = f"on {one['machine']['cpu']} ({commit({'sha': one['commit']})})"
        size = f"`train {one['config']}` ({one['checkpoint_mb']:.1f} MB)"
        blocked = f"{max(one['save_s']) * 1e3:.0f} ms, **{one['share_of_steps']:.2%}** of the steps between two"
        resumed = f"**{one['resume_s']:.1f} s** after it is started again"
        lines.append(
            f"`python -m benchmarks.saves` {where}: a save of {size} keeps the loop for {blocked}; a killed run "
            f"takes its next step {resumed}."
        )
    return "\n\n".join(lines)


def span(one: dict[str, Any]) -> str:
    low, high = one["ci95"]
    return f"{low:.2f} to {high:.2f}"


def share(one: dict[str, Any]) -> str:
    low, high = one["ci95"]
    return f"{one['mean']:.2%} ({low:.2%} to {high:.2%})"


def answers(model: str, asked: dict[str, Any]) -> str:
    """One probe's question and table."""
    counted = f"{asked['seeds']} seeds of {asked['per_seed']}"
    head = f"{asked['question']} Chance: {asked['chance']:.3f}; {counted}:"
    kinds = [name for name in PROBE_KINDS if name in asked]
    titles = {
        "trained": f"{model}, trained",
        "random_init": "random initialisation",
        "raw_pixels": "raw pixels",
        "trained_minus_random_init": "trained minus random, paired",
    }
    cells = [(title, *(score(asked[kind][name]) for kind in kinds)) for name, title in titles.items()]
    return "\n".join([head, "", *table(("features", *map(PROBE_KINDS.get, kinds)), cells)])


def scores(model: str, asked: dict[str, Any]) -> str:
    """A question and its table as the run itself shows it."""
    titles = {"trained": f"{model}, trained", "trained_minus_linear_map": "trained minus linear map, paired"}
    parts = {part: found for part, found in asked.items() if isinstance(found, dict)}
    names = list(next(iter(parts.values())))
    cells = [(titles.get(n, n.replace("_", " ")), *(score(found[n]) for found in parts.values())) for n in names]
    about = [f"Chance: {asked['chance']:.3f}"] if "chance" in asked else []
    head = f"{asked['question']} {'; '.join([*about, asked['score']])}:"
    return "\n".join([head, "", *table(("", *parts), cells)])


def score(one: dict[str, Any]) -> str:
    low, high = one["ci95"]
    return f"{one['mean']:.3f} ({low:.3f} to {high:.3f})"


def table(columns: tuple[str, ...], cells: list[tuple[str, ...]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (columns, ("---",) * len(columns), *cells)]


def counted(document: Document) -> str:
    """Instructions of CPU kernels, and how many times the floor they are."""
    head = (
        f"`python -m benchmarks.instructions`: instructions of each op's small call under valgrind, AVX2, one thread, "
        f"compiler {document['compiler']} ({commit({'sha': document['commit']})}). CI fails at 2 % more. The floor is "
        "an instruction for every 32 bytes that have to be moved or 16 operations, whichever is more; where torch does "
        "the products, none is stated."
    )
    cells = [
        (f"`{key}`", f"{row['instructions']:,}", text.times(row["floor"] and row["instructions"] / row["floor"]))
        for key, row in document["rows"].items()
    ]
    return "\n".join([head, "", *table(("row", "instructions", "of the floor"), cells)])


# {file: (the key that tells such a document, title, what shows it)}
ALONE: dict[str, tuple[str, str, Callable[[Document], str]]] = {
    "balance": ("simulation", "Balanced batches", balance),
    "ranks": ("scaling", "A second process", scaling),
    "saves": ("saves", "Checkpoints", saving),
    "instructions": ("compiler", "Instructions", counted),
}
