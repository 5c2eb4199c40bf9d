"""Plan with a world model and act, again and again, on PushT: `python -m jepa_kernels plan`.

In the output folder: plan.json (distances and energies of every episode, medians, ratios to random actions), plan.mp4,
plan.png. Every policy gets the same starts and goals, held out from training. Functions of --seed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from jepa_kernels import report
from jepa_kernels._core.check import fail
from jepa_kernels.data import extra, need
from jepa_kernels.models.lewm import LeWorldModel
from jepa_kernels.pusht import goals, pictures
from jepa_kernels.pusht.goals import Task
from jepa_kernels.pusht.loop import Trace, outcome, run, summary
from jepa_kernels.pusht.policies import CEILING, POLICIES, Policy, Search, policies
from jepa_kernels.pusht.simulator import ACTION_DIM, FRAME_SKIP, Simulator

SHIPPED = Path(__file__).parent / "weights" / "pusht.safetensors"
Episode = tuple[Task, dict[str, Trace]]
PLANNER = {
    "horizon": "actions that a plan looks ahead",
    "take": "those of them that are taken before the next plan",
    "samples": "sequences of actions imagined at once",
    "iterations": "of the search",
    "elites": "best samples, which the next ones are drawn around",
}


class Job(NamedTuple):
    """What a run needs, checked."""

    world: LeWorldModel
    simulator: Simulator
    search: Search
    policies: dict[str, Policy]
    tasks: list[Task]
    out: Path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m jepa_kernels plan", description=__doc__.split("\n")[0])
    parser.add_argument("problem", nargs="?", default="pusht", choices=["pusht"])
    parser.add_argument("--episodes", type=int, default=20, help="held-out starts and goals (20)")
    parser.add_argument("--actions", type=int, default=20, help="actions of an episode, 0.5 s each (20)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--policies", default=",".join(POLICIES), help=f"some of {','.join(POLICIES)} (all)")
    for name, value in vars(Search()).items():
        if name in PLANNER:
            parser.add_argument(f"--{name}", type=int, default=value, help=f"{PLANNER[name]} ({value})")
    parser.add_argument(
        "--checkpoint", type=Path, default=SHIPPED, help="a world model of `train pusht`; the shipped one"
    )
    parser.add_argument("--out", type=Path, help="folder of the results; default runs/plan-pusht")
    return parser


def prepare(options: argparse.Namespace) -> Job:
    """Read the checkpoint, draw the tasks, make the folder; raises for anything that does not fit."""
    names = options.policies.split(",")
    for name in names:
        if name not in POLICIES:
            fail("plan", "--policies", f"name some of {', '.join(POLICIES)}", repr(name), "check the spelling")
    for name in ("episodes", "actions", *PLANNER):
        if getattr(options, name) < 1:
            fail("plan", f"--{name}", "be at least 1", getattr(options, name), "leave it out for the usual number")
    if options.seed < 0:
        fail("plan", "--seed", "be at least 0", options.seed, "leave it out for 0")
    if not 2 <= options.elites <= options.samples:
        fail("plan", "--elites", f"lie in 2..{options.samples}", options.elites, "samples bound it")
    if options.take > options.horizon:
        fail("plan", "--take", f"be at most the horizon, {options.horizon}", options.take, "plan further ahead")
    need("rich", "matplotlib", "av", "gym_pusht", of="plan")  # before the first episode, not after the last
    world, _ = LeWorldModel.from_checkpoint(options.checkpoint)
    if world.action_dim != ACTION_DIM:
        remedy = "pass one of `train pusht`"
        fail("plan", "--checkpoint", f"be of a world of {ACTION_DIM} numbers an action", world.action_dim, remedy)
    search = Search(**{name: getattr(options, name) for name in PLANNER})
    size = world.config.crop_size
    out = options.out or Path("runs") / f"plan-{options.problem}"
    report.folder(out, "plan")
    if not os.access(out, os.W_OK):
        fail("plan", "--out", "be a folder to write to", out, "pass another --out")
    chosen = policies(names, world, size, FRAME_SKIP, search)
    return Job(world, Simulator(size), search, chosen, goals.tasks(options.episodes, seed=options.seed), out)


def act(job: Job, options: argparse.Namespace) -> Iterator[Episode]:
    """Every episode, when all policies are through with it."""
    total = len(job.tasks) * len(job.policies)
    with _progress(total) as show:
        for number, task in enumerate(job.tasks):
            seed = int(np.random.default_rng([options.seed, number]).integers(2**31))
            traces = {}
            for name, policy in job.policies.items():
                traces[name] = run(task, policy, job.world, job.simulator, actions=options.actions, seed=seed)
                show(number, name, float(goals.distance(traces[name].states[-1], task.goal).total))
            yield task, traces


@contextmanager
def _progress(total: int) -> Iterator[Any]:
    rich = extra("rich.progress", "plan")
    columns = ("plan", rich.BarColumn(), rich.MofNCompleteColumn(), "{task.fields[last]}", rich.TimeRemainingColumn())
    with rich.Progress(*columns) as bar:
        task = bar.add_task("plan", total=total, last="")

        def show(number: int, name: str, left: float) -> None:
            bar.update(task, advance=1, last=f"episode {number + 1}, {name}: {left:.0f} px left")

        yield show


def result(job: Job, options: argparse.Namespace, episodes: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """What plan.json holds."""
    return {
        "problem": options.problem,
        "complete": len(episodes) == len(job.tasks),
        "summary": summary(episodes),
        "seconds": seconds,
        "actions": options.actions,
        "seed": options.seed,
        "frame_skip": FRAME_SKIP,
        "search": asdict(job.search),
        "ceiling_search": asdict(CEILING),
        "checkpoint": options.checkpoint.name,
        "world": asdict(job.world.config),
        "machine": report.machine(),
        "commit": report.commit(),
        "episodes": episodes,
    }


def show(found: dict[str, Any]) -> None:
    """Print medians and ratios as a table."""
    rich = extra("rich.table", "plan")
    title = f"distance to the goal after {found['actions']} actions, {len(found['episodes'])} episodes"
    lost = sum(row["invalid_samples"] for row in found["summary"].values())
    caption = f"{lost} samples lost: their energy was NaN" if lost else None
    table = rich.Table(title=title if found["complete"] else title + " (interrupted)", caption=caption)
    for column in ("policy", "median, pixels", "95 % interval", "of random's", "95 % interval"):
        table.add_column(column)
    for name, row in found["summary"].items():
        ratio = ["", ""]
        if row["ratio_to_random"] is not None:
            ratio = [f"{row['ratio_to_random']:.2f}", "{:.2f} to {:.2f}".format(*row["ratio_ci95"])]
        table.add_row(name, f"{row['median_distance']:.0f}", "{:.0f} to {:.0f}".format(*row["ci95"]), *ratio)
    extra("rich", "plan").print(table)


def main(argv: list[str]) -> int:
    """Run the verb `plan`; returns the exit code (1: the run failed, 2: bad input, 130: interrupted)."""
    options = _parser().parse_args(argv)
    try:
        job = prepare(options)
    except KeyboardInterrupt:
        print(f"stopped before the first of {options.episodes} episodes", file=sys.stderr)
        return report.INTERRUPTED
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    done: list[Episode] = []
    try:
        with _one_thread():
            return _carry_out(job, options, done)
    except KeyboardInterrupt:
        print(f"stopped after {len(done)} of {len(job.tasks)} episodes (out: {job.out})", file=sys.stderr)
        return report.INTERRUPTED
    except (report.SaveError, ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1


@contextmanager
def _one_thread() -> Iterator[None]:
    """Products this small gain nothing from a second thread, and wait for it long where something else runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _carry_out(job: Job, options: argparse.Namespace, done: list[Episode]) -> int:
    """Fill `done`, keeping all of it on disk at any time, and end with pictures and a table."""
    began, found = time.perf_counter(), {}
    outcomes: list[dict[str, Any]] = []
    interrupted = None
    try:
        for episode in act(job, options):
            done.append(episode)
            outcomes.append(outcome(*episode))
            found = result(job, options, outcomes, time.perf_counter() - began)
            report.write(job.out / "plan.json", (json.dumps(found, indent=1) + "\n").encode(), "plan")
    except KeyboardInterrupt as stop:
        interrupted = stop
    if done:
        report.write(job.out / "plan.png", pictures.curves(found["episodes"]), "plan")
        report.write(job.out / "plan.mp4", pictures.video(done), "plan")
        show(found)
    if interrupted:
        raise interrupted
    print(f"results in {job.out}")
    return 0
