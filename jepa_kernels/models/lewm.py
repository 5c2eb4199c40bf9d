"""LeWorldModel: a world model of one token a frame, trained end to end from pixels without a target network.

Source: LeWorldModel (arXiv:2603.19312). Parameter names and semantics are those of the published code, but for training
with dropout: there attention's weights are dropped too, here never. The encoder's names are this library's, and its
published ones, Hugging Face's, are read too.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jepa_kernels._core.check import fail
from jepa_kernels.models import checkpoints
from jepa_kernels.models.checkpoints import LoadReport, Source
from jepa_kernels.models.layouts import LEWM, recognise, to_huggingface
from jepa_kernels.models.sizes import HEAD_DIM, size_of_lewm
from jepa_kernels.models.world import Context, check_actions, check_context, refuse_grad
from jepa_kernels.nn import BatchNorm1d, SIGReg
from jepa_kernels.nn.actions import ActionEncoder, InverseDynamics
from jepa_kernels.nn.class_encoder import ClassEncoder
from jepa_kernels.nn.conditional import ConditionalPredictor, Net
from jepa_kernels.nn.linear import Linear
from jepa_kernels.nn.patch_embed import IMAGENET_MEAN, IMAGENET_STD

NETWORKS = ("encoder", "projector", "action_encoder", "predictor", "pred_proj")
UNTOLD = ("num_heads", "predictor_num_heads", "predictor_head_dim")  # fields that no weight tells


@dataclass(frozen=True)
class LeWMConfig:
    """Sizes of the networks, and what training asks of them; the last three fields are as published by default."""

    crop_size: int = 224  # pixels per side
    patch_size: int = 14
    in_chans: int = 3
    embed_dim: int = 192  # of the encoder and of embeddings
    depth: int = 12
    num_heads: int = 3
    mlp_ratio: float = 4.0
    projector_hidden: int = 2048
    action_dim: int = 10  # PushT's: two numbers for each of the 5 steps between frames
    action_hidden: int = 10
    history: int = 3  # frames that the predictor sees
    predictor_depth: int = 6
    predictor_num_heads: int = 16
    predictor_head_dim: int = HEAD_DIM
    predictor_hidden: int = 2048
    dropout: float = 0.1  # in training, of what the predictor's branches add; as published, but for attention's weights
    sigreg_weight: float = 0.09
    rollout_steps: int = 1  # frames after the history that training predicts, all but the first from predictions
    inverse_weight: float = 0.0  # of inverse dynamics in the loss; 0: no such network
    inverse_hidden: int = 256


def vit_tiny(**changes: Any) -> LeWMConfig:
    """The published one: 18 M parameters, of which the paper counts 15 M."""
    return replace(LeWMConfig(), **changes)


def pusht(**changes: Any) -> LeWMConfig:
    """One that trains on two CPU cores in minutes: 64 pixels a side, two numbers an action."""
    encoder = dict(crop_size=64, patch_size=8, embed_dim=64, depth=3, num_heads=2, mlp_ratio=2.0)
    predictor = dict(predictor_depth=2, predictor_num_heads=4, predictor_head_dim=32, predictor_hidden=512)
    others = dict(projector_hidden=512, action_dim=2, dropout=0.0)
    return vit_tiny(**{**encoder, **predictor, **others, **changes})


SIZES: dict[str, Callable[..., LeWMConfig]] = {f.__name__: f for f in (vit_tiny, pusht)}


def _projector(width: int, hidden: int) -> Net:
    return Net(Linear(width, hidden), BatchNorm1d(hidden), nn.GELU(), Linear(hidden, width))


def _check_config(c: LeWMConfig) -> None:
    if not isinstance(c.rollout_steps, int) or c.rollout_steps < 1:
        fail("LeWorldModel", "rollout_steps", "be a whole number from 1 on", c.rollout_steps, "1 trains as published")
    if not 0 <= c.inverse_weight < math.inf or c.inverse_hidden < 1:
        given, remedy = (c.inverse_weight, c.inverse_hidden), "0 leaves inverse dynamics out"
        fail("LeWorldModel", "inverse_weight and inverse_hidden", "be finite, from 0 and 1 on", given, remedy)
    if c.crop_size % c.patch_size:
        fail("LeWorldModel", "crop_size", f"be a multiple of {c.patch_size}", c.crop_size, "change patch_size too")


class LeWorldModel(nn.Module):
    """Embeds frames, one token each, and predicts the next one's embedding from three and the actions taken in them.

    Frames are uint8, or floating in 0..1; ImageNet's mean and standard deviation are taken out on the way in.
    A `World`: plan with it in evaluation mode, in which batch norms use what they saw in training.
    """

    inputs = "windows"  # what a batch holds, in messages

    def __init__(self, config: LeWMConfig | None = None) -> None:
        super().__init__()
        self.config = c = LeWMConfig() if config is None else config
        _check_config(c)
        self.action_dim = c.action_dim
        sizes = c.crop_size, c.patch_size, c.embed_dim, c.depth, c.num_heads, c.mlp_ratio, c.in_chans
        self.encoder = ClassEncoder(*sizes, mean=IMAGENET_MEAN, std=IMAGENET_STD)
        self.projector = _projector(c.embed_dim, c.projector_hidden)
        self.action_encoder = ActionEncoder(c.action_dim, c.action_hidden, c.embed_dim)
        heads = c.predictor_num_heads, c.predictor_head_dim
        self.predictor = ConditionalPredictor(
            c.history, c.embed_dim, c.predictor_depth, *heads, c.predictor_hidden, c.dropout
        )
        self.pred_proj = _projector(c.embed_dim, c.projector_hidden)
        self.sigreg = SIGReg()
        self.inverse = InverseDynamics(c.embed_dim, c.inverse_hidden, c.action_dim) if c.inverse_weight else None

    def embed(self, frames: Tensor) -> Tensor:
        """frames [..., C, H, W] -> their embeddings [..., E]."""
        c = self.config
        if frames.shape[-3:] != (c.in_chans, c.crop_size, c.crop_size):
            wanted = f"be [..., {c.in_chans}, {c.crop_size}, {c.crop_size}]"
            fail("LeWorldModel", "frames", wanted, tuple(frames.shape), "resize them to the model's crop_size")
        return self.projector(self.encoder(frames.flatten(0, -4))).unflatten(0, frames.shape[:-3])

    def forward(self, frames: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """frames [B, T, C, H, W], actions [B, T - 1, A], T at most history + rollout_steps ->
        (predictions of frames 2 to T [B, T - 1, E], embeddings of all [B, T, E]).

        The first `history` predictions are of true frames alone; each of the others follows the `history` frames
        before it, of which those after frame `history` are predictions themselves, as a planner's are. Batch norms
        take these step by step, so that in training they need two rows.
        Raises ValueError for shapes that are not the model's, and for one frame alone, which leaves nothing to predict.
        """
        history, most = self.config.history, self.config.history + self.config.rollout_steps
        if frames.dim() != 5 or not 2 <= frames.shape[1] <= most:
            wanted = f"be [B, T, C, H, W] of T in 2..{most}"
            fail("LeWorldModel", "frames", wanted, tuple(frames.shape), f"the predictor sees {history}, and the next")
        if self.training and len(frames) < 2 and frames.shape[1] > history + 1:
            remedy = "batch norms tell the rows of a step apart"
            fail("LeWorldModel", "frames", "hold at least 2 windows to be rolled out in training", len(frames), remedy)
        embeddings = self.embed(frames)
        if actions.shape[:-1] != (len(frames), frames.shape[1] - 1) or actions.shape[-1] != self.action_dim:
            wanted = f"have shape {(len(frames), frames.shape[1] - 1, self.action_dim)}"
            fail("LeWorldModel", "actions", wanted, tuple(actions.shape), "pass those taken between the frames")
        embedded = self.action_encoder(actions)
        forced = self.predictor(embeddings[:, :-1][:, :history], embedded[:, :history])
        forced = self.pred_proj(forced.flatten(0, 1)).view_as(forced)
        known = torch.cat([embeddings[:, : forced.shape[1]], forced[:, -1:]], 1)
        return torch.cat([forced, self._continued(known, embedded)[:, known.shape[1] :]], 1), embeddings

    def objective(self, outputs: tuple[Tensor, Tensor], frames: Tensor, actions: Tensor) -> Tensor:
        """The loss, an fp32 scalar, of what `forward` gives."""
        predicted, embeddings = (x.float() for x in outputs)
        error = F.mse_loss(predicted, embeddings[:, 1:])  # gradients reach both sides
        loss = error + self.config.sigreg_weight * self.sigreg(embeddings.transpose(0, 1).contiguous())
        if self.inverse is not None:
            read = self.inverse(outputs[1]).float()
            loss = loss + self.config.inverse_weight * F.mse_loss(read, actions.float())
        return loss

    def loss(self, frames: Tensor, actions: Tensor) -> Tensor:
        """Mean squared error of the predicted embeddings + sigreg_weight * sigreg of each frame's in the batch
        + inverse_weight * mean squared error of the actions that `inverse` reads out of true frames' embeddings.

        Without a stop-gradient: SIGReg keeps embeddings from collapsing. Arguments: as of `forward`.
        """
        return self.objective(self(frames, actions), frames, actions)

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """frames [..., T, C, H, W] -> latents [..., T, 1, E], without gradient."""
        self._check_evaluation()
        return self.embed(frames).unsqueeze(-2)

    def imagine(self, context: Context, samples: int, horizon: int) -> Callable[[Tensor], Tensor]:
        """Prepare a plan: actions [S, horizon, A] -> latents [S, horizon, 1, E] of the frames after the context's last.

        Every step computes the last `history` frames anew, at places from 0 on: nothing is cached, shapes do not depend
        on values, the device is never waited for. Fewer samples or steps than said are taken as well. Latents and
        actions are cast to the weights' dtype. Raises RuntimeError where gradients are recorded, ValueError for
        arguments that do not fit; see `unroll` for gradients.
        """
        refuse_grad("LeWorldModel")
        self._check_evaluation()
        latents, embedded = self._past(context)

        def imagined(actions: Tensor) -> Tensor:
            refuse_grad("LeWorldModel")
            check_actions("LeWorldModel", actions, self.action_dim, samples, horizon)
            return self._rollout(latents, embedded, actions)

        return imagined

    def unroll(self, context: Context, actions: Tensor) -> Tensor:
        """The same numbers as `imagine`'s, with gradients: actions [S, horizon, A] -> [S, horizon, 1, E]."""
        self._check_evaluation()
        check_actions("LeWorldModel", actions, self.action_dim)
        return self._rollout(*self._past(context), actions)

    def _past(self, context: Context) -> tuple[Tensor, Tensor]:
        """Embeddings [1, t, E] of the context's last t frames that count, and of the actions [1, t - 1, E] in them."""
        check_context("LeWorldModel", context, 1, self.config.embed_dim)
        latents, actions = context.latents.to(self.predictor.pos_embedding.dtype), context.actions
        wanted = latents.shape[0] - 1, self.action_dim
        if actions is None:
            actions = latents.new_empty(0, self.action_dim)
        if actions.shape != wanted:
            remedy = "pass those taken between the frames"
            fail("LeWorldModel", "context.actions", f"have shape {wanted}", tuple(actions.shape), remedy)
        kept = min(latents.shape[0], self.config.history)
        return latents[-kept:, 0][None], self.action_encoder(actions[len(actions) - kept + 1 :])[None]

    def _rollout(self, latents: Tensor, embedded: Tensor, actions: Tensor) -> Tensor:
        """Frame after frame, each from the `history` before it."""
        seen, samples = latents.shape[1], actions.shape[0]
        embedded = torch.cat([embedded.expand(samples, -1, -1), self.action_encoder(actions)], 1)
        latents = latents.expand(samples, -1, -1)
        return self._continued(latents, embedded)[:, seen:, None]

    def _continued(self, latents: Tensor, embedded: Tensor) -> Tensor:
        """Embeddings [S, t, E], and those of t - 1 + n actions, -> [S, t + n, E]: each from the `history` before it."""
        for end in range(latents.shape[1], embedded.shape[1] + 1):
            first = max(0, end - self.config.history)
            following = self.predictor(latents[:, first:], embedded[:, first:end])[:, -1]
            latents = torch.cat([latents, self.pred_proj(following)[:, None]], 1)
        return latents

    def _check_evaluation(self) -> None:
        if self.training:
            remedy = "call .eval(): batch norms would mix the samples"
            fail("LeWorldModel", "the model", "be in evaluation mode", "training mode", remedy)

    def load(self, source: Source) -> LoadReport:
        """Load the published `weights.pt`, a file of `save`, or this model's state dict, whole or not at all.

        source: as of `JEPA.load`. Raises ValueError, and loads nothing, for weights that do not fit or are not finite,
        and for a file of `save` whose heads are others.
        """
        name = type(self).__name__
        found = recognise(name, checkpoints.read(name, source))
        checkpoints.check_untold(name, self.config, UNTOLD, source, "build the model by from_checkpoint")
        optional = {"sigreg": "its count of steps is left as it was", "inverse": "it is left as it was"}
        own_parts = [network for network in optional if getattr(self, network) is not None]
        wanted = [*NETWORKS, *(network for network in own_parts if network in found.networks)]
        parts = {network: (getattr(self, network), found.networks.get(network, {})) for network in wanted}
        others = {network: "no network of this model" for network in found.networks if network not in parts}
        checkpoints.load(name, parts, lambda _: "build the model by from_checkpoint")
        loaded = tuple(f"{network}.{key}" for network, (_, state) in parts.items() for key in state)
        missing = {network: optional[network] for network in own_parts if network not in parts}
        return LoadReport(name, found.layout.title, loaded, {**found.ignored, **others}, missing)

    @classmethod
    def from_checkpoint(cls, source: Source, **changes: Any) -> tuple[LeWorldModel, LoadReport]:
        """Build the model that a checkpoint holds the weights of, load it, and put it in evaluation mode.

        A file of `save` holds its config. Of others sizes come from the shapes, and heads are 64 wide, as published.
        changes: fields of the config. Raises ValueError as `load` does.
        """
        state, config = checkpoints.read(cls.__name__, source), checkpoints.config_in(cls.__name__, source)
        config = config or size_of_lewm(recognise(cls.__name__, state).networks)
        checkpoints.check_fields(cls.__name__, LeWMConfig, config, changes)
        model = cls(replace(LeWMConfig(), **{**config, **changes}))
        return model, (model.load(state), model.eval())[0]

    def save(self, path: str | os.PathLike[str], layout: str = "meta", *, dtype: torch.dtype | None = None) -> None:
        """Write the weights, and the config as JSON in the metadata, to a .safetensors file, whole or not at all.

        layout: "meta": this model's names; "huggingface": the published ones, as `weights.pt` has them, without config
            and inverse dynamics.
        dtype: of the file; None: the weights' own. Raises ValueError and OSError as `JEPA.save` does.
        """
        name = type(self).__name__
        if layout not in ("meta", "huggingface"):
            fail(name, "layout", "be meta or huggingface", repr(layout), "leave it out for this model's names")
        tensors, config = self.state_dict(), asdict(self.config)
        if layout == "huggingface":
            networks = {network: getattr(self, network).state_dict() for network in NETWORKS}
            tensors, config = to_huggingface(name, LEWM, networks), {}
        checkpoints.write(name, path, tensors, dtype, config)
