"""VL-JEPA: predict the embedding of an answer from what is seen and a question about it.

Source: Chen et al., VL-JEPA: Joint Embedding Predictive Architecture for Vision-language (arXiv:2512.10942). Its code
and weights are not public: sizes are those of the paper, whose predictor is made of the last blocks of Llama 3.2 1B.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

import jepa_kernels as jk
from jepa_kernels._core.check import INT64, check_tensor, fail
from jepa_kernels.nn.decoder import NORM_EPS, DecoderBlock, llama_frequencies
from jepa_kernels.packing import Packing
from jepa_kernels.pairs import Pairs
from jepa_kernels.rotary import Rope

LLAMA_3 = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@dataclass(frozen=True)
class VLJEPAConfig:
    """Sizes of the predictor and of the embeddings that are compared; the paper's unless given.

    vision_embed_dim, text_embed_dim: what the encoders of pixels and of answers give.
    rope_scaling: of `llama_frequencies`. temperature: of the loss at the start; learned, by its logarithm, where
        learn_temperature is set.
    """

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
        self.visual_proj = nn.Linear(c.vision_embed_dim, c.embed_dim)
        self.embed_tokens = nn.Embedding(c.vocab_size, c.embed_dim)
        self.layers = nn.ModuleList(
            DecoderBlock(c.embed_dim, c.num_heads, c.num_kv_heads, c.hidden) for _ in range(c.depth)
        )
        self.norm = nn.RMSNorm(c.embed_dim, eps=NORM_EPS)
        self.out_proj = nn.Linear(c.embed_dim, c.out_dim)
        frequencies = llama_frequencies(c.embed_dim // c.num_heads, c.rope_theta, c.rope_scaling)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.apply(_init_weights)

    def forward(self, visual: Tensor, question: Tensor, packing: Packing, pairs: Pairs | None = None) -> Tensor:
        """visual [B, N, Ev]; question int64 [T], the tokens of B questions packed by `packing` -> [B, out_dim].

        pairs: built from the lengths when left out; pass it in compiled code.
        """
        check_tensor("VLJEPA", "visual", visual, "B N Ev")
        batch, seen, _ = visual.shape
        check_tensor("VLJEPA", "question", question, "T", dtypes=INT64, device=visual.device)
        if packing.cu_seqlens.shape[0] != batch + 1:
            count = packing.cu_seqlens.shape[0] - 1
            fail(
                "VLJEPA", "packing", f"hold {batch} questions, one for each input", count, "repeat inputs or questions"
            )
        if pairs is None:
            pairs = Pairs.from_lengths([seen] * batch, packing.lengths, device=visual.device)
        tokens = torch.cat([self.visual_proj(visual).flatten(0, 1), self.embed_tokens(question)])
        x, rope = tokens.index_select(0, pairs.source), self._rope(pairs.packing)
        for layer in self.layers:
            x = cast(DecoderBlock, layer)(x, pairs.packing, rope)
        return self.out_proj(pairs.packing.mean(self.norm(x)))

    def _rope(self, packing: Packing) -> Rope:
        return Rope(packing.place_of_token()[:, None].float(), pairing="half", frequencies=self.frequencies)


def _init_weights(module: nn.Module) -> None:
    """Llama's start."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


class VLJEPA(nn.Module):
    """A frozen encoder of pixels, a predictor, and an encoder of answers, compared by symmetric InfoNCE.

    vision: pixels -> [B, N, Ev], such as an `Encoder`; it gets no gradient and stays in eval mode.
    text: an encoder of answers, (tokens int64 [T], packing) -> [B, Et], such as `TextEncoder`; the paper trains it at
        0.05 of the predictor's learning rate: see `parameter_groups`.

    The loss is jk.info_nce(predicted, answered, temperature); rows of equal answers are no negatives of one another.
    """

    def __init__(self, config: VLJEPAConfig, vision: nn.Module, text: nn.Module) -> None:
        super().__init__()
        self.config, self.vision, self.text = config, vision.requires_grad_(False).eval(), text
        self.predictor = Predictor(config)
        self.text_proj = nn.Linear(config.text_embed_dim, config.out_dim)
        self.log_temperature = nn.Parameter(
            torch.tensor(config.temperature).log(), requires_grad=config.learn_temperature
        )

    def train(self, mode: bool = True) -> VLJEPA:
        super().train(mode)
        self.vision.eval()
        return self

    @torch.no_grad()
    def see(self, pixels: Tensor) -> Tensor:
        """What the frozen encoder gives, [B, N, Ev]: the same for every question, so it may be kept."""
        return self.vision(pixels)

    def forward(self, visual: Tensor, question: Tensor, packing: Packing) -> Tensor:
        """The predicted embedding of each answer: visual as of `see`, packed questions -> [B, out_dim]."""
        return self.predictor(visual, question, packing)

    def answer(self, tokens: Tensor, packing: Packing) -> Tensor:
        """The embedding of each text: packed int64 [T] -> [S, out_dim]."""
        return self.text_proj(self.text(tokens, packing))

    def loss(
        self,
        visual: Tensor,
        question: tuple[Tensor, Packing],
        answer: tuple[Tensor, Packing],
        duplicates: Tensor | None = None,
    ) -> Tensor:
        """The training loss, an fp32 scalar.

        duplicates: int64 [B], equal where answers are: see `info_nce`.
        """
        predicted, answered = self(visual, *question), self.answer(*answer)
        return jk.info_nce(predicted, answered, self.log_temperature.exp(), duplicates=duplicates)

    def parameter_groups(self, lr: float, *, text_scale: float = 0.05) -> list[dict[str, Any]]:
        """What an optimiser takes: the predictor and the projections at `lr`, the text encoder at text_scale * lr."""
        text = [p for p in self.text.parameters() if p.requires_grad]
        known = {id(p) for p in text}
        rest = [p for p in self.parameters() if p.requires_grad and id(p) not in known]
        return [{"params": rest, "lr": lr}, {"params": text, "lr": text_scale * lr}]
