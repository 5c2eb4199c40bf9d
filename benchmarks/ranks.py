"""What a second process costs: steps of two processes, a core and half of the batch each, against one with that half.

`python -m benchmarks.ranks` starts five processes of `train ijepa`'s shipped config: one alone, two that average
gradients through gloo, two that know nothing of each other. They take turns of a few steps, those of a pair at the same
time: the last kind tells what two cores cost each other, by memory and clock, without any exchange.
"""

import argparse
import os
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as mp

from benchmarks import machine, rows, stats
from jepa_kernels import configs, report
from jepa_kernels.training.feed import batches
from jepa_kernels.training.ranks import Ranks, join
from jepa_kernels.training.trainer import Trainer

CONFIG, TURN = "ijepa", 4  # steps
KINDS = {"one": 1, "together": 2, "apart": 2}  # processes


def work(kind: str, rank: int, core: int, port: int, turns: Connection, engine: str) -> None:
    """One process: at each message, TURN steps; their seconds go back. An empty message ends it."""
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    whole = configs.read(CONFIG).data.batch_size
    ranks, size = Ranks(), whole // 2
    if kind == "together":
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        ranks, size = join("cpu")[0], whole
    config = configs.read(CONFIG, [f"data.batch_size={size}", f"parallel.engine={engine}"])
    trainer = Trainer(config, ranks=ranks)
    if ranks.grouped:
        trainer.share()
    feed = iter(batches(config, 0, ranks))
    turns.send(None)
    while turns.recv():
        seconds = []
        for _ in range(TURN):
            started = time.perf_counter()
            trainer.advance(next(feed))
            seconds.append(time.perf_counter() - started)
        turns.send(seconds)
    ranks.leave()


def measured(rounds: int, engine: str) -> dict[str, np.ndarray]:
    """Seconds of a step, [rounds]: the mean of a turn; of a pair, the slower process's."""
    cores, port, context = sorted(os.sched_getaffinity(0)), 29000 + os.getpid() % 900, mp.get_context("spawn")
    pipes: dict[str, list[Connection]] = {}
    for kind, count in KINDS.items():
        for rank in range(count):
            ours, theirs = context.Pipe()
            given = kind, rank, cores[rank % len(cores)], port, theirs, engine
            context.Process(target=work, args=given, daemon=True).start()
            pipes.setdefault(kind, []).append(ours)
    for kind in KINDS:
        for pipe in pipes[kind]:
            pipe.recv()
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for turn in range(1 + rounds):  # the first turn touches memory
        for kind, own in pipes.items():
            for pipe in own:
                pipe.send(True)
            seconds = max(float(np.mean(pipe.recv())) for pipe in own)
            if turn:
                found[kind].append(seconds)
    for own in pipes.values():
        for pipe in own:
            pipe.send(False)
    return {kind: np.array(seconds) for kind, seconds in found.items()}


def row(engine: str, found: dict[str, np.ndarray]) -> dict[str, Any]:
    """Steps against those of one process alone."""
    one = found["one"]
    against = {
        kind: {"ratio": stats.ratio(one, found[kind]), "ci95": stats.ratio_ci95(one, found[kind])}
        for kind in ("together", "apart")
    }
    times = {kind: stats.quantiles(seconds) for kind, seconds in found.items()}
    return {"engine": engine, "us": times, "rounds": len(one), "steps": TURN, **against}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.ranks", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path("bench-results/ranks.json"))
    args = parser.parse_args(argv)
    table = []
    for engine in ("ddp", "fsdp"):
        table.append(row(engine, measured(args.rounds, engine)))
        both = {kind: table[-1][kind] for kind in ("together", "apart")}
        print(engine, ", ".join(f"{kind} {x['ratio']:.3f} {x['ci95']}" for kind, x in both.items()))
    about = machine.machine("cpu", 1)
    kept = {name: about[name] for name in ("cpu", "isa", "cores")}
    rows.write(args.out, {"scaling": CONFIG, "machine": kept, "commit": report.commit(), "rows": table})
    return 0


if __name__ == "__main__":
    sys.exit(main())
