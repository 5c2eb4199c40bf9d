"""VL-JEPA: predict the embedding of an answer from what is seen and a question about it.

Source: Chen et al., VL-JEPA: Joint Embedding Predictive Architecture for Vision-language (arXiv:2512.10942). Its code
and weights are not public: sizes are those of the paper, whose predictor is made of the last blocks of Llama 3.2 1B.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from typing import Any, ClassVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

import jepa_kernels as jk
from jepa_kernels._core.check import INT64, check_tensor, fail
from jepa_kernels.models import checkpoints
from jepa_kernels.models.checkpoints import LoadReport, Source
from jepa_kernels.nn.decoder import NORM_EPS, DecoderBlock, llama_frequencies
from jepa_kernels.nn.linear import Linear
from jepa_kernels.nn.sync import one_batch
from jepa_kernels.packing import Packing
from jepa_kernels.pairs import Pairs
from jepa_kernels.rotary import Rope

EMBEDDING_STD = 0.5
LLAMA_3 = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@dataclass(frozen=True)
class VLJEPAConfig:
    """Sizes of the predictor and of the embeddings that are compared; the paper's unless given.

    vision_embed_dim, text_embed_dim: what the encoders of pixels and of answers give.
    rope_scaling: of `llama_frequencies`. temperature: of the loss at the start; learned, by its logarithm, where
        learn_temperature is set. text_scale: share of the learning rate at which the encoder of answers is trained; 0:
        it stays as it is.
    """

    untold: ClassVar[tuple[str, ...]] = ("num_heads", "num_kv_heads", "rope_theta", "rope_scaling")  # by weights

    vision_embed_dim: int = 1024  # V-JEPA 2, ViT-L
    text_embed_dim: int = 768  # EmbeddingGemma 300M
    embed_dim: int = 2048
    depth: int = 8
    num_heads: int = 32
    num_kv_heads: int = 8
    hidden: int = 8192
    vocab_size: int = 128256
    out_dim: int = 1536
    rope_theta: float = 500000.0
    rope_scaling: Mapping[str, float] | None = None
    temperature: float = 0.07
    learn_temperature: bool = True
    text_scale: float = 0.05


def llama_1b(**changes: Any) -> VLJEPAConfig:
    return replace(VLJEPAConfig(rope_scaling=LLAMA_3), **changes)


SIZES: dict[str, Callable[..., VLJEPAConfig]] = {f.__name__: f for f in (llama_1b,)}


class Predictor(nn.Module):
    """From what is seen and the tokens of a question to the embedding of its answer.

    y = out_proj(mean over tokens of norm(blocks([visual_proj(visual); embed_tokens(question)])))

    Every token sees all of its sequence; positions count from its first visual token. Sequences of all lengths go
    through in one packed pass: no padding is computed.
    """

    frequencies: Tensor

    def __init__(self, config: VLJEPAConfig) -> None:
        super().__init__()
        c = config
        self.visual_proj = Linear(c.vision_embed_dim, c.embed_dim)
        self.embed_tokens = nn.Embedding(c.vocab_size, c.embed_dim)
        self.layers = nn.ModuleList(
            DecoderBlock(c.embed_dim, c.num_heads, c.num_kv_heads, c.hidden) for _ in range(c.depth)
        )
        self.norm = nn.RMSNorm(c.embed_dim, eps=NORM_EPS)
        self.out_proj = Linear(c.embed_dim, c.out_dim)
        frequencies = llama_frequencies(c.embed_dim // c.num_heads, c.rope_theta, c.rope_scaling)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.apply(_init_weights)

    def forward(
        self,
        visual: Tensor,
        question: Tensor,
        packing: Packing,
        pairs: Pairs | None = None,
        seen: Packing | None = None,
    ) -> Tensor:
        """visual [B, N, Ev]; question int64 [T], the tokens of B questions packed by `packing` -> [B, out_dim].

        seen: of inputs of different lengths, images and clips together: visual is [Tv, Ev] then, packed by it.
        pairs: built from the lengths when left out; pass it in compiled code.
        """
        lengths = self._check(visual, question, packing, seen)
        if pairs is None:
            pairs = Pairs.from_lengths(lengths, packing.lengths, device=visual.device)
        tokens = torch.cat([self.visual_proj(visual.flatten(0, -2)), self.embed_tokens(question)])
        x, rope = tokens.index_select(0, pairs.source), self._rope(pairs.packing)
        for layer in self.layers:
            x = cast(DecoderBlock, layer)(x, pairs.packing, rope)
        return self.out_proj(pairs.packing.mean(self.norm(x)))

    def _check(self, visual: Tensor, question: Tensor, packing: Packing, seen: Packing | None) -> Sequence[int]:
        """How many visual tokens each input has."""
        check_tensor("VLJEPA", "visual", visual, "B N Ev" if seen is None else "Tv Ev")
        check_tensor("VLJEPA", "question", question, "T", dtypes=INT64, device=visual.device)
        if seen is not None and seen.tokens != visual.shape[0]:
            fail("VLJEPA", "seen", f"pack {visual.shape[0]} visual tokens", seen.tokens, "pack them with their lengths")
        inputs = visual.shape[0] if seen is None else seen.sequences
        if packing.sequences != inputs:
            wanted = f"hold {inputs} questions, one for each input"
            fail("VLJEPA", "packing", wanted, packing.sequences, "repeat inputs or questions")
        return [visual.shape[1]] * inputs if seen is None else seen.lengths

    def _rope(self, packing: Packing) -> Rope:
        return Rope(packing.place_of_token()[:, None].float(), pairing="half", frequencies=self.frequencies)


def _init_weights(module: nn.Module) -> None:
    """Llama's start, 0.02 at its width of 2048, at any width: narrow networks that start so small hardly learn to look.

    Vectors of tokens begin as long as those of what is seen, so that a question counts from the first step on.
    """
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=module.in_features**-0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=EMBEDDING_STD)


@dataclass(frozen=True)
class Texts:
    """A batch's questions and the answers that there are to them, as tokens without padding.

    question: int64 [T], of B questions, packed by question_packing. answer: of the distinct answers, so that none is
    encoded twice, packed by answer_packing. identity: int64 [S], a number of each distinct answer, the same on every
    rank; equal ones are no negatives of one another. which: int64 [B], the answer to each question.
    """

    question: Tensor
    question_packing: Packing
    answer: Tensor
    answer_packing: Packing
    identity: Tensor
    which: Tensor

    @classmethod
    def of(
        cls, tokens: Callable[[Sequence[str]], tuple[Tensor, Packing]], asked: Sequence[str], said: Sequence[str]
    ) -> Texts:
        """Of a batch's questions `asked` and answers `said`; tokens: of texts, such as `TextEncoder.tokens`."""
        if len(asked) != len(said):
            fail("VLJEPA", "answers", f"be one for each of {len(asked)} questions", len(said), "repeat or drop some")
        distinct = sorted(set(said))
        digests = [blake2b(text.encode(), digest_size=8).digest() for text in distinct]
        identity = torch.tensor([int.from_bytes(d, "little", signed=True) for d in digests], dtype=torch.int64)
        which = torch.tensor([distinct.index(text) for text in said], dtype=torch.int64)
        return cls(*tokens(asked), *tokens(distinct), identity, which)

    def to(self, device: torch.device | str) -> Texts:
        question, answer = self.question.to(device), self.answer.to(device)
        packings = self.question_packing.to(device), self.answer_packing.to(device)
        return Texts(question, packings[0], answer, packings[1], self.identity.to(device), self.which.to(device))


class VLJEPA(nn.Module):
    """A frozen encoder of pixels, a predictor, and an encoder of answers, compared by symmetric InfoNCE.

    vision: pixels -> [B, N, Ev], such as an `Encoder`; it gets no gradient and stays in eval mode.
    text: an encoder of answers, (tokens int64 [T], packing) -> [S, Et], such as `TextEncoder`; the paper trains it at
        0.05 of the predictor's learning rate: see `parameter_groups`.

    The loss is jk.info_nce(predicted, answered, temperature); rows of equal answers are no negatives of one another.
    group: ranks whose pairs are told from one another; None: all ranks, where a default group has been initialised.
        Gradients averaged by DistributedDataParallel are then those of one process with the whole batch.
    """

    inputs = "questions"

    def __init__(
        self, config: VLJEPAConfig, vision: nn.Module, text: nn.Module, *, group: dist.ProcessGroup | None = None
    ) -> None:
        super().__init__()
        self.config, self.vision, self.text, self._group = config, vision.requires_grad_(False).eval(), text, group
        if not 0 <= config.text_scale < math.inf:
            fail("VLJEPA", "text_scale", "be at least 0", config.text_scale, "0 keeps the text encoder as it is")
        if not 0 < config.temperature < math.inf:
            fail("VLJEPA", "temperature", "be greater than 0", config.temperature, "0.07 is usual")
        if not config.text_scale:
            text.requires_grad_(False).eval()
        self.predictor = Predictor(config)
        self.text_proj = Linear(config.text_embed_dim, config.out_dim)
        self.log_temperature = nn.Parameter(
            torch.tensor(config.temperature).log(), requires_grad=config.learn_temperature
        )

    def train(self, mode: bool = True) -> VLJEPA:
        super().train(mode)
        self.vision.eval()
        if not self.config.text_scale:
            self.text.eval()
        return self

    @property
    def group(self) -> dist.ProcessGroup | None:
        """Ranks whose pairs count as one batch; None: this process alone."""
        return one_batch(self._group)

    @torch.no_grad()
    def see(self, pixels: Tensor) -> Tensor:
        """What the frozen encoder gives, [B, N, Ev]: the same for every question, so it may be kept."""
        return self.vision(pixels)

    def predict(self, visual: Tensor, question: Tensor, packing: Packing, seen: Packing | None = None) -> Tensor:
        """The predicted embedding of each answer: visual as of `see`, packed questions -> [B, out_dim].

        seen: see `Predictor`.
        """
        return self.predictor(visual, question, packing, seen=seen)

    def answer(self, tokens: Tensor, packing: Packing) -> Tensor:
        """The embedding of each text: packed int64 [T] -> [S, out_dim]."""
        return self.text_proj(self.text(tokens, packing))

    def forward(self, pixels: Tensor, texts: Texts) -> tuple[Tensor, Tensor]:
        """Predicted embeddings of the answers, and the answers' own: both [B, out_dim]."""
        if texts.answer_packing.sequences < 2 and self.group is None:
            wanted, remedy = "hold at least 2 pairs of different answers", "one has nothing to be told from"
            fail("VLJEPA", "texts", wanted, texts.answer_packing.sequences, remedy)
        predicted = self.predict(self.see(pixels), texts.question, texts.question_packing)
        return predicted, self.answer(texts.answer, texts.answer_packing).index_select(0, texts.which)

    def objective(self, outputs: tuple[Tensor, Tensor], pixels: Tensor, texts: Texts) -> Tensor:
        """The loss, an fp32 scalar, of what `forward` gives."""
        items = texts.identity.index_select(0, texts.which)
        return jk.info_nce(*outputs, self.log_temperature.exp(), duplicates=items, group=self.group)

    def loss(self, pixels: Tensor, texts: Texts) -> Tensor:
        """Symmetric InfoNCE of a batch, an fp32 scalar; equal answers are no negatives. Arguments: as of `forward`."""
        return self.objective(self(pixels, texts), pixels, texts)

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """What an optimiser takes: the predictor and the projections at `lr`, the text encoder at text_scale * lr."""
        text = [p for p in self.text.parameters() if p.requires_grad]
        known = {id(p) for p in text}
        rest = [p for p in self.parameters() if p.requires_grad and id(p) not in known]
        groups = [{"params": rest, "lr": lr}, {"params": text, "lr": self.config.text_scale * lr}]
        return [group for group in groups if group["params"]]

    def load(self, source: Source) -> LoadReport:
        """Load a file of `save`, or this model's state dict, whole or not at all; encoders and all.

        source: as of `JEPA.load`. Raises ValueError, and loads nothing, for weights that do not fit or are not finite,
        and for a file of `save` of another config in what no weight tells, such as the heads.
        """
        state = checkpoints.read("VLJEPA", source)
        checkpoints.check_untold("VLJEPA", self.config, self.config.untold, source, "build the model of these")
        checkpoints.load("VLJEPA", {"model": (self, state)}, lambda _: "build the model with the sizes that it is of")
        return LoadReport("VLJEPA", "its own layout", tuple(state), {}, {})

    def save(self, path: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> None:
        """Write all weights, and the config as JSON in the metadata, to a .safetensors file, whole or not at all.

        dtype: of the file; None: the weights' own. Raises ValueError and OSError as `JEPA.save` does.
        """
        checkpoints.write("VLJEPA", path, self.state_dict(), dtype, asdict(self.config))
