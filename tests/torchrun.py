"""Training runs of several processes, and what befalls them: started by torchrun as a user starts them, or, in a tenth
of the time, by fork."""

import atexit
import contextlib
import functools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
WAIT = 300  # seconds for anything at all: machines of tests are slow and shared
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


@functools.cache
def launcher():
    """tests.launcher, one for all tests."""
    command = [sys.executable, "-u", "-m", "tests.launcher"]
    environment = {**os.environ, **ONE_THREAD}
    started = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    atexit.register(started.kill)
    return started


class Forked:
    """A process of the launcher's, as subprocess.Popen shows its own."""

    def __init__(self, words, said):
        self.code = None
        self.pid = self._ask([words, str(said)])

    @staticmethod
    def _ask(question):
        print(json.dumps(question), file=launcher().stdin, flush=True)
        line = launcher().stdout.readline()
        assert line, f"the launcher died with {launcher().wait(WAIT)}"
        return json.loads(line)

    def poll(self):
        if self.code is None:
            self.code = self._ask(self.pid)
        return self.code

    def wait(self, timeout=WAIT):
        end = time.monotonic() + timeout
        while self.poll() is None:
            assert time.monotonic() < end, f"a run goes on after {timeout} s"
            time.sleep(0.02)
        return self.code


class Run:
    """`torchrun -m jepa_kernels train CONFIG --out OUT --no-probe ...`; one thread for each process."""

    def __init__(self, config, out, *words, ranks=2, restarts=0, fork=True):
        self.log, self.said = Path(out) / "metrics.jsonl", Path(out).with_suffix(".said")
        command = ["--nproc-per-node", str(ranks), "--master-port", str(free_port()), "--max-restarts", str(restarts)]
        command += ["-m", "jepa_kernels", "train", str(config), "--out", str(out), "--no-probe", *words]
        self.said.touch()
        self.process = Forked(command, self.said) if fork else self._torchrun(command)

    def _torchrun(self, command):
        command = [sys.executable, "-m", "torch.distributed.run", *command]
        environment = {**os.environ, **ONE_THREAD}
        with open(self.said, "wb") as stream:
            return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=stream, stderr=stream)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for pid in [*self.pids(), self.process.pid]:
            _send(pid, signal.SIGKILL)
        self.process.wait()

    def pids(self):
        """Of the ranks that are alive, by rank."""
        if self.process.poll() is not None:
            return []
        listed = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return sorted(map(int, listed))  # started in the order of their ranks

    def rows(self):
        """The log; a last line that is being written is left out."""
        lines = self.log.read_text().splitlines(keepends=True) if self.log.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def reach(self, step, restart=0):
        """Wait until the log has this step, and the processes of this start have written to it."""
        self._until(lambda: self.said.read_text().count("exitcode: -9") == restart)
        before = self._written()
        self._until(lambda: self._written() != before and self.rows()[-1:] and self.rows()[-1]["step"] >= step)

    def _written(self):
        """When the log was written last, in ns."""
        return self.log.stat().st_mtime_ns if self.log.exists() else 0

    def says(self, text):
        """Wait until any rank has written this."""
        self._until(lambda: text in self.said.read_text())

    def _until(self, true):
        end = time.monotonic() + WAIT
        while not true():
            assert self.process.poll() is None, self.said.read_text()
            assert time.monotonic() < end, self.said.read_text()
            time.sleep(0.01)

    def send(self, number, rank):
        """A signal to the process of this rank; whether it was there."""
        found = self.pids()
        return rank < len(found) and _send(found[rank], number)

    def wait(self):
        """The exit code of torchrun, which is 0 where that of every rank is."""
        return self.process.wait(WAIT)

    def lines(self):
        """What the runs themselves said of what went wrong."""
        return [line for line in self.said.read_text().splitlines() if line.startswith("train: ")]


def _send(pid, number):
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def free_port(count=1):
    """The first of so many ports that nobody listens at, below 32768: the system gives those above to connections, and
    one of them may be taken before it is used."""
    while True:
        first = random.SystemRandom().randrange(10_000, 32_768 - count)
        try:
            with contextlib.ExitStack() as stack:
                for port in range(first, first + count):
                    stack.enter_context(socket.socket()).bind(("", port))
            return first
        except OSError:
            continue
