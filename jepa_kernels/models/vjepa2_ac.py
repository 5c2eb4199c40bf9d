"""V-JEPA 2-AC: a frozen encoder, and a predictor of the next frame's latents from the frames and actions so far.

Source: Assran et al., V-JEPA 2 (arXiv:2506.09985), section 3; the predictor with adaptive layer norm: JEPA-WMs
(arXiv:2512.24497). Parameter names and semantics are those of the published code.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa_kernels import poses
from jepa_kernels._core.check import fail
from jepa_kernels.models import checkpoints, world_losses
from jepa_kernels.models.checkpoints import TABLES, LoadReport, Source
from jepa_kernels.models.layouts import ENCODERS, JEPA_WM, Checkpoint, recognise
from jepa_kernels.models.sizes import check_config, config_for, describe, model_of, size_of
from jepa_kernels.models.world import Context, check_actions, check_context, refuse_grad
from jepa_kernels.nn import ActionPredictor, Encoder
from jepa_kernels.nn.encoder import frames_of
from jepa_kernels.nn.patch_embed import IMAGENET_MEAN, IMAGENET_STD
from jepa_kernels.nn.rollout import Rollout, Seen, WindowRollout, begin

NextState = Callable[[Tensor, Tensor], Tensor]  # (state [S, Ds], action [S, A]) -> [S, Ds]
STEERING = "conditioning", "action_dim", "state_dim", "extrinsics_dim", "use_extrinsics", "rope", "rope_grid"
NAME = "WorldModel"
CPU_TOKENS = 2048  # about so many, of a frame of several samples, go through the predictor together


@dataclass(frozen=True)
class WorldModelConfig:
    """Sizes of the networks; those of the published V-JEPA 2-AC unless given.

    crop_size: a side or (height, width); no weight depends on it: build the model with that of the frames.
    num_frames: of the longest clip; each frame seen or imagined counts for a whole tubelet: 32 in all.
    mean, std: of each channel, applied to frames on the way in, in units of 0..1 for uint8, else of the pixels; None:
        frames are normalised already.
    conditioning, action_dim, state_dim, extrinsics_dim, use_extrinsics, rope, rope_grid: as of `ActionPredictor`.
    normalize: latents and predictions are layer-normalised, without affine, as of V-JEPA 2-AC.
    distance: of predictions to latents in losses, "l1" or "l2".
    window: `imagine` and `unroll` predict from the last frames alone, so many, numbered from 0 anew; None: from all.
    """

    crop_size: int | tuple[int, int] = 256
    num_frames: int = 64
    patch_size: int = 16
    tubelet_size: int = 2
    in_chans: int = 3
    embed_dim: int = 1408
    depth: int = 40
    num_heads: int = 22
    mlp_ratio: float = 48 / 11
    predictor_embed_dim: int = 1024
    predictor_depth: int = 24
    predictor_num_heads: int = 16
    conditioning: str = "tokens"
    action_dim: int = 7
    state_dim: int | None = 7
    extrinsics_dim: int | None = 6
    use_extrinsics: bool = False
    rope: str = "tiled"
    rope_grid: int | None = 16
    normalize: bool = True
    distance: str = "l1"
    window: int | None = None
    mean: tuple[float, ...] | None = IMAGENET_MEAN
    std: tuple[float, ...] | None = IMAGENET_STD


def vit_giant(**changes: Any) -> WorldModelConfig:
    """The published V-JEPA 2-AC, `vjepa2-ac-vitg.pt`."""
    return replace(WorldModelConfig(), **changes)


def vj2ac_droid(**changes: Any) -> WorldModelConfig:
    """JEPA-WMs' "fixed" V-JEPA 2-AC: no state token, up to 512 frames, planned from two."""
    return vit_giant(**{"num_frames": 1024, "state_dim": None, "window": 2, **changes})


def jepa_wm_droid(**changes: Any) -> WorldModelConfig:
    """JEPA-WMs' predictor with adaptive layer norm, for latents of ViT-L's width (theirs are DINOv3's); window 2."""
    encoder = dict(embed_dim=1024, depth=24, num_heads=16, mlp_ratio=4.0, predictor_depth=12)
    steering = dict(conditioning="adaln", state_dim=None, extrinsics_dim=None, normalize=False, distance="l2", window=2)
    return vit_giant(**{**encoder, **steering, **changes})


SIZES: dict[str, Callable[..., WorldModelConfig]] = {f.__name__: f for f in (vit_giant, vj2ac_droid, jepa_wm_droid)}


class WorldModel(nn.Module):
    """Imagines the latents of the frames that actions lead to. A `World`, as planners take it.

    .encoder: V-JEPA 2's, frozen; each frame is shown for a whole tubelet. .predictor: `ActionPredictor`, trained.
    next_state: what a state [S, Ds] becomes by an action [S, A], for models with state tokens; None: for poses and
        actions of 7 numbers `poses.next_pose`, as published.
    .grid: (Gh, Gw), the patches of a frame. .max_frames: that the model takes, seen and imagined.

    Frames are [..., T, C, H, W], latents [..., T, N, E]. Frame t's action is the one taken in it: it leads to t + 1.
    """

    published_name: ClassVar[str] = "V-JEPA 2-AC"

    def __init__(self, config: WorldModelConfig | None = None, *, next_state: NextState | None = None) -> None:
        super().__init__()
        c = WorldModelConfig() if config is None else config
        if c.distance not in ("l1", "l2"):
            fail(NAME, "distance", "be l1 or l2", repr(c.distance), "V-JEPA 2-AC was trained with l1")
        self.config, self.action_dim = c, c.action_dim
        self.max_frames = frames_of(NAME, c.num_frames, c.tubelet_size)
        if c.window is not None and not 1 <= c.window <= self.max_frames:
            fail(NAME, "window", f"lie in 1..{self.max_frames}, or be None", c.window, "num_frames bounds it")
        sizes = c.crop_size, c.patch_size, c.embed_dim, c.depth, c.num_heads, c.mlp_ratio, c.in_chans
        self.encoder = Encoder(*sizes, tubelet_size=c.tubelet_size, rope=c.rope, mean=c.mean, std=c.std)
        self.encoder.requires_grad_(False)
        height, width = self.encoder.grid
        self.grid = height, width
        widths = c.embed_dim, c.predictor_embed_dim, c.predictor_depth, c.predictor_num_heads
        self.predictor = ActionPredictor(self.grid, *widths, **{name: getattr(c, name) for name in STEERING})
        if next_state is None and c.state_dim == c.action_dim == poses.POSE_DIM:
            next_state = poses.next_pose
        self.next_state = next_state

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """Latents of each frame by itself: [..., T, C, H, W], uint8 or floating -> [..., T, N, E]."""
        height, width = (side * self.config.patch_size for side in self.grid)
        wanted = self.config.in_chans, height, width
        if not isinstance(frames, Tensor) or frames.dim() not in (4, 5) or tuple(frames.shape[-3:]) != wanted:
            given = tuple(frames.shape) if isinstance(frames, Tensor) else type(frames).__name__
            fail(NAME, "frames", f"be [..., T, {', '.join(map(str, wanted))}]", given, "set crop_size to theirs")
        latents = self.encoder(frames.flatten(0, -4))
        return self._normed(latents).unflatten(0, frames.shape[:-3])

    def forward(
        self, latents: Tensor, actions: Tensor, states: Tensor | None = None, extrinsics: Tensor | None = None
    ) -> Tensor:
        """Predict the latents after every frame, from it and all before it.

        latents [B, T, N, E], actions [B, T, A], states [B, T, Ds], extrinsics [B, T, Dx] -> [B, T, N, E].
        Raises ValueError for shapes that are not the model's; the number of frames is free.
        """
        self._check(tuple(latents.shape[:2]), latents=latents, actions=actions, states=states, extrinsics=extrinsics)
        return self._normed(self.predictor(latents, actions, states, extrinsics))

    def loss(self, frames: Tensor, actions: Tensor, states: Tensor | None = None, **options: Any) -> Tensor:
        """`world_losses.teacher_forcing_and_rollout`, V-JEPA 2-AC's, of clips, or of their latents from `encode`."""
        return world_losses.teacher_forcing_and_rollout(self, self._encoded(frames), actions, states, **options)

    def prefix_loss(self, frames: Tensor, actions: Tensor, states: Tensor | None = None, **options: Any) -> Tensor:
        """`world_losses.rollouts_of_prefixes`, JEPA-WMs', of clips, or of their latents from `encode`."""
        return world_losses.rollouts_of_prefixes(self, self._encoded(frames), actions, states, **options)

    def imagine(self, context: Context, samples: int, horizon: int) -> Callable[[Tensor], Tensor]:
        """Prepare a plan: actions [S, horizon, A] -> latents [S, horizon, N, E] of the frames after the context's last.

        Equal to `forward` on all frames so far, step by step, but every frame goes through the predictor once: keys and
        values of earlier ones are kept, and what all samples share is computed here, for every call (see `Rollout`).
        With a `window` that the frames exceed, a step is `forward` of the last frames, all computed anew. Latents are
        cast to the weights' dtype, once. Fewer samples and steps may be given; a camera stays as it was last. No host
        sync, and no buffer moves: a CUDA graph can capture calls.

        Memory: 2 L D numbers for each token of T - 1 + horizon frames of every sample; of the published size in bf16
        25.4 MB a frame, 10.1 GB for a frame of 400 samples. On a CPU samples take turns, a few at a time, in one such
        buffer, so that what they work on stays in its caches.
        Raises ValueError for a context or actions that do not fit the model, and for more frames than it takes;
        RuntimeError where gradients are recorded: `unroll` has them.
        """
        refuse_grad(NAME)
        self._check_context(context, horizon)
        turns = max(1, round(samples * self.predictor.frame_tokens / CPU_TOKENS)) if context.latents.is_cpu else 1
        turn = math.ceil(samples / turns)
        rollout = self._rollout(context, horizon, turn)

        def imagined(actions: Tensor) -> Tensor:
            refuse_grad(NAME)
            check_actions(NAME, actions, self.action_dim, samples, horizon)
            return torch.cat([self._futures(rollout, context, some) for some in actions.split(turn)])

        return imagined

    def unroll(self, context: Context, actions: Tensor) -> Tensor:
        """`imagine` with gradients: actions [S, horizon, A] -> [S, horizon, N, E]; errors as there.

        Keys and values are tensors of the graph here, each kept once: every frame goes through the predictor once too,
        and memory is linear in the frames.
        """
        check_actions(NAME, actions, self.action_dim)
        self._check_context(context, horizon := actions.shape[1])
        return self._futures(self._rollout(context, horizon, None), context, actions)

    def load(self, source: Source) -> LoadReport:
        """Load `vjepa2-ac-vitg.pt`, a file of JEPA-WMs or of `save`, or this model's state dict; report what became of
        it.

        source: as of `JEPA.load`; names may have any prefixes of wrappers. Of two encoders the target's is taken: the
        published file holds one twice. JEPA-WMs' hold none: the model's is left as it is. Raises ValueError, and loads
        nothing, for anything that does not fit: another model or size, missing or unknown names, values that are not
        finite, a config of `save` that differs in what weights do not tell.
        """
        found = _recognised(source)
        check_config(NAME, asdict(self.config), checkpoints.config_in(NAME, source))
        networks = found.networks
        chosen = next((n for n in ("target_encoder", "encoder") if n in networks), "")
        ignored = {**found.ignored, **{n: f"the {chosen} is taken" for n in networks if n not in (chosen, "predictor")}}
        encoder = networks.get(chosen, {})
        ignored |= {f"{chosen}.{t}": "rotary positions take its place" for t in TABLES if t in encoder}
        kept = {name: value for name, value in encoder.items() if name not in TABLES}
        missing = {} if chosen else {"encoder": "left as it was"}
        parts: dict[str, tuple[nn.Module, dict[str, Any]]] = {"encoder": (self.encoder, kept)} if chosen else {}
        parts["predictor"] = self.predictor, networks["predictor"]
        size = f"its {'encoder' if chosen else 'predictor'} seems to be {describe(SIZES, size_of(networks))}"
        checkpoints.load(NAME, parts, lambda _: f"{size}: see from_checkpoint")
        loaded = tuple(f"{network}.{name}" for network, (_, own) in parts.items() for name in own)
        return LoadReport(NAME, found.layout.title, loaded, ignored, missing)

    @classmethod
    def from_checkpoint(
        cls, source: Source, *, next_state: NextState | None = None, **changes: Any
    ) -> tuple[WorldModel, LoadReport]:
        """Build the model that a checkpoint holds the weights of, and load it.

        A file of `save` holds its config. Of others shapes tell sizes and tokens; heads are those of the published size
        of these widths, and so is a whole encoder that the file lacks, at a random start. changes: fields of the
        config, such as crop_size. Raises ValueError as `load` does.
        """
        state = checkpoints.read(NAME, source)
        given, found = {**checkpoints.config_in(NAME, source), **changes}, _recognised(state)
        sizes = {n: SIZES[n] for n in ("vj2ac_droid", "jepa_wm_droid")} if found.layout is JEPA_WM else SIZES
        model = cls(config_for(NAME, sizes, found.networks, given), next_state=next_state)
        report = model.load(state)
        return model, replace(report, missing=dict.fromkeys(report.missing, "at its random start"))

    def save(self, path: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> None:
        """Write weights and config to a .safetensors file, whole or not at all: `encoder.blocks.0...`.

        dtype: of the file; None: the weights' own. Raises ValueError and OSError as `JEPA.save` does.
        """
        checkpoints.write(NAME, path, self.state_dict(), dtype, asdict(self.config))

    def _rollout(self, c: Context, horizon: int, sequences: int | None) -> Rollout | WindowRollout:
        latents = c.latents.to(self.predictor.predictor_norm.weight.dtype)
        seen, window = Seen(latents, c.actions, c.states, c.extrinsics), self.config.window
        return begin(self.predictor, seen, horizon, window=window, sequences=sequences)

    def _futures(self, rollout: Rollout | WindowRollout, context: Context, actions: Tensor) -> Tensor:
        """Of each sample's actions [S, steps, A], frame after frame."""
        found: list[Tensor] = []
        state = None if context.states is None else context.states[-1:].expand(len(actions), -1)
        for n, action in enumerate(actions.unbind(1)):
            if n and state is not None:
                state = cast(NextState, self.next_state)(state, actions[:, n - 1])
            found.append(self._normed(rollout.step(n, action, found[-1] if found else None, state)))
        return torch.stack(found, 1)

    def _normed(self, latents: Tensor) -> Tensor:
        return F.layer_norm(latents, latents.shape[-1:]) if self.config.normalize else latents

    def _encoded(self, frames: Tensor) -> Tensor:
        return self.encode(frames) if frames.dim() == 5 else frames

    def _check_context(self, c: Context, horizon: int) -> None:
        check_context(NAME, c, self.grid[0] * self.grid[1], self.config.embed_dim)
        frames = len(c.latents)
        self._check((frames,), states=c.states, extrinsics=c.extrinsics)
        if frames > 1 or c.actions is not None:
            self._check((frames - 1,), actions=c.actions)
        most = self.max_frames - frames + 1  # the last one imagined is not predicted from
        if horizon < 1 or (self.config.window is None and horizon > most):
            wanted = f"lie in 1..{most}: the model takes {self.max_frames} frames, of which {frames} are seen"
            fail(NAME, "horizon", wanted, horizon, "plan fewer steps, or build the model with more num_frames")
        if horizon > 1 and c.states is not None and self.next_state is None:
            wanted = f"be given for states of {self.config.state_dim} and actions of {self.action_dim} numbers"
            fail(NAME, "next_state", wanted, None, "pass WorldModel(config, next_state=...)")

    def _check(self, leading: tuple[int, ...], **given: Tensor | None) -> None:
        """Each of its shape behind the leading axes, or None where the model has no place for it."""
        c, patches = self.config, self.grid[0] * self.grid[1]
        own: dict[str, tuple[int | None, ...]] = {
            "latents": (patches, c.embed_dim),
            "actions": (self.action_dim,),
            "states": (c.state_dim,),
            "extrinsics": (c.extrinsics_dim if c.use_extrinsics else None,),
        }
        for name, x in given.items():
            shape = None if None in own[name] else (*leading, *own[name])
            found = None if x is None else tuple(x.shape)
            if found != shape:
                fail(NAME, name, f"be {'None' if shape is None else shape}", found, "see the model's config")


def _recognised(source: Source) -> Checkpoint:
    found = recognise(NAME, checkpoints.read(NAME, source))
    kind = model_of(found.networks)
    if kind not in (None, WorldModel.published_name):
        size = describe(SIZES, size_of(found.networks))
        fail(NAME, "checkpoint", f"be of {WorldModel.published_name}", f"one of {kind}, {size}", "build that model")
    if "predictor" not in found.networks or not (found.layout is JEPA_WM or found.networks.keys() & set(ENCODERS)):
        held, remedy = ", ".join(found.networks) or "nothing", "pass a file of V-JEPA 2-AC"
        fail(NAME, "checkpoint", "hold an encoder and a predictor", held, remedy)
    return found
