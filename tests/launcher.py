"""Runs of several processes as torchrun starts them, but by fork: `python -m tests.launcher` imports torch once.

Each line on its stdin is a command, answered by a line: `[words of torchrun, file for what the run says]` by the pid
of the agent, which has the ranks as children; a pid by its exit code, null while it runs.
"""

import json
import os
import sys
import traceback

import torch
import torch._dynamo  # optimizers do
from torch.distributed import run
from torch.distributed.launcher.api import elastic_launch

from jepa_kernels import train


def rank(*words):
    torch.set_num_threads(1)
    if code := train.main(list(words)):
        sys.exit(code)


def agent(words, said):
    """What `torchrun` does after its imports; returns its exit code."""
    stream = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(stream, 1), os.dup2(stream, 2)
    config, _, own = run.config_from_args(run.parse_args(words))
    config.start_method = "fork"
    elastic_launch(config, rank)(*own[own.index("train") + 1 :])
    return 0


def start(words, said):
    if pid := os.fork():
        return pid
    code = 1
    try:
        code = agent(words, said)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def code_of(pid):
    ended, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(code_of(asked) if isinstance(asked, int) else start(*asked)), file=answers, flush=True)
