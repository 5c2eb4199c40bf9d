"""Encoders of sentences: a model of transformers over packed tokens, without padding."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from jepa_kernels._core.check import fail
from jepa_kernels.integrations.huggingface import register_attention, transformers
from jepa_kernels.integrations.huggingface.implementations import run_in_any_type
from jepa_kernels.integrations.patching import evaluate_in
from jepa_kernels.packing import Packing

CLOSE = 1e-3  # of hidden states in float32: rounding is far below, and other texts that are seen far above


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
    .first: the position of a text's first token: 0, or after that of padding, as in RoBERTa.

    Raises ValueError, and leaves the model as it was, if it does not give of two texts packed what it gives of each.
    """

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        super().__init__()
        register_attention()
        self.first = _first_position(model)
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
        return tokenize(self.tokenizer, most - self.first, texts, device=device)

    def forward(self, tokens: Tensor, packing: Packing) -> Tensor:
        """int64 [T] packed -> [S, E]."""
        return packing.mean(_hidden(self.model, tokens, packing, self.first))


def _hidden(model: Any, tokens: Tensor, packing: Packing, first: int) -> Tensor:
    """The last hidden state [T, E]."""
    positions = packing.place_of_token() + first
    return model(input_ids=tokens[None], position_ids=positions[None], packing=packing).last_hidden_state[0]


def _first_position(model: Any) -> int:
    """Where positions begin, told by numbers; the model takes our attention, or is as it was."""
    own, after = model.config._attn_implementation, (model.config.pad_token_id or 0) + 1
    tokens = (after + torch.arange(5, device=model.device)) % model.config.vocab_size
    packing = Packing.from_lengths([3, 2], device=tokens.device)

    def apart(model: Any) -> dict[str, Tensor]:
        return {"": torch.cat([model(input_ids=text[None]).last_hidden_state[0] for text in packing.split(tokens)])}

    def together(model: Any, first: int) -> dict[str, Tensor]:
        return {"": _hidden(model, tokens, packing, first)}

    expected = evaluate_in(torch.float32, model, partial(run_in_any_type, run=apart))[""]
    try:
        model.set_attn_implementation("jepa_kernels")
        for first in (0, after):
            found = evaluate_in(torch.float32, model, partial(together, first=first))
            if (found[""] - expected).norm() <= CLOSE * expected.norm():
                return first
        remedy = "take one that hands `packing` on to attention, as BERT and RoBERTa do"
        fail("TextEncoder", "model", "give of packed texts what it gives of each", type(model).__name__, remedy)
    except BaseException:
        model.set_attn_implementation(own)
        raise
