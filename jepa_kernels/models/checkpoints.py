"""Files of weights: read without running anything in them, fitted whole or not at all, written whole."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from jepa_kernels._core.check import fail
from jepa_kernels._core.select import FLOATS, short
from jepa_kernels.files import replacing

Source = Mapping[str, Any] | str | os.PathLike[str]
SHOWN = 6
CONFIG = "jepa_kernels.config"  # in the metadata of files that `write` makes
TABLES = ("pos_embed", "predictor_pos_embed")
APART = 0.01  # mean distance of tables: that of two grids is greater, that of one table and its bf16 copy smaller


@dataclass(frozen=True)
class LoadReport:
    """What became of a checkpoint; `str` is a summary.

    layout: which names it had. loaded: names of the model's tensors that were written, in its state dict.
    ignored: {name in the checkpoint: why it is not loaded}. missing: {network that it lacks: what the model has there}.
    """

    model: str
    layout: str
    loaded: tuple[str, ...]
    ignored: Mapping[str, str]
    missing: Mapping[str, str]

    def __str__(self) -> str:
        lines = [f"{self.model}: {len(self.loaded)} of its tensors loaded from {self.layout}"]
        for title, found in (("ignored", self.ignored), ("missing", self.missing)):
            for reason in dict.fromkeys(found.values()):
                names = [name for name, why in found.items() if why == reason]
                more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
                lines.append(f"  {title}: {', '.join(names[:SHOWN])}{more} ({reason})")
        return "\n".join(lines)


def read(model: str, source: Source) -> Mapping[str, Any]:
    """A checkpoint given as a mapping, or as the path of a file, whose tensors are read to the CPU.

    A name that ends in .safetensors, or in .index.json for one in several files, tells the format; any other is a torch
    file, read with weights_only=True: nothing in it is run. Raises ValueError for files that are torn, or hold more
    than plain tensors and numbers.
    """
    if isinstance(source, Mapping):
        return source
    if not isinstance(source, str | os.PathLike):
        found = type(source).__name__
        fail(model, "checkpoint", "be a mapping of names or a path", found, "pass a state dict", TypeError)
    path = Path(source)
    with open(path, "rb"):  # a missing or unreadable file raises its own OSError
        pass
    if path.name.endswith(".index.json"):
        return _read_shards(model, path)
    safe = path.suffix == ".safetensors"
    try:
        checkpoint = load_file(path) if safe else _read_torch(path)
    except Exception as error:  # the reader meets foreign bytes with errors of nearly every type
        _unreadable(model, path, "a safetensors file" if safe else "a torch file", error)
    if not isinstance(checkpoint, Mapping):
        fail(model, "checkpoint", "be a mapping of names", type(checkpoint).__name__, "pass a state dict", TypeError)
    return checkpoint


def config_in(model: str, source: Source) -> dict[str, Any]:
    """{field: value} of the config that `write` put into a .safetensors file; of any other source nothing."""
    if isinstance(source, Mapping) or Path(source).suffix != ".safetensors":
        return {}
    try:
        with safe_open(source, "pt") as file:
            text = (file.metadata() or {}).get(CONFIG, "{}")
    except SafetensorError as error:
        _unreadable(model, Path(source), "a safetensors file", error)
    try:
        return {field: tuple(value) if isinstance(value, list) else value for field, value in json.loads(text).items()}
    except (ValueError, AttributeError) as error:
        _unreadable(model, Path(source), "a file with a config in JSON", error)


def check_fields(model: str, config: type, theirs: Mapping[str, Any], changes: Mapping[str, Any]) -> None:
    """Refuse a config in a file, and changes, of fields that this model's config has not: it is another model's."""
    known = {field.name for field in fields(config)}
    if foreign := sorted(theirs.keys() - known):
        wanted = f"be of a {config.__name__}"
        fail(model, "checkpoint", wanted, f"a config with {brief(foreign)}", "load it by the model that saved it")
    if foreign := sorted(changes.keys() - known):
        fail(model, "changes", f"be fields of {config.__name__}", ", ".join(foreign), "leave them out", TypeError)


def check_untold(model: str, config: Any, fields: Sequence[str], source: Source, remedy: str) -> None:
    """Refuse a file of `write` whose config differs from this one in fields that no weight tells."""
    own = {field: getattr(config, field) for field in fields}
    theirs = config_in(model, source)
    held = {field: theirs.get(field, own[field]) for field in own}
    if held != own:
        fail(model, "checkpoint", f"be of {own}", held, remedy)


def _read_torch(path: Path) -> Any:
    """Tensors of a zip file, torch's format since 1.6, stay on the disk until they are used: many hold an optimiser."""
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


def _read_shards(model: str, index: Path) -> dict[str, Any]:
    """The tensors of the files beside `index`, which says what is in which."""
    try:
        places = json.loads(index.read_bytes())["weight_map"]
        shards = sorted(set(places.values()))
        if any(Path(shard).name != shard or not shard.endswith(".safetensors") for shard in shards):
            raise ValueError("a shard that is no .safetensors file beside it")
    except Exception as error:
        _unreadable(model, index, "an index of files", error)
    found: dict[str, Any] = {}
    for shard in shards:
        tensors = read(model, index.with_name(shard))
        promised = {name for name, place in places.items() if place == shard}
        if promised != tensors.keys():
            differ = brief(sorted(promised ^ tensors.keys()))
            fail(
                model,
                str(index.with_name(shard)),
                "hold what the index says",
                f"a difference in {differ}",
                "fetch both again",
            )
        found |= tensors
    return found


def _unreadable(model: str, path: Path, kind: str, error: Exception) -> NoReturn:
    why = f"{type(error).__name__}: {str(error).strip().split(chr(10))[0][:200]}".removesuffix(": ")
    text = f"{model}: {path} must be {kind} of plain tensors, got: {why}; save it again"
    raise ValueError(text) from error


def write(
    model: str,
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | None,
    config: Mapping[str, Any],
) -> None:
    """Write a .safetensors file, whole or not at all; dtype: of every tensor, None: as they are."""
    path = Path(path)
    if path.suffix != ".safetensors":
        fail(model, "path", "end in .safetensors", path, "the name tells the format")
    if dtype not in (None, *FLOATS, torch.float64):
        fail(model, "dtype", "be real and floating", dtype, "leave it out for the weights' own", TypeError)
    plain = {
        name: value.detach().to("cpu", dtype if value.is_floating_point() else None).contiguous()  # batch norms count
        for name, value in tensors.items()
    }
    try:
        with replacing(path) as beside:
            about = {"format": "pt"}  # Hugging Face asks for it
            about |= {CONFIG: json.dumps(config)} if config else {}
            save_file(plain, beside, metadata=about)
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise OSError(f"{model}: {path} must be writable, got {why}; free space or pass another path") from error


def problems(name: str, own: Mapping[str, Tensor], state: Mapping[str, Any]) -> list[str]:
    """What keeps `state` from taking the place of the tensors `own`, a line each."""
    found = [f"{name}.{key} is missing" for key in own if key not in state]
    found += [f"{name}.{key} is unknown" for key in state if key not in own]
    wrong = {key: _problem(value, state[key], key in TABLES) for key, value in own.items() if key in state}
    return found + [f"{name}.{key} {why}" for key, why in wrong.items() if why]


def _problem(own: Tensor, theirs: Any, table: bool) -> str:
    if not isinstance(theirs, Tensor):
        return f"is a {type(theirs).__name__}"
    if theirs.is_nested or theirs.layout is not torch.strided:
        return "is no dense tensor"
    if theirs.shape != own.shape:
        return f"has shape {tuple(theirs.shape)}, the model {tuple(own.shape)}"
    if theirs.dtype not in (*FLOATS, torch.float64) and theirs.dtype != own.dtype:
        return f"is of dtype {short(theirs.dtype)}"
    if theirs.is_meta:
        return "is on the meta device"
    if not theirs.to(own.dtype).isfinite().all():
        return "holds values that are not finite"
    other = table and (theirs.to(own) - own).abs().mean() > APART and _untrained(theirs)
    return "holds other positions than the grid's" if other else ""


def _untrained(table: Tensor) -> bool:
    """Whether it is as it was made: rows of sines and cosines are equally long on every grid, and those of zeros."""
    lengths = table.float().square().sum(-1)
    return bool((lengths - lengths.mean()).abs().max() <= 0.002 * lengths.mean())


def load(
    model: str, parts: Mapping[str, tuple[nn.Module, Mapping[str, Any]]], remedy: Callable[[list[str]], str]
) -> None:
    """Load every part {name: (module, state)}, or raise ValueError and load none; remedy: what to do about problems."""
    own = {name: module.state_dict() for name, (module, _) in parts.items()}
    if absent := [f"{name}.{key}" for name, held in own.items() for key, x in held.items() if x.is_meta]:
        fail(model, "model", "hold memory to load into", f"{absent[0]} on the meta device", "build it on a device")
    found = [line for name, (_, state) in parts.items() for line in problems(name, own[name], state)]
    if found:
        fail(model, "checkpoint", "hold exactly the weights of this config", brief(found), remedy(found))
    for module, state in parts.values():
        module.load_state_dict(state)


def brief(found: list[str]) -> str:
    """The first three of many lines, on one."""
    return "; ".join(found[:3]) + (f"; and {len(found) - 3} more" if len(found) > 3 else "")
