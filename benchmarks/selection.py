"""Which runs are measured: by row, op, workload and dtype. A name that no run has is refused, with the nearest."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.headlines import HEADLINES
from jepa_kernels.ops import OPS

FIELDS = ("op", "workload", "pass", "dtype")  # of a run's id, in order
BRIEF = (*OPS, "masks", "encoder", "ijepa", "vjepa2")
ALSO = (  # the first targets of the project
    "ema_update/vit_s16/forward/float32",
    "embed_patches/ijepa_vit_h14_27_b8/backward/float32",
    "latent_loss/ijepa_vit_h14_b32/backward/float32",
    "masked_attention/ragged_1572_h16_d64/backward/float32",
)
SLOW = ("vjepa2/vit_l_4_layers_packed_per_token",)  # a minute, of the same step


def brief(run: str) -> bool:
    """Part of `make bench`, in six minutes: the README's rows of ops, masks, I-JEPA and V-JEPA 2 but those of SLOW
    and of bf16, and ALSO. What all targets say is a matter of `make bench FULL=1`."""
    name, workload, stage, dtype = run.split("/")
    shown = any((name, stage) == (n, s) and workload.startswith(w) for n, w, s, _ in HEADLINES)
    left_out = name not in BRIEF or run.startswith(SLOW) or dtype == "bfloat16"
    return run in ALSO or (shown and not left_out)


def only_baseline(asked: Sequence[str]) -> str | None:
    """The baseline that all of these rows name; None, for every one, where one of them names none or another."""
    names = {row.split("/")[len(FIELDS)] if row.count("/") == len(FIELDS) else None for row in asked}
    return names.pop() if len(names) == 1 else None


@dataclass(frozen=True)
class Selection:
    """Of each field any of the names given, or all where none is; and of rows, `op[/workload[/pass[/dtype...]]]`."""

    rows: Sequence[str] = ()
    op: Sequence[str] = ()
    workload: Sequence[str] = ()
    dtype: Sequence[str] = ()

    def __bool__(self) -> bool:
        return any((self.rows, self.op, self.workload, self.dtype))

    def takes(self, run: str) -> bool:
        parts = run.split("/")
        chosen = all(not names or part in names for part, names in zip(parts, self._names(), strict=True))
        asked = [row.split("/")[: len(FIELDS)] for row in self.rows]
        return chosen and (not asked or any(parts[: len(row)] == row for row in asked))

    def problem(self, runs: Sequence[str]) -> str | None:
        """Why it chooses nothing of these runs, or less than was asked for; None where all names are known."""
        for i, (field, names) in enumerate(zip(FIELDS, self._names(), strict=True)):
            known = sorted({run.split("/")[i] for run in runs})
            for name in names:
                if name not in known:
                    return f"--{field} must name what is measured here, {instead(name, known)}"
        for row in self.rows:
            parts = row.split("/")[: len(FIELDS)]
            if not any(run.split("/")[: len(parts)] == parts for run in runs):
                known = sorted({"/".join(run.split("/")[: len(parts)]) for run in runs})
                return f"--row must begin with a run that is measured here, {instead('/'.join(parts), known)}"
        if not any(map(self.takes, runs)):
            return "--row, --op, --workload and --dtype must choose at least one run, got none; leave one of them out"
        return None

    def _names(self) -> tuple[Sequence[str], ...]:
        return self.op, self.workload, (), self.dtype


def instead(name: str, known: Sequence[str]) -> str:
    """The end of a refusal: what was got, and the known names nearest to it."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or [k for k in known if name in k][:3]
    return f"got {name!r}; {'nearest: ' + ', '.join(near) if near else 'one of ' + ', '.join(known)}"
