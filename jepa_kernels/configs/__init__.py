"""Configs of training runs: the shipped YAML files beside this one, and the checks that every config passes."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from jepa_kernels._core.check import fail
from jepa_kernels.models.ijepa import SIZES, IJEPAConfig

FOLDER = Path(__file__).parent
T = TypeVar("T")


@dataclass(frozen=True)
class Data:
    """Crops of the bundled photos; see data.PhotoCrops."""

    batch_size: int = 64
    crop_scale: tuple[float, float] = (0.3, 1.0)
    crop_ratio: tuple[float, float] = (0.75, 1.3333)
    horizontal_flip: bool = True
    grey: float = 0.0
    num_workers: int = 0


@dataclass(frozen=True)
class Optimization:
    """I-JEPA's schedules; the defaults are the paper's, per step instead of per epoch."""

    steps: int = 1000
    warmup: float = 40 / 300  # share of the steps
    start_lr: float = 2e-4
    lr: float = 1e-3
    final_lr: float = 1e-6
    weight_decay: float = 0.04
    final_weight_decay: float = 0.4
    ema: tuple[float, float] = (0.996, 1.0)
    ipe_scale: float = 1.0
    use_bfloat16: bool = False  # networks under autocast; the target's weights are kept rounded, not cast at each step


@dataclass(frozen=True)
class Logging:
    checkpoint_every: int = 50  # steps


@dataclass(frozen=True)
class Mask:
    """See masks.MultiBlock2d."""

    target_scale: tuple[float, float] = (0.15, 0.2)
    target_aspect_ratio: tuple[float, float] = (0.75, 1.5)
    context_scale: tuple[float, float] = (0.85, 1.0)
    num_targets: int = 4
    min_keep: int = 10
    truncate: bool = False


@dataclass(frozen=True)
class Probe:
    """See probe.run."""

    seeds: int = 5
    per_photo: int = 20


@dataclass(frozen=True)
class Config:
    """A training run: everything that its result depends on."""

    model: IJEPAConfig = field(default_factory=IJEPAConfig)
    data: Data = field(default_factory=Data)
    mask: Mask = field(default_factory=Mask)
    optimization: Optimization = field(default_factory=Optimization)
    logging: Logging = field(default_factory=Logging)
    probe: Probe = field(default_factory=Probe)
    seed: int = 0

    def plain(self) -> dict[str, Any]:
        """As JSON has it: mappings, lists, numbers."""
        return json.loads(json.dumps(asdict(self)))


def shipped() -> list[str]:
    """Names of the configs that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


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
        return FOLDER / f"{source}.yaml"
    path = Path(source)
    if path.suffix in (".yaml", ".yml") and path.exists():
        return path
    names = shipped()
    near = difflib.get_close_matches(path.stem, names, n=1)
    remedy = f"did you mean {near[0]}?" if near else "check the spelling"
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
    model = tree.pop("model", None) or {}
    size = model.get("size", "vit_small") if isinstance(model, Mapping) else "vit_small"
    if not isinstance(size, str) or size not in SIZES:
        fail("train", "model.size", f"be one of {', '.join(SIZES)}", repr(size), "check the spelling")
    built: dict[str, Any] = {"model": _fill("model", SIZES[size](), model, besides="size")}
    sections = {"data": Data, "mask": Mask, "optimization": Optimization, "logging": Logging, "probe": Probe}
    for name, section in sections.items():
        built[name] = _fill(name, section(), tree.pop(name, None) or {})
    config = Config(**built, seed=_value("seed", 0, tree.pop("seed", 0)))
    if tree:
        _unknown("", str(next(iter(tree))), ["model", *sections, "seed"])
    _check(config)
    return config


def _fill(section: str, defaults: T, given: Mapping[str, Any], besides: str = "") -> T:
    if not isinstance(given, Mapping):
        fail("train", section, "be a mapping", type(given).__name__, "see configs/ijepa.yaml")
    known = {f.name: getattr(defaults, f.name) for f in fields(defaults)}  # type: ignore[arg-type]
    given = {key: value for key, value in given.items() if key != besides}
    for key in given:
        if key not in known:
            _unknown(section + ".", str(key), list(known))
    changed = {key: _value(f"{section}.{key}", known[key], value) for key, value in given.items()}
    return type(defaults)(**{**known, **changed})


def _unknown(where: str, key: str, known: list[str]) -> None:
    near = difflib.get_close_matches(key, known, n=1)
    remedy = f"did you mean {near[0]}?" if near else "remove it"
    fail("train", "config", f"use known keys ({', '.join(known)})", repr(where + key), remedy)


def _value(name: str, default: Any, value: Any) -> Any:
    """`value` in the type of `default`; YAML reads 1e-3 as text, which counts as a number here."""
    try:
        if isinstance(default, tuple) and isinstance(value, list | tuple) and len(value) == len(default):
            return tuple(float(v) for v in value)
        if isinstance(default, bool) == isinstance(value, bool):
            if isinstance(default, float):
                return float(value)
            if isinstance(default, bool) or (isinstance(default, int) and isinstance(value, int)):
                return value
    except (TypeError, ValueError):
        pass
    kind = f"{len(default)} numbers" if isinstance(default, tuple) else type(default).__name__
    fail("train", name, f"be {kind}", repr(value), "correct the config", TypeError)


def _check(config: Config) -> None:
    o = config.optimization
    sizes = {f"model.{key}": size for key, size in vars(config.model).items() if isinstance(size, int)}
    rates = {f"optimization.{key}": getattr(o, key) for key in ("start_lr", "lr", "final_lr", "weight_decay")}
    for name, value, least in (
        *((name, size, 1) for name, size in sizes.items()),
        *((name, rate, 0) for name, rate in rates.items()),
        ("seed", config.seed, 0),
        ("data.batch_size", config.data.batch_size, 2),
        ("data.num_workers", config.data.num_workers, 0),
        ("optimization.steps", o.steps, 1),
        ("logging.checkpoint_every", config.logging.checkpoint_every, 1),
        ("probe.seeds", config.probe.seeds, 1),
        ("probe.per_photo", config.probe.per_photo, 1),
    ):
        if not value >= least:
            fail("train", name, f"be at least {least}", value, "correct the config")
    for name, share in (
        ("optimization.warmup", o.warmup),
        ("optimization.ema", o.ema[0]),
        ("optimization.ema", o.ema[1]),
    ):
        if not 0 <= share <= 1:
            fail("train", name, "lie in [0, 1]", share, "correct the config")
    if o.ipe_scale < 1:
        fail("train", "optimization.ipe_scale", "be at least 1", o.ipe_scale, "the published values are 1 and 1.25")


def same_run(saved: Any, now: Mapping[str, Any], path: Path) -> None:
    """Refuse to continue a run with another config: only logging and the probe may change."""
    flat_saved, flat_now = flat(saved if isinstance(saved, Mapping) else {}), flat(now)
    for key in sorted({*flat_saved, *flat_now}):
        if key.split(".")[0] in ("logging", "probe") or key == "data.num_workers":
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
