"""Texts without padding: packed sequences through BERT of transformers, against the padded batch it takes itself."""

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from jepa_kernels.integrations.huggingface.text import TextEncoder  # noqa: E402
from jepa_kernels.packing import Packing  # noqa: E402

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


SMALL = dict(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
OTHERS = {"RobertaModel": 2, "DistilBertModel": 0, "MPNetModel": None, "RoFormerModel": None}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_kinds_give_of_packed_texts_what_they_give_of_each_or_are_refused(kind):
    """RoBERTa's positions begin after padding's; MPNet and RoFormer drop the packing on its way to attention."""
    torch.manual_seed(0)
    own = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64} if kind == "DistilBertModel" else {}
    make = getattr(transformers, kind)
    model = make(make.config_class(**SMALL, **own, max_position_embeddings=24, pad_token_id=1)).eval()
    implementation = model.config._attn_implementation
    texts = [torch.randint(5, 50, (n,)) for n in (7, 3, 9)]
    expected = torch.stack([model(input_ids=ids[None]).last_hidden_state[0].mean(0) for ids in texts])
    if OTHERS[kind] is None:
        message = f"TextEncoder: model must give of packed texts what it gives of each, got {kind}; take one that"
        with pytest.raises(ValueError, match=message):
            TextEncoder(model, None)
        assert model.config._attn_implementation == implementation
        return
    encoder = TextEncoder(model, lambda texts: {"input_ids": [[5] * len(text.split()) for text in texts]})
    found = encoder(torch.cat(texts), Packing.from_lengths([7, 3, 9]))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert encoder.first == OTHERS[kind]
    longest = 24 - encoder.first
    encoder(*encoder.tokens(["go " * longest]))
    with pytest.raises(ValueError, match=f"texts must have at most {longest} tokens, got {longest + 1}"):
        encoder.tokens(["go " * (longest + 1)])


def test_a_packing_comes_alone(encoder):
    tokens, packing = encoder.tokens(TEXTS)
    mask = torch.ones(1, 19, dtype=torch.long)
    mask[0, -2:] = 0
    given = dict(position_ids=packing.place_of_token()[None], packing=packing)
    with pytest.raises(ValueError, match="packing must come with one row and no mask, got an attention_mask too; pack"):
        encoder.model(input_ids=tokens[None], attention_mask=mask, **given)
    with pytest.raises(ValueError, match="packing must come with one row and no mask, got 2 rows; pack all tokens"):
        encoder.model(input_ids=tokens[None].expand(2, -1), **given)
