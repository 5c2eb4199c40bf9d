"""Encoders of sentences: a model of transformers over packed tokens, without padding."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from jepa_kernels._core.check import fail
from jepa_kernels.integrations.huggingface import register_attention, transformers
from jepa_kernels.packing import Packing


def tokenize(
    tokenizer: Any, most: int, texts: Sequence[str], *, device: torch.device | str | None = None
) -> tuple[Tensor, Packing]:
    """`TextEncoder.tokens` without its model, as workers of a data loader call it; most: tokens of a text."""
    if isinstance(texts, str):
        fail("TextEncoder", "texts", "be a list of texts", repr(texts[:40]), "put it into a list", TypeError)
    ids = tokenizer(list(texts))["input_ids"] if len(texts) else []
    for text, own in zip(texts, ids, strict=True):
        if not text.strip():
            fail("TextEncoder", "texts", "hold words", repr(text), "leave it out")
        if len(own) > most:
            fail("TextEncoder", "texts", f"have at most {most} tokens", f"{len(own)}: {text[:40]!r}...", "cut it")
    flat = torch.tensor([i for own in ids for i in own], dtype=torch.int64).to(device)
    return flat, Packing.from_lengths([len(own) for own in ids], device=device)


class TextEncoder(nn.Module):
    """The mean over a text's tokens of an encoder's last hidden state, as sentence embeddings take it.

    model: of transformers, one that sees both ways and hands keywords on to attention (BERT and its kin); tokenizer:
        its own. `from_folder` reads both. Dropout of attention must be 0, as it is in eval mode.
    """

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        super().__init__()
        register_attention()
        model.set_attn_implementation("jepa_kernels")  # type: ignore[operator]
        self.model, self.tokenizer = model, tokenizer

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> TextEncoder:
        """Read config, weights and tokenizer from a folder; nothing is fetched."""
        auto = transformers()
        model = auto.AutoModel.from_pretrained(folder, local_files_only=True, attention_probs_dropout_prob=0.0)
        return cls(model, auto.AutoTokenizer.from_pretrained(folder, local_files_only=True))

    @property
    def embed_dim(self) -> int:
        return self.model.config.hidden_size  # type: ignore[union-attr, return-value]

    def tokens(self, texts: Sequence[str], *, device: torch.device | str | None = None) -> tuple[Tensor, Packing]:
        """What `forward` takes: int64 [T], the texts' tokens one after another, and their packing.

        Raises ValueError for an empty text or one of more tokens than the model has positions.
        """
        most: int = self.model.config.max_position_embeddings  # type: ignore[union-attr, assignment]
        return tokenize(self.tokenizer, most, texts, device=device)

    def forward(self, tokens: Tensor, packing: Packing) -> Tensor:
        """int64 [T] packed -> [S, E]."""
        out = self.model(input_ids=tokens[None], position_ids=packing.place_of_token()[None], packing=packing)
        return packing.mean(out.last_hidden_state[0])
