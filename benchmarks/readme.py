"""Writes the committed results into README.md, and takes a run's results into benchmarks/results/.

`python -m benchmarks.readme` writes the tables; `--adopt FILE` takes bench-results/latest.json, a training run's
probe.json, a closed loop's plan.json, bench-results/balance.json or ranks.json,
or what benchmarks.saves prints, first.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import rows, targets, text

ROOT = Path(__file__).resolve().parent.parent
README, RESULTS = ROOT / "README.md", ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
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
KEPT = ("schema", "status", "started", "seconds", "machine", "git", "versions", "peaks", "rows")
PRIVATE = {"machine": ("host", "env", "load_before"), "git": ("branch",)}


def adopt(source: Path, results: Path = RESULTS) -> Path:
    """Copy a result into `results`, without what only its machine's owner needs; raises ValueError for a bad one."""
    document = json.loads(source.read_text())
    if "probes" in document:
        try:
            model = trained(document["config"])
            probe(model, document)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{source} can't be adopted: the README can't show it, {error!r}") from error
        path = results / f"{model}-probe.json"
        rows.write(path, document)
        return path
    if "problem" in document:
        return adopt_plan(source, document, results)
    if any(key in document for key, _ in ALONE.values()):
        return adopt_alone(source, document, results)
    wrong = rows.problems(document)
    if document.get("status") != "ok":
        wrong.insert(0, f"status is {document.get('status')!r}, not 'ok'")
    wrong += [f"{t.name} against {t.what} was not measured" for t, row, _ in targets.check(document["rows"]) if not row]
    if wrong:
        raise ValueError(f"{source} can't be adopted: {wrong[0]}")
    kept = {name: document[name] for name in KEPT if name in document}
    for name, private in PRIVATE.items():
        kept[name] = {k: v for k, v in kept[name].items() if k not in private}
    path = results / f"{slug(document['machine'])}.json"
    rows.write(path, kept)
    return path


def trained(config: dict[str, Any]) -> str:
    """Name of the shipped config that a run is of: LeJEPA has one for each source of views."""
    architecture = config["architecture"]
    source = config.get("data", {}).get("source", "mnist")
    return architecture if source == "mnist" else f"{architecture}_{source}"


def adopt_plan(source: Path, document: dict[str, Any], results: Path) -> Path:
    """A closed loop's summary, with where each episode ended in place of its whole course."""
    try:
        wrong = "" if document["complete"] else "it was interrupted"
        episodes = document.pop("episodes")
        ends = {name: [e["policies"][name]["total"][-1] for e in episodes] for name in document["summary"]}
        plan({**document, "final_distances": ends})
    except (KeyError, TypeError) as error:
        wrong = f"the README can't show it, {error!r}"
    if wrong:
        raise ValueError(f"{source} can't be adopted: {wrong}")
    path = results / f"{document['problem']}-plan.json"
    rows.write(path, {**document, "final_distances": ends})
    return path


def adopt_alone(source: Path, document: dict[str, Any], results: Path) -> Path:
    """A document of a kind of its own, of which there is one."""
    name = next(name for name in ALONE if ALONE[name][0] in document)
    try:
        ALONE[name][1](document)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{source} can't be adopted: the README can't show it, {error!r}") from error
    path = results / f"{name}.json"
    rows.write(path, document)
    return path


def slug(machine: dict[str, Any]) -> str:
    """A file name for a machine: its GPU, or its processor, instruction set and threads."""
    gpu = machine.get("gpu")
    name = (
        gpu["name"].removeprefix("NVIDIA ")
        if gpu
        else f"{machine['cpu']} {machine['isa']} {machine['threads']} threads"
    )
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def tables(results: Path = RESULTS) -> str:
    """Everything between the markers, from the files in `results`."""
    probes = {results / f"{model}-probe.json": model for model in PROBES}
    plans = sorted(results.glob("*-plan.json"))
    alone = {results / f"{name}.json": show for name, (_, show) in ALONE.items()}
    paths = sorted(p for p in results.glob("*.json") if p not in (*probes, *plans, *alone))
    parts = [measured(p.name, json.loads(p.read_text())) for p in paths]
    parts += [probe(model, json.loads(p.read_text())) for p, model in probes.items() if p.exists()]
    parts += [plan(json.loads(p.read_text())) for p in plans]
    parts += [show(json.loads(p.read_text())) for p, show in alone.items() if p.exists()]
    return "\n\n".join(parts)


def measured(name: str, document: dict[str, Any]) -> str:
    """The machine and the rows that the project holds itself to."""
    about, git, versions = document["machine"], document["git"], document["versions"]
    gpu = f"{about['gpu']['name']}, " if about.get("gpu") else ""
    head = (
        f"{gpu}{about['cpu']}, {about['threads']} threads, {about['isa']}; torch {versions['torch']}; {commit(git)}"
        f" ([`{name}`](benchmarks/results/{name})):"
    )
    held = [(target, row) for target, row, _ in targets.check(document["rows"]) if row]
    cells = [row_cells(row, against(target, row)) for target, row in held]
    lines = [head, "", *table(("op", "workload", "ours", "against", "its time", "ratio", "95 % interval"), cells)]
    return "\n".join(lines + steps(document["rows"]))


def commit(git: dict[str, Any]) -> str:
    return f"commit {(git.get('sha') or 'unknown')[:10]}{' with changes' if git.get('dirty') else ''}"


def against(target: targets.Target, row: rows.Row) -> str:
    """The baseline, and the share of its memory that we take where a share is asked for."""
    share = "" if target.most_memory is None else f"; {text.percent(targets.memory_share(row))} of its memory"
    return target.what + share


def row_cells(row: rows.Row, what: str) -> tuple[str, ...]:
    stage = {"backward": "forward + backward"}.get(row["pass"], row["pass"])
    low, high = row["ci95"]
    return (
        f"`{row['name']}`", f"{row['workload']}, {stage}", text.duration(row["ours_us"]["p50"]), what,
        text.duration(row["baseline_us"]["p50"]), f"**{text.times(row['ratio'])}**", f"{low:.2f} to {high:.2f}",
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


def probe(model: str, document: dict[str, Any]) -> str:
    """Accuracy of trained features, of random initialisation and of raw pixels, with intervals."""
    about, shown = document["machine"], scores if model == "vl_jepa" else answers
    head = (
        f"`python -m jepa_kernels train {model}`: {document['step']} steps and the probes in "
        f"{document['seconds']:.0f} s ({about['cpu']}, {about['threads']} threads, torch {about['torch']}, "
        f"{commit({'sha': document['commit']})}), with 95 % intervals."
    )
    return "\n\n".join([head, *(shown(PROBES[model], asked) for asked in document["probes"])])


def plan(document: dict[str, Any]) -> str:
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


def balance(document: dict[str, Any]) -> str:
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


def scaling(document: dict[str, Any]) -> str:
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


def saving(document: dict[str, Any]) -> str:
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


def insert(page: str, tables: str) -> str:
    """The page with `tables` between its markers."""
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    return before + BEGIN + "\n" + (tables + "\n" if tables else "") + END + after


# {file: (the key that tells such a document, what shows it)}
ALONE: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "balance": ("simulation", balance),
    "ranks": ("scaling", scaling),
    "saves": ("saves", saving),
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.readme", description=__doc__.splitlines()[0])
    parser.add_argument("--adopt", type=Path, action="append", default=[], metavar="FILE")
    args = parser.parse_args(argv)
    try:
        for source in args.adopt:
            print(adopt(source))
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    README.write_text(insert(README.read_text(), tables()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
