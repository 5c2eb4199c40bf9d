"""The weights of any checkpoint of a run as a .safetensors file, on one process, whatever number of them saved it."""

from __future__ import annotations

from pathlib import Path

from jepa_kernels._core.check import fail
from jepa_kernels.configs import Config, same_run
from jepa_kernels.recipes import RECIPES
from jepa_kernels.report import CHECKPOINTS
from jepa_kernels.training import saves, state
from jepa_kernels.training.ranks import Ranks


def export(config: Config, out: Path, file: Path, name: str | None = None) -> Path:
    """Write the networks of a checkpoint in `out` as their own `save` does; returns the checkpoint's folder.

    name: of that folder, or "best"; None: the newest whole one. Of the config the networks alone must be those of the
    run. Raises ValueError for a checkpoint that is not whole or does not fit, OSError for a file that can't be written.
    """
    path = saves.newest(out, Ranks(), "exporting") if name is None else _named(out, name)
    held, now = state.about(path), config.plain()
    networks = {key: held["config"].get(key) for key in ("architecture", "model")}
    same_run({**now, **networks}, now, path)
    model = RECIPES[config.architecture].model(config.model)
    own = {f"model.{key}": x for key, x in model.state_dict().items()}
    state.put(state.read(path, own, ("model",)), model)
    model.save(file)
    return path


def _named(out: Path, name: str) -> Path:
    path = out / CHECKPOINTS / name
    known = [saves.place(out, step).name for step in saves.steps(out)]
    known += [saves.LINK] if (out / CHECKPOINTS / saves.LINK).exists() else []
    if name not in known:
        fail("train", "--checkpoint", f"be one of {', '.join(known) or 'none'}", repr(name), "look into --out")
    why = saves.damage(path)
    if why is not None:
        fail("train", f"checkpoint {path}", "be whole", why, "export another one")
    return path.resolve()
