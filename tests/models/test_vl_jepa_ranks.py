"""VL-JEPA's step in a process group: gradients averaged by DDP are those of one process with the whole batch."""

import os

import pytest
import torch
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

import jepa_kernels as jk
from jepa_kernels.models.vl_jepa import Texts
from jepa_kernels.testing import hold
from tests.models.test_vl_jepa import inputs, pack, whole
from tests.processes import gloo, side_by_side

WORLD = 2
WORDS = {"a red key": [3, 4], "a ball": [5], "a grey box": [6, 7, 8]}
SAID = ("a ball", "a red key", "a ball")  # the first and the last, which are one answer, lie on different ranks
SHARES = (slice(0, 2), slice(2, 3))  # the second rank has one pair


def batch(part=slice(None)):
    visual, questions = inputs()
    tokens = lambda said: pack([torch.tensor(WORDS[text]) for text in said])  # noqa: E731
    said = SAID[part]
    answers = Texts.of(tokens, ["a ball"] * len(said), said)  # its questions are replaced
    return visual[part], Texts(*pack(questions[part]), *vars_of(answers))


def vars_of(texts):
    return texts.answer, texts.answer_packing, texts.identity, texts.which


def grads(model):
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def one_process(model):
    visual, given = batch()
    loss = model.loss(visual.to(model.log_temperature.dtype), given)
    loss.backward()
    return {"loss": loss.detach(), **grads(model)}


def own_step(rank):
    model, given = whole(), batch(SHARES[rank])
    wrapped = DistributedDataParallel(model)  # kept: it averages in backward
    loss = model.objective(wrapped(*given), *given)
    loss.backward()
    return loss.detach(), grads(model)


def start(rank, store, results):
    with gloo(rank, WORLD, store):
        results[rank] = own_step(rank)


def test_ddp_gives_the_loss_and_gradients_of_one_process(tmp_path):
    with mp.Manager() as manager:
        results = manager.dict()
        side_by_side(start, (os.fspath(tmp_path / "store"), results), WORLD)
        (first, found), (second, other) = (results[rank] for rank in range(WORLD))
    assert torch.equal(first, second)
    assert not [name for name in found if not torch.equal(found[name], other[name])]
    with jk.use_backend("reference"):
        exact, eager = one_process(whole().double()), one_process(whole())
    parity = [hold(name, {**found, "loss": first}[name], exact[name], eager[name]) for name in exact]
    assert not [str(one) for one in parity if not one.ok]


def test_one_pair_alone_has_nothing_to_be_told_from():
    with pytest.raises(ValueError, match=r"VLJEPA: texts must hold at least 2 pairs of different answers, got 1; .+"):
        whole().loss(*batch(SHARES[1]))
