"""VL-JEPA: its predictor against Llama's blocks in transformers, each sequence alone; its loss against plain sums."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from jepa_kernels.models.vl_jepa import LLAMA_3, VLJEPA, Predictor, Texts, VLJEPAConfig
from jepa_kernels.packing import Packing, pack
from jepa_kernels.pairs import Pairs
from jepa_kernels.testing import hold
from tests.models.weights import shaken

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

CONFIG = VLJEPAConfig(
    vision_embed_dim=24, text_embed_dim=16, embed_dim=64, depth=2, num_heads=4, num_kv_heads=2, hidden=96,
    vocab_size=50, out_dim=32, rope_scaling=LLAMA_3,
)  # fmt: skip
LENGTHS = (3, 1, 6)


def inputs(seen=5):
    g = torch.Generator().manual_seed(0)
    visual = torch.randn(len(LENGTHS), seen, CONFIG.vision_embed_dim, generator=g)
    questions = [torch.randint(CONFIG.vocab_size, (n,), generator=g) for n in LENGTHS]
    return visual, questions


def predictor():
    torch.manual_seed(0)
    return shaken(Predictor(CONFIG), 0.05)


def llama(own):
    """The blocks of transformers with the predictor's weights, and no mask: every token sees all."""
    c = CONFIG
    config = transformers.LlamaConfig(
        hidden_size=c.embed_dim, num_hidden_layers=c.depth, num_attention_heads=c.num_heads, vocab_size=c.vocab_size,
        num_key_value_heads=c.num_kv_heads, intermediate_size=c.hidden, rms_norm_eps=1e-5, attn_implementation="eager",
        max_position_embeddings=131072, rope_parameters={"rope_type": "llama3", "rope_theta": c.rope_theta, **LLAMA_3},
    )  # fmt: skip
    model = transformers.LlamaModel(config)
    missing, foreign = model.load_state_dict(own.state_dict(), strict=False)
    assert not missing and {n.split(".")[0] for n in foreign} == {"visual_proj", "out_proj"}
    return model


def by_llama(own, visual, questions):
    """Each sequence by itself, by the predictor's own weights in Llama's forward."""
    model, found = llama(own).to(visual[0].dtype), []
    weights = {n: p for n, p in own.named_parameters() if not n.startswith(("visual_proj", "out_proj"))}
    for name, weight in weights.items():
        owner, _, last = name.rpartition(".")
        module = model.get_submodule(owner)
        del module._parameters[last]
        setattr(module, last, weight)
    for seen, question in zip(visual, questions, strict=True):
        x = torch.cat([own.visual_proj(seen), own.embed_tokens(question)])[None]
        turns = model.rotary_emb(x, torch.arange(x.shape[1])[None])
        for layer in model.layers:
            x = layer(x, attention_mask=None, position_embeddings=turns)
            x = x[0] if isinstance(x, tuple) else x
        found.append(own.out_proj(model.norm(x)[0].mean(0)))
    return torch.stack(found)


def test_the_predictor_is_llamas_blocks_without_a_mask():
    own, (visual, questions) = predictor(), inputs()
    exact = by_llama(copy.deepcopy(own).double(), visual.double(), questions)
    eager = by_llama(own, visual, questions)
    parity = hold("out", own(visual, *pack(questions)), exact, eager)
    assert parity.ok, parity


def test_gradients_are_those_of_each_sequence_alone():
    own, (visual, questions) = predictor(), inputs()
    weights = torch.randn(len(questions), CONFIG.out_dim, generator=torch.Generator().manual_seed(1))

    def gradients(model, visual, run):
        out = run(model, visual)
        return torch.autograd.grad((out * weights.to(out.dtype)).sum(), list(model.parameters()))

    packed = gradients(own, visual, lambda model, x: model(x, *pack(questions)))
    eager = gradients(own, visual, lambda model, x: by_llama(model, x, questions))
    exact = gradients(copy.deepcopy(own).double(), visual.double(), lambda model, x: by_llama(model, x, questions))
    for (name, _), *found in zip(own.named_parameters(), packed, exact, eager, strict=True):
        parity = hold(name, *found)
        assert parity.ok, parity


def test_inputs_of_different_lengths_are_each_alone():
    """Images beside clips: packed visual tokens give the bits that each input gives by itself."""
    own, (_, questions) = predictor(), inputs()
    g = torch.Generator().manual_seed(2)
    shown = [torch.randn(n, CONFIG.vision_embed_dim, generator=g) for n in (4, 9, 1)]
    visual, seen = pack(shown)
    alone = [own(x[None], *pack([q]))[0] for x, q in zip(shown, questions, strict=True)]
    out = own(visual, *pack(questions), seen=seen)
    torch.testing.assert_close(out, torch.stack(alone), rtol=1e-5, atol=1e-6)
    exact = by_llama(copy.deepcopy(own).double(), [x.double() for x in shown], questions)
    parity = hold("out", out, exact, by_llama(own, shown, questions))
    assert parity.ok, parity
    even = torch.stack([shown[0]] * 3)
    same_length = Packing.uniform(3, 4)
    assert torch.equal(own(even, *pack(questions)), own(even.flatten(0, 1), *pack(questions), seen=same_length))


def test_a_question_changes_its_own_answer_alone():
    own, (visual, questions) = predictor(), inputs()
    changed = [questions[0], (questions[1] + 1) % CONFIG.vocab_size, questions[2]]
    differs = (own(visual, *pack(changed)) - own(visual, *pack(questions))).abs().amax(1)
    assert differs[0] == differs[2] == 0 and differs[1] > 1e-3


class Seen(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, pixels):
        return pixels * self.scale


class Words(torch.nn.Module):
    """The mean of a text's word vectors."""

    def __init__(self):
        super().__init__()
        self.words = torch.nn.Embedding(CONFIG.vocab_size, CONFIG.text_embed_dim)

    def forward(self, tokens, packing):
        return packing.mean(self.words(tokens))


def whole(**changes):
    torch.manual_seed(0)
    return shaken(VLJEPA(replace(CONFIG, **changes), Seen(), Words()), 0.05)


def texts(questions, answers, which):
    return Texts(*pack(questions), *pack(answers), torch.arange(len(answers)), torch.tensor(which))


def test_the_loss_is_the_mean_of_both_cross_entropies():
    model, (visual, questions) = whole(), inputs()
    answers = [q + 0 for q in questions[::-1]]
    loss = model.loss(visual, texts(questions, answers, [0, 1, 2]))
    predicted = F.normalize(by_llama(model.predictor, model.see(visual), questions), dim=-1)
    answered = torch.stack([model.text_proj(model.text.words(a).mean(0)) for a in answers])
    scores = predicted @ F.normalize(answered, dim=-1).T / model.log_temperature.exp()
    places = torch.arange(len(questions))
    expected = (F.cross_entropy(scores, places) + F.cross_entropy(scores.T, places)) / 2
    torch.testing.assert_close(loss, expected, rtol=2e-6, atol=0)


def test_equal_answers_are_no_negatives():
    """Of rows 0 and 1, which share an answer, each has row 2 alone to be told from."""
    model, (visual, questions) = whole(), inputs()
    given = texts(questions, [questions[0], questions[2]], [0, 0, 1])
    predicted, answered = (F.normalize(x, dim=-1) for x in model(visual, given))
    assert torch.equal(answered[0], answered[1])
    scores = (predicted @ answered.T / model.log_temperature.exp()).double()
    scores[0, 1] = scores[1, 0] = -torch.inf
    places = torch.arange(3)
    expected = (F.cross_entropy(scores, places) + F.cross_entropy(scores.T, places)) / 2
    torch.testing.assert_close(model.loss(visual, given), expected.float(), rtol=1e-5, atol=0)


def test_texts_of_a_batch_hold_each_answer_once():
    words = {"go": [3], "to it": [4, 5], "key": [6]}

    def tokens(given):
        return pack([torch.tensor(words[text]) for text in given])

    of = Texts.of(tokens, ["to it", "go", "go"], ["to it", "key", "to it"])
    assert of.question.tolist() == [4, 5, 3, 3] and of.question_packing.lengths == (2, 1, 1)
    assert of.answer.tolist() == [6, 4, 5] and of.which.tolist() == [1, 0, 1]
    alone = Texts.of(tokens, ["go"], ["to it"])
    assert of.identity.tolist() == [of.identity[0].item(), alone.identity.item()] and len(of.identity.unique()) == 2
    with pytest.raises(ValueError, match=r"VLJEPA: answers must be one for each of 2 questions, got 1; .+"):
        Texts.of(tokens, ["go", "go"], ["key"])


def test_the_encoder_of_pixels_stays_as_it_is_and_texts_learn_slowly():
    model, (visual, questions) = whole().train(), inputs()
    assert not model.vision.training and not model.see(visual).requires_grad
    rest, text = model.parameter_groups(1e-3)
    assert text["lr"] == 0.05 * rest["lr"]
    optimizer = torch.optim.SGD([rest, text])
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model.loss(visual, texts(questions, questions, [0, 1, 2])).backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    optimizer.step()
    assert grads.pop("vision.scale") is None
    for name, grad in grads.items():
        rate = 5e-5 if name.startswith("text.") else 1e-3
        torch.testing.assert_close(dict(model.named_parameters())[name], before[name] - rate * grad)


def test_a_fixed_temperature_gets_no_gradient():
    model, (visual, questions) = whole(learn_temperature=False), inputs()
    model.loss(visual, texts(questions, questions, [0, 1, 2])).backward()
    assert model.log_temperature.grad is None and model.log_temperature.exp().item() != 0.07  # shaken


def test_an_encoder_of_answers_that_stays_is_in_no_group():
    model, (visual, questions) = whole(text_scale=0.0).train(), inputs()
    assert model.predictor.training and not model.text.training, "no dropout"
    (group,) = model.parameter_groups(1e-3)
    assert all(p.requires_grad for p in group["params"]) and not model.text.words.weight.requires_grad
    model.loss(visual, texts(questions, questions, [0, 1, 2])).backward()
    assert model.text.words.weight.grad is None and all(p.grad is not None for p in group["params"])


def test_a_file_holds_the_whole_model(tmp_path):
    model, other = whole(), whole()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    model.save(tmp_path / "model.safetensors")
    other.load(tmp_path / "model.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    with pytest.raises(ValueError, match=r"VLJEPA: checkpoint must hold exactly the weights .+; .+"):
        other.load({**model.state_dict(), "log_temperature": torch.tensor(torch.nan)})


def test_compiles_to_one_graph():
    own, (visual, questions) = predictor(), inputs()
    tokens, packing = pack(questions)
    pairs = Pairs.from_lengths([visual.shape[1]] * 3, packing.lengths)
    compiled = torch.compile(own, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(visual, tokens, packing, pairs), own(visual, tokens, packing))


def test_refusals():
    own, (visual, questions) = predictor(), inputs()
    tokens, packing = pack(questions)
    with pytest.raises(ValueError, match=r"VLJEPA: packing must hold 2 questions, one for each input, got 3; .+"):
        own(visual[:2], tokens, packing)
    with pytest.raises(ValueError, match=r"VLJEPA: visual must have shape .+"):
        own(visual[0], tokens, packing)
    with pytest.raises(ValueError, match=r"VLJEPA: seen must pack 15 visual tokens, got 14; .+"):
        own(visual.flatten(0, 1), tokens, packing, seen=Packing.from_lengths([4, 5, 5]))
    with pytest.raises(ValueError, match=r"VLJEPA: packing must hold 2 questions, one for each input, got 3; .+"):
        own(visual.flatten(0, 1), tokens, packing, seen=Packing.from_lengths([7, 8]))
    with pytest.raises(ValueError, match=r"VLJEPA: texts must hold at least 2 pairs of different answers, got 1; .+"):
        whole().loss(visual[:1], texts(questions[:1], questions[:1], [0]))
    with pytest.raises(TypeError, match=r"VLJEPA: question must .+"):
        own(visual, tokens.int(), packing)
    with pytest.raises(ValueError, match=r"GroupedAttention: num_kv_heads must divide num_heads 4, got 3; .+"):
        Predictor(replace(CONFIG, num_kv_heads=3))
    with pytest.raises(ValueError, match=r"GroupedAttention: num_heads must divide embed_dim 64, got 5; .+"):
        Predictor(replace(CONFIG, num_heads=5))
    with pytest.raises(ValueError, match=r"VLJEPA: text_scale must be at least 0, got -1.0; .+"):
        whole(text_scale=-1.0)


def test_means_of_packed_sequences():
    packing = Packing.from_lengths([3, 0, 5]).padded(10, 4, 6)
    x = torch.randn(10, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    expected = torch.stack([x[:3].mean(0), x[:0].sum(0), x[3:8].mean(0), x[:0].sum(0)])
    torch.testing.assert_close(packing.mean(x), expected)
    assert torch.autograd.gradcheck(packing.mean, x)
    assert packing.place_of_token().tolist()[:8] == [0, 1, 2, 0, 1, 2, 3, 4]
