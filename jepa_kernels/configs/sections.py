"""The sections of a training run's config, and what each recipe's config has where a file says nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from jepa_kernels.models import ijepa, lejepa, lewm, vjepa2
from jepa_kernels.models.ijepa import IJEPAConfig
from jepa_kernels.models.lejepa import ViTConfig
from jepa_kernels.models.lewm import LeWMConfig
from jepa_kernels.models.vjepa2 import VJEPA2Config
from jepa_kernels.rooms.answers import RoomsConfig
from jepa_kernels.video import VIDEOS

ENGINES = "ddp", "fsdp"
NONFINITE = "stop", "skip"
SCHEDULES = "cosine", "wsd"
AVERAGES = "mask", "token"
BEST = {"loss": "lowest", "std": "highest", "rank": "highest"}  # of the log: which value of its mean is the best


@dataclass(frozen=True)
class Data:
    batch_size: int = 64  # of all processes together
    num_workers: int = 0


@dataclass(frozen=True)
class PhotoData(Data):
    """Crops of the bundled photos; see data.PhotoCrops."""

    crop_scale: tuple[float, float] = (0.3, 1.0)
    crop_ratio: tuple[float, float] = (0.75, 1.3333)
    horizontal_flip: bool = True
    grey: float = 0.0
    root: str = ""  # a folder of your own images in place of the photos, see images.Folder
    held_out: float = 0.1  # of these, the share of each class that the probe is asked about


@dataclass(frozen=True)
class ClipData(Data):
    """Clips of videos; see video.VideoClips."""

    batch_size: int = 24
    crop_scale: tuple[float, float] = (0.3, 1.0)
    crop_ratio: tuple[float, float] = (0.75, 1.35)
    horizontal_flip: bool = True
    grey: float = 0.0
    frame_step: int = 4
    fps: int = 0  # frames a second, or the video's own where these are fewer, in place of frame_step
    videos: tuple[str, ...] = tuple(VIDEOS)  # or files, folders of them, lists of them (.txt, .csv)
    whole: bool = (
        False  # clips of whole videos, decoded anew one by one, so that lists may be long; no probes: none is held out
    )


@dataclass(frozen=True)
class EpisodeData(Data):
    """Windows of PushT's episodes; see pusht.Windows."""

    batch_size: int = 128
    episodes: int = 500
    steps: int = 40  # of an episode
    frame_skip: int = 5
    collect_seed: int = 0


@dataclass(frozen=True)
class ViewData(Data):
    """Views of photos or digits; see views.Views."""

    batch_size: int = 256
    source: str = "photos"  # or "mnist"
    root: str = ""
    held_out: float = 0.1
    global_views: int = 2
    local_views: int = 6
    local_size: int = 56
    region_scale: tuple[float, float] = (0.1, 0.6)
    global_scale: tuple[float, float] = (0.3, 1.0)
    local_scale: tuple[float, float] = (0.05, 0.3)
    crop_ratio: tuple[float, float] = (0.75, 1.3333)
    horizontal_flip: bool = True
    grey: float = 0.2
    jitter: float = 0.4
    hue: float = 0.0
    blur: float = 0.0
    solarize: float = 0.0


@dataclass(frozen=True)
class RoomData(Data):
    """Rooms and questions; see rooms.scenes.Scenes."""

    batch_size: int = 32
    side: int = 4
    objects: int = 3


@dataclass(frozen=True)
class Optimization:
    """The published schedules; the defaults are those of the I-JEPA paper, per step instead of per epoch."""

    steps: int = 1000
    warmup: float = 40 / 300  # share of the steps
    start_lr: float = 2e-4
    lr: float = 1e-3
    final_lr: float = 1e-6
    schedule: str = "cosine"  # of the learning rate, from `lr` to `final_lr`; or "wsd": it is held, then falls linearly
    anneal: float = 0.0  # with "wsd", share of ipe_scale x steps in which it falls: the last ones
    weight_decay: float = 0.04
    final_weight_decay: float = 0.4
    ipe_scale: float = 1.0
    use_bfloat16: bool = False  # networks under autocast; the target's weights are kept rounded, not cast at each step
    max_grad_norm: float = 0.0  # of all gradients together; 0: they are not clipped
    nonfinite: str = "stop"  # or "skip": what a step does whose gradients are not all finite; weights never take them
    accumulate: int = 1  # parts that a process takes its share of a batch in, one after another
    average: str = "mask"  # of losses: over each mask's tokens, then over masks, as published; "token": over all tokens


@dataclass(frozen=True)
class TargetOptimization(Optimization):
    """Of a model with a target encoder, which follows with these momenta."""

    ema: tuple[float, float] = (0.996, 1.0)


@dataclass(frozen=True)
class Parallel:
    """How several processes share a run, and what saves memory; a result depends on it by rounding alone.

    engine: "ddp": each process holds all weights. "fsdp": each holds a part of every weight (FSDP2).
    activation_checkpointing: blocks keep their inputs alone, and run again in the backward pass.
    compile: blocks by torch.compile, see nn.compile_blocks: not those of LeWorldModel's predictor and VL-JEPA's. None:
        on a GPU, where a step is bound by what they fuse.
    balance: images, or clips, go to the processes and parts so that all have as much to do; see training.balance. Else
        they go in order. Either way the batch and its loss are the same.
    """

    engine: str = "ddp"
    activation_checkpointing: bool = False
    compile: bool | None = None
    balance: bool = False


@dataclass(frozen=True)
class Logging:
    """Which checkpoints stay.

    best: "", or the score, of BEST, whose best checkpoint stays besides the last ones: the mean of the log since the
        checkpoint before.
    """

    checkpoint_every: int = 50  # steps
    every: int = 10  # steps between looks at the target encoder's distance
    keep: int = 2  # the last ones
    best: str = ""


@dataclass(frozen=True)
class Mask:
    """See masks.MultiBlock2d."""

    target_scale: tuple[float, float] = (0.15, 0.2)
    target_aspect_ratio: tuple[float, float] = (0.75, 1.5)
    context_scale: tuple[float, float] = (0.85, 1.0)
    num_targets: int = 4
    min_keep: int = 10
    truncate: bool = False
    truncate_group: int = 0
    bucket: int = 0


@dataclass(frozen=True)
class ClipMask:
    """The two kinds of masks of V-JEPA, each as masks.Spec3d has it; truncate and bucket as masks.MultiBlock3d does."""

    short_num_blocks: int = 8
    short_spatial_scale: tuple[float, float] = (0.15, 0.15)
    long_num_blocks: int = 2
    long_spatial_scale: tuple[float, float] = (0.7, 0.7)
    aspect_ratio: tuple[float, float] = (0.75, 1.5)
    truncate: bool = False
    truncate_group: int = 0
    bucket: int = 0


@dataclass(frozen=True)
class Probe:
    """See probe.photos; probe.digits reads the seeds alone."""

    seeds: int = 5
    per_photo: int = 20


@dataclass(frozen=True)
class ClipProbe:
    """See probe.clips."""

    seeds: int = 5
    per_video: int = 50


@dataclass(frozen=True)
class StateProbe:
    """See pusht.probes."""

    fitted_on: int = 100  # of the training's episodes
    held_out: int = 40


@dataclass(frozen=True)
class AnswerProbe:
    """See rooms.answers.probes and rooms.stream.compare."""

    questions: int = 1000
    fitted_on: int = 2000
    streams: int = 10
    frames: int = 100


@dataclass(frozen=True)
class Config:
    """A training run: everything that its result depends on. `architecture` tells the types of the sections."""

    architecture: str = "ijepa"
    model: IJEPAConfig | VJEPA2Config | LeWMConfig | ViTConfig | RoomsConfig = field(default_factory=IJEPAConfig)
    data: Data = field(default_factory=PhotoData)
    mask: Mask | ClipMask | None = field(default_factory=Mask)  # None: everything is seen
    optimization: Optimization = field(default_factory=TargetOptimization)
    parallel: Parallel = field(default_factory=Parallel)
    logging: Logging = field(default_factory=Logging)
    probe: Probe | ClipProbe | StateProbe | AnswerProbe = field(default_factory=Probe)
    seed: int = 0
    weights: str = ""  # a file of weights that a run begins with, as `save` and the published ones are

    def plain(self) -> dict[str, Any]:
        """As JSON has it: mappings, lists, numbers."""
        return json.loads(json.dumps(asdict(self)))


# What a config leaves out: the models' own values.
DEFAULTS = {
    "ijepa": Config(),
    "vjepa2": Config(
        architecture="vjepa2",
        model=VJEPA2Config(),
        data=ClipData(),
        mask=ClipMask(),
        optimization=TargetOptimization(
            start_lr=1e-4,
            lr=5.25e-4,
            final_lr=5.25e-4,
            final_weight_decay=0.04,
            ema=(0.99925, 0.99925),
        ),
        probe=ClipProbe(),
    ),
    "lewm": Config(
        architecture="lewm",
        model=LeWMConfig(),
        data=EpisodeData(),
        mask=None,
        optimization=Optimization(
            warmup=0.0, start_lr=5e-5, lr=5e-5, final_lr=5e-5, weight_decay=1e-3, final_weight_decay=1e-3
        ),
        probe=StateProbe(),
    ),
    "lejepa": Config(
        architecture="lejepa",
        model=ViTConfig(),
        data=ViewData(),
        mask=None,
        optimization=Optimization(lr=5e-4, weight_decay=5e-2, final_weight_decay=5e-2),
        probe=Probe(),
    ),
    "vl_jepa": Config(
        architecture="vl_jepa",
        model=RoomsConfig(),
        data=RoomData(),
        mask=None,
        optimization=Optimization(warmup=0.05, start_lr=0.0, lr=1e-3, final_lr=0.0, final_weight_decay=0.04),
        probe=AnswerProbe(),
    ),
}
SIZES: dict[str, Mapping[str, Callable[..., Any]]] = {
    "ijepa": ijepa.SIZES,
    "vjepa2": vjepa2.SIZES,
    "lewm": lewm.SIZES,
    "lejepa": lejepa.SIZES,
    "vl_jepa": {"rooms": RoomsConfig},
}
