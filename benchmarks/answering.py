"""VL-JEPA's predictor into rows: inputs and questions of all lengths packed, against its blocks on a padded batch."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import jepa_kernels as jk
from benchmarks.measure import OURS, RIVAL_TOLERANCE, Settings, as_published, verdict, with_backward
from benchmarks.modelrun import ModelRun
from jepa_kernels import testing
from jepa_kernels.models.vl_jepa import Predictor, VLJEPAConfig
from jepa_kernels.nn.decoder import DecoderBlock
from jepa_kernels.packing import pack


@dataclass(frozen=True)
class Answering:
    """Forward and backward of a predictor over one batch.

    name     as in the row
    config   of the predictor, whose weights every contestant has
    shallow  of one with fewer layers, on which parity is checked: in float64 all of them take many seconds
    visual, asked   visual tokens of each input, and tokens of its question
    """

    name: str
    config: VLJEPAConfig
    shallow: VLJEPAConfig
    visual: tuple[int, ...]
    asked: tuple[int, ...]
    smoke: bool = False
    stages: ClassVar[tuple[str, ...]] = ("backward",)
    dtypes: ClassVar[tuple[str, ...]] = ("float32",)
    devices: ClassVar[tuple[str, ...]] = ("cpu",)


class Padded:
    """The predictor's blocks on one padded batch, [visual tokens; question] of each input and then padding: SDPA with a
    mask of the keys that exist, angles computed once for all layers, the mean over what is no padding."""

    def __init__(self, predictor: Predictor, visual: list[Tensor], questions: list[Tensor]):
        self.predictor, self.visual, self.questions = predictor, pack(visual)[0], torch.cat(questions)
        lengths = torch.tensor([len(v) + len(q) for v, q in zip(visual, questions, strict=True)])
        ends = [0, *np.cumsum([len(v) for v in visual]).tolist()]
        starts = [0, *np.cumsum([len(q) for q in questions]).tolist()]
        seen, longest = ends[-1], int(lengths.max())
        rows = torch.full((len(visual), longest), seen + starts[-1])  # the last row is the padding's
        for i, (v, q) in enumerate(zip(visual, questions, strict=True)):
            rows[i, : len(v)] = torch.arange(ends[i], ends[i + 1])
            rows[i, len(v) : len(v) + len(q)] = seen + torch.arange(starts[i], starts[i + 1])
        self.rows, self.exists = rows, torch.arange(longest) < lengths[:, None]
        angles = torch.arange(longest)[:, None] * torch.cat([predictor.frequencies] * 2)
        self.cos, self.sin = angles.cos(), angles.sin()

    def __call__(self) -> Tensor:
        p = self.predictor
        seen, asked = p.visual_proj(self.visual), p.embed_tokens(self.questions)
        tokens = torch.cat([seen, asked, seen.new_zeros(1, seen.shape[1])])
        x = tokens.index_select(0, self.rows.flatten()).view(*self.rows.shape, -1)
        for layer in p.layers:
            x = x + self.attend(layer, layer.input_layernorm(x))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        kept = self.exists[..., None].to(x.dtype)
        return p.out_proj((p.norm(x) * kept).sum(1) / kept.sum(1))

    def attend(self, layer: DecoderBlock, x: Tensor) -> Tensor:
        a = layer.self_attn
        q = self.turn(a.q_proj(x).unflatten(-1, (a.num_heads, -1)).transpose(1, 2))
        k, v = (proj(x).unflatten(-1, (a.num_kv_heads, -1)).transpose(1, 2) for proj in (a.k_proj, a.v_proj))
        k, v = (t.repeat_interleave(a.num_heads // a.num_kv_heads, 1) for t in (self.turn(k), v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.exists[:, None, None])
        return a.o_proj(out.transpose(1, 2).flatten(2))

    def turn(self, x: Tensor) -> Tensor:
        one, two = x.chunk(2, -1)
        return x * self.cos + torch.cat([-two, one], -1) * self.sin


class AnsweringRun(ModelRun):
    """All lengths packed, against a padded batch."""

    kind, rivals, fewest = "predictor", ("padded",), 5

    def __init__(self, name: str, workload: Answering, stage: str, dtype: str, settings: Settings):
        super().__init__(name, workload, stage, dtype, settings)
        g, c = torch.Generator().manual_seed(0), workload.config
        self.visual = [torch.randn(n, c.vision_embed_dim, generator=g) for n in workload.visual]
        self.questions = [torch.randint(c.vocab_size, (n,), generator=g) for n in workload.asked]

    def model(self, config: VLJEPAConfig) -> Predictor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return Predictor(config)

    def ours(self, model: Predictor) -> Callable[[], Tensor]:
        visual, seen = pack(self.visual)
        question, packing = pack(self.questions)
        return lambda: model(visual.to(model.out_proj.weight.dtype), question, packing, seen=seen)

    def padded(self, model: Predictor) -> Callable[[], Tensor]:
        return as_published(Padded(model, self.visual, self.questions))

    def gradients(self, model: Predictor) -> dict[str, Tensor]:
        out = self.ours(model)()
        found = torch.autograd.grad(out.square().mean(), list(model.parameters()))
        names = [f"d{n}" for n, _ in model.named_parameters()]
        return {"out": out.detach(), **dict(zip(names, found, strict=True))}

    def parity(self) -> dict[str, Any]:
        """The predicted embeddings and every gradient of their mean square, within the budget of plain PyTorch."""
        model = self.model(self.workload.shallow)
        ours = self.gradients(model)
        with jk.use_backend("reference"):
            eager, exact = self.gradients(model), self.gradients(copy.deepcopy(model).double())
        return verdict([testing.hold(n, ours[n], exact[n], eager[n]) for n in exact])

    def rival_error(self) -> str | None:
        """Why the padded form's time would mean nothing: it predicts something else."""
        model = self.model(self.workload.shallow)
        with torch.no_grad():
            ours, theirs = self.ours(model)(), self.padded(model)()
        error = (theirs - ours).norm() / ours.norm()
        return None if error <= RIVAL_TOLERANCE[ours.dtype] else f"its embeddings differ by {error:.2g} of their norm"

    def functions(self) -> dict[str, Callable[[], object]]:
        model = self.model(self.workload.config)
        step = partial(with_backward, leaves=list(model.parameters()))
        return {OURS: step(self.ours(model)), "padded": step(self.padded(model))}

    def counted(self) -> dict[str, Any]:
        lengths = np.array(self.workload.visual) + np.array(self.workload.asked)
        tokens, padded = int(lengths.sum()), int(lengths.max()) * len(lengths)
        return dict(tokens=tokens, baseline_tokens=padded, flops=self.flops(lengths))

    def flops(self, lengths: Any) -> float:
        """Forward, and a backward of twice as many but for what is seen."""
        c, tokens, pairs = self.workload.config, lengths.sum(), (lengths**2).sum()
        keys = c.embed_dim * c.num_kv_heads // c.num_heads
        layer = 2 * tokens * (2 * c.embed_dim**2 + 2 * c.embed_dim * keys + 3 * c.embed_dim * c.hidden)
        layers = 3 * c.depth * (layer + 4 * pairs * c.embed_dim)
        ends = 2 * 2 * sum(self.workload.visual) * c.vision_embed_dim * c.embed_dim
        return float(layers + ends + 6 * len(lengths) * c.embed_dim * c.out_dim)
