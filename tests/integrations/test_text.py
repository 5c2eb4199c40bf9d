"""Texts without padding: packed sequences through BERT of transformers, against the padded batch it takes itself."""

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from jepa_kernels.integrations.huggingface.text import TextEncoder  # noqa: E402

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "go", "to", "the", "green", "key", "door", "and", "open", "it")
TEXTS = ("go to the green key", "door", "open the door and go to it")


@pytest.fixture
def encoder(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=12,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(tmp_path)
    transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    return TextEncoder.from_folder(tmp_path).eval()


def padded(encoder):
    """The mean over each text's own tokens, by the model as transformers runs it."""
    batch = encoder.tokenizer(list(TEXTS), padding=True, return_tensors="pt")
    encoder.model.set_attn_implementation("eager")
    hidden = encoder.model(**batch).last_hidden_state
    encoder.model.set_attn_implementation("jepa_kernels")
    weight = batch["attention_mask"][..., None].to(hidden.dtype)
    return (hidden * weight).sum(1) / weight.sum(1)


def test_packed_texts_equal_padded_ones_with_every_gradient(encoder):
    tokens, packing = encoder.tokens(TEXTS)
    assert packing.lengths == (7, 3, 9) and tokens.shape == (19,)
    found, expected = encoder(tokens, packing), padded(encoder)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    trained = [p for n, p in encoder.model.named_parameters() if "pooler" not in n]
    pairs = (torch.autograd.grad(out.square().sum(), trained) for out in (found, expected))
    for ours, theirs in zip(*pairs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_texts_that_do_not_fit_are_refused(encoder):
    with pytest.raises(ValueError, match=r"TextEncoder: texts must hold words, got ' '; .+"):
        encoder.tokens(["go", " "])
    with pytest.raises(ValueError, match=r"TextEncoder: texts must have at most 12 tokens, got 13: 'go go.+; cut it"):
        encoder.tokens(["go " * 11])
