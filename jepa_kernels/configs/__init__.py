"""Configs of training runs: the shipped YAML files beside this one, and the checks that every config passes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from jepa_kernels._core.check import fail
from jepa_kernels.configs.sections import (
    AVERAGES,
    BEST,
    DEFAULTS,
    ENGINES,
    NONFINITE,
    SCHEDULES,
    SIZES,
    Config,
    TargetOptimization,
)
from jepa_kernels.names import nearest

__all__ = ["BEST", "DEFAULTS", "Config", "TargetOptimization", "flat", "published", "read", "same_run", "shipped"]

FOLDER, PUBLISHED = Path(__file__).parent, "published"
FREE = (
    "data.num_workers",
    "optimization.accumulate",
    "optimization.nonfinite",
)  # may change between parts of a run, as some sections may
T = TypeVar("T")


def shipped() -> list[str]:
    """Names of the configs that come with the package: those that train in minutes, then published runs."""
    return [*sorted(path.stem for path in FOLDER.glob("*.yaml")), *published()]


def published() -> list[str]:
    """Names of the configs of published runs, which say where each number is from."""
    return sorted(path.stem for path in (FOLDER / PUBLISHED).glob("*.yaml"))


def read(source: str, changes: Sequence[str] = ()) -> Config:
    """The config of a shipped name or a YAML file, with `section.key=value` changes; ValueError for what is off."""
    yaml = _yaml()
    tree = _parse(yaml, _path(source).read_text(), source)
    for change in changes:
        _set(tree, change, yaml)
    return _config(tree)


def _set(tree: dict[str, Any], change: str, yaml: Any) -> None:
    key, equals, value = change.partition("=")
    *sections, last = key.split(".")
    place: Any = tree
    for section in sections:
        place = place.setdefault(section, {}) if isinstance(place, dict) else None
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        equals = ""
    if not equals or not isinstance(place, dict):
        fail("train", "--set", "have the form section.key=value", repr(change), "say, optimization.lr=3e-4")
    place[last] = parsed


def _yaml() -> Any:
    from jepa_kernels.data import extra

    return extra("yaml")


def _path(source: str) -> Path:
    if source in shipped():
        return FOLDER / (PUBLISHED if source in published() else ".") / f"{source}.yaml"
    path = Path(source)
    if path.suffix in (".yaml", ".yml") and path.exists():
        return path
    names = shipped()
    remedy = nearest(path.stem, names, "check the spelling")
    fail("train", "config", f"be a YAML file or a shipped name ({', '.join(names)})", repr(source), remedy)


def _parse(yaml: Any, text: str, source: str) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        fail("train", f"config {source}", "be YAML", str(error).replace("\n", " "), "correct the file")
    if not isinstance(tree, dict):
        fail("train", f"config {source}", "be a mapping of sections", type(tree).__name__, "see configs/ijepa.yaml")
    return tree


def _config(tree: dict[str, Any]) -> Config:
    tree = dict(tree)
    architecture = tree.pop("architecture", "ijepa")
    _one_of("architecture", architecture, DEFAULTS)
    defaults = DEFAULTS[architecture]
    model = tree.pop("model", None) or {}
    built: dict[str, Any] = {"model": _fill("model", _sized(defaults, model), model, besides="size")}
    alone = "architecture", "model", "seed", "weights"
    besides = [name for name, value in vars(defaults).items() if name in alone or not value]
    sections = [f.name for f in fields(Config) if f.name not in besides]
    for name in sections:
        built[name] = _fill(name, getattr(defaults, name), tree.pop(name, None) or {})
    built |= {} if defaults.mask else {"mask": None}
    built |= {
        name: _value(name, getattr(defaults, name), tree.pop(name, getattr(defaults, name))) for name in alone[2:]
    }
    config = Config(architecture, **built)
    if tree:
        _unknown("", str(next(iter(tree))), ["architecture", "model", *sections, *alone[2:]])
    _check(config)
    return config


def _sized(defaults: Config, model: Any) -> Any:
    """The networks' config that the other keys of the section change: a named size, or the defaults."""
    if not isinstance(model, Mapping) or "size" not in model:
        return defaults.model
    sizes = SIZES[defaults.architecture]
    _one_of("model.size", model["size"], sizes)
    return sizes[model["size"]]()


def _one_of(name: str, value: Any, known: Iterable[str]) -> None:
    if not isinstance(value, str) or value not in known:
        fail("train", name, f"be one of {', '.join(known)}", repr(value), "check the spelling")


def _fill(section: str, defaults: T, given: Mapping[str, Any], besides: str = "") -> T:
    if not isinstance(given, Mapping):
        fail("train", section, "be a mapping", type(given).__name__, "see configs/ijepa.yaml")
    known = {f.name: getattr(defaults, f.name) for f in fields(defaults)}  # type: ignore[arg-type]
    given = {key: value for key, value in given.items() if key != besides}
    for key in given:
        if key not in known:
            _unknown(section + ".", str(key), list(known))
    switches = {f.name for f in fields(defaults) if f.type == "bool | None"}  # type: ignore[arg-type]
    changed = {
        key: _value(f"{section}.{key}", False if key in switches and value is not None else known[key], value)
        for key, value in given.items()
    }
    return type(defaults)(**{**known, **changed})


def _unknown(where: str, key: str, known: list[str]) -> None:
    remedy = nearest(key, known, "remove it")
    fail("train", "config", f"use known keys ({', '.join(known)})", repr(where + key), remedy)


def _value(name: str, default: Any, value: Any) -> Any:
    """`value` in the type of `default`; YAML reads 1e-3 as text, which counts as a number here."""
    try:
        if isinstance(default, tuple) and isinstance(value, list | tuple):
            if isinstance(default[0], str) and all(isinstance(v, str) for v in value):
                return tuple(value)
            if len(value) == len(default):
                return tuple(float(v) for v in value)
        if isinstance(default, bool) == isinstance(value, bool):
            if isinstance(default, float):
                return float(value)
            if value is default is None or isinstance(value, int if default is None else type(default)):
                return value
    except (TypeError, ValueError):
        pass
    kind = "int" if default is None else type(default).__name__
    if isinstance(default, tuple):
        kind = "a list of names" if isinstance(default[0], str) else f"{len(default)} numbers"
    fail("train", name, f"be {kind}", repr(value), "correct the config", TypeError)


def _check(config: Config) -> None:
    o = config.optimization
    for name, value in flat(config.plain()).items():
        if any(isinstance(x, float) and not math.isfinite(x) for x in (value if isinstance(value, list) else [value])):
            fail("train", name, "be finite", value, "correct the config")
    sizes = {f"model.{key}": size for key, size in vars(config.model).items() if type(size) is int}
    rates = {
        f"optimization.{key}": getattr(o, key)
        for key in ("start_lr", "lr", "final_lr", "weight_decay", "final_weight_decay")
    }
    for name, value, least in (
        *((name, size, 1) for name, size in sizes.items()),
        *((name, rate, 0) for name, rate in rates.items()),
        ("seed", config.seed, 0),
        ("data.batch_size", config.data.batch_size, 2),
        ("data.num_workers", config.data.num_workers, 0),
        ("optimization.steps", o.steps, 1),
        ("optimization.accumulate", o.accumulate, 1),
        ("optimization.max_grad_norm", o.max_grad_norm, 0),
        *((f"logging.{key}", getattr(config.logging, key), 1) for key in ("checkpoint_every", "every", "keep")),
        *((f"probe.{key}", value, 1) for key, value in vars(config.probe).items()),
    ):
        if not value >= least:
            fail("train", name, f"be at least {least}", value, "correct the config")
    for name, share in (
        ("optimization.warmup", o.warmup),
        ("optimization.anneal", o.anneal),
        *(("optimization.ema", momentum) for momentum in getattr(o, "ema", ())),
    ):
        if not 0 <= share <= 1:
            fail("train", name, "lie in [0, 1]", share, "correct the config")
    _one_of("optimization.schedule", o.schedule, SCHEDULES)
    if o.anneal and o.schedule == "cosine":
        fail(
            "train", "optimization.anneal", "be 0 with a cosine schedule", o.anneal, "set optimization.schedule to wsd"
        )
    if o.schedule == "wsd" and o.warmup * o.steps > (1 - o.anneal) * o.ipe_scale * o.steps:
        fail("train", "optimization.anneal", "begin after the warm-up", o.anneal, "lower it, or optimization.warmup")
    _one_of("optimization.nonfinite", o.nonfinite, NONFINITE)
    _one_of("optimization.average", o.average, AVERAGES)
    _one_of("parallel.engine", config.parallel.engine, ENGINES)
    if config.mask is None:
        for name, value, only in (
            ("optimization.average", o.average, "mask"),
            ("parallel.balance", config.parallel.balance, False),
        ):
            if value != only:
                requirement = f"be {str(only).lower()} for {config.architecture}, which has no masks"
                fail("train", name, requirement, value, "leave it out")
    elif config.parallel.balance and config.mask.truncate and not config.mask.truncate_group:
        requirement = "be false with mask.truncate, where all images have as many patches"
        fail("train", "parallel.balance", requirement, True, "leave out one of them, or set mask.truncate_group")
    if config.logging.best:
        _one_of("logging.best", config.logging.best, BEST)
    if o.ipe_scale < 1:
        fail("train", "optimization.ipe_scale", "be at least 1", o.ipe_scale, "the published values are 1 and 1.25")


def same_run(saved: Any, now: Mapping[str, Any], path: Path) -> None:
    """Refuse to continue a run with another config: only logging, the probe, what runs in parallel and FREE may change.

    What a checkpoint of before does not name had its default's value.
    """
    flat_saved, flat_now = flat(saved if isinstance(saved, Mapping) else {}), flat(now)
    if flat_saved.get("architecture") == now["architecture"]:
        flat_saved = {**flat(DEFAULTS[now["architecture"]].plain()), **flat_saved}
    for key in sorted({*flat_saved, *flat_now}):
        if key.split(".")[0] in ("logging", "parallel", "probe") or key in FREE:
            continue
        if flat_saved.get(key) != flat_now.get(key):
            actual = f"{key} = {flat_saved.get(key)} in the checkpoint, {flat_now.get(key)} now"
            fail("train", f"checkpoint {path}", "be of this config", actual, "pass the run's options, or another --out")


def flat(tree: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, of dotted names."""
    flattened: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flattened.update(flat(value, name + ".") if isinstance(value, Mapping) else {name: value})
    return flattened
