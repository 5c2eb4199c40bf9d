"""What a training run leaves: files written whole, pictures, a table of scores, and where they were measured."""

from __future__ import annotations

import io
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from jepa_kernels._core.check import fail
from jepa_kernels.data import extra
from jepa_kernels.files import replacing

CHECKPOINTS = "checkpoints"  # a folder of folders, see training.saves
WEIGHTS = "model.safetensors"
INTERRUPTED = 130  # the shell's exit code for SIGINT


class SaveError(RuntimeError):
    """A file of the run can't be written; the one before it is whole."""


def write(path: Path, content: bytes | memoryview, verb: str = "train") -> None:
    """Write a file beside `path` and rename it: a full disk or a crash leaves the old one whole."""
    try:
        with replacing(path) as beside:
            beside.write_bytes(content)
    except OSError as error:
        raise unwritable(path, error, len(content), verb) from error


def unwritable(path: Path, error: OSError, size: int, verb: str = "train") -> SaveError:
    """The error that says which file, or folder, of how many bytes could not be written, why, and what is left."""
    saved = any(any(folder.glob("step-*")) for folder in (path.parent, path.parent / CHECKPOINTS))
    kept = "; the checkpoint before it is whole, continue with --resume" if saved else ""
    return SaveError(
        f"{verb}: {path} must be writable ({size / 1e6:.1f} MB), got {error.strerror or error}; "
        f"free space or pass another --out{kept}"
    )


def folder(out: Path, verb: str) -> None:
    """Make --out, or raise ValueError that says why not."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(verb, "--out", "be a folder", f"{out} ({error.strerror})", "pass another --out")


def png(figure: Any) -> bytes:
    """A figure of matplotlib as a file, and closed."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120, format="png")
    extra("matplotlib.pyplot").close(figure)
    return buffer.getvalue()


def emissions(
    steps: Sequence[int],
    distances: Sequence[float],
    threshold: float,
    *,
    texts: Sequence[str] = (),
    changes: Sequence[int] = (),
    title: str = "",
) -> bytes:
    """What `vl_answers.emissions` gives of a stream, as a PNG: distances d_t, the threshold, where text is decoded.

    texts: of each emitted step. changes: steps at which what is shown is known to change.
    """
    extra("matplotlib").use("Agg")
    figure, axis = extra("matplotlib.pyplot").subplots(figsize=(12, 3.5), layout="constrained")
    axis.plot(distances, color="tab:blue", label="distance from the segment since the last emission")
    axis.axhline(threshold, color="grey", linestyle="--", label="threshold")
    axis.plot(steps, [distances[t] for t in steps], "o", color="tab:red", label="text is decoded")
    for n, change in enumerate(changes):
        axis.axvline(change, color="tab:green", alpha=0.4, label="what is shown changes" if n == 0 else None)
    for step, text in zip(steps, texts, strict=False):
        axis.annotate(text, (step, float(distances[step])), rotation=45, fontsize=7)
    axis.set(xlabel="step", ylabel="1 - cosine", title=title, ylim=(0, None))
    figure.legend(loc="outside right upper", fontsize=7)
    return png(figure)


def machine(device: torch.device | None = None) -> dict[str, Any]:
    """What the numbers were measured on."""
    cpu, known = platform.processor(), Path("/proc/cpuinfo")
    if known.exists():
        cpu = next(
            (line.split(": ")[1] for line in known.read_text().splitlines() if line.startswith("model name")), cpu
        )
    gpu = {"gpu": torch.cuda.get_device_name(device)} if device is not None and device.type == "cuda" else {}
    return {"cpu": cpu, **gpu, "threads": torch.get_num_threads(), "torch": torch.__version__}


def commit() -> str | None:
    """The commit of a source checkout; None for an installed package."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def show(probes: list[dict[str, Any]]) -> None:
    """Print each probe's scores as a table."""
    rich = extra("rich.table")
    for asked in probes:
        chance = f"chance: {asked['chance']:.3f}" if "chance" in asked else None
        table = rich.Table(title=asked["question"], caption=chance)
        for column in ("probe", "features", asked.get("score", "accuracy"), "95 % interval"):
            table.add_column(column)
        for probe, scores in asked.items():
            for name, score in scores.items() if isinstance(scores, dict) else ():
                low, high = score["ci95"]
                table.add_row(probe, name.replace("_", " "), f"{score['mean']:.3f}", f"{low:.3f} to {high:.3f}")
        extra("rich").print(table)
