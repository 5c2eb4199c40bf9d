"""`warmup`: a step for every shape of a run's first steps, and nothing of the run changed by it."""

import dataclasses

import pytest
import torch

import jepa_kernels as jk
from jepa_kernels.configs import Config, read
from jepa_kernels.training import warmup
from jepa_kernels.training.feed import Feed
from jepa_kernels.training.ranks import Ranks
from jepa_kernels.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = ["model.crop_size=64", "model.patch_size=8", "model.embed_dim=48", "model.depth=1", "model.num_heads=2"]
SMALL += ["model.predictor_embed_dim=32", "model.predictor_depth=1", "data.batch_size=4", "optimization.steps=12"]


def config(*changes: str) -> Config:
    return read("ijepa", [*SMALL, *changes])


@pytest.fixture(scope="module")
def bucketed():
    return config("mask.bucket=64")


def test_every_shape_of_the_first_steps_has_a_step(bucketed):
    found = jk.warmup(bucketed, device="cpu", steps=8)
    feed, shapes = Feed(bucketed, Ranks()), set()
    for step in range(8):
        (m,) = (masks.to("cpu") for masks in feed.given(step))
        tokens = m.context_packing.tokens, m.target_packing.tokens, m.pairs.packing.tokens
        new = (*tokens, m.context_packing.max_seqlen, m.target_packing.max_seqlen, m.pairs.packing.max_seqlen)
        assert (step in found.steps) == (new not in shapes), step
        shapes.add(new)
    assert 1 < found.shapes == len(shapes) < 8 and len(found.seconds) == len(found.steps)
    assert (found.kernels, found.loaded, found.graphs) == ((), (), 0), "the CPU's kernels are compiled"
    assert f"{len(shapes)} steps, one for each of {len(shapes)} shapes" in str(found)
    assert "CPU kernels were compiled with the package" in str(found)


def test_lengths_that_compile_nothing_anew_have_the_two_extremes():
    exact = config()
    found, feed = warmup.warmup(exact, device="cpu", steps=5), Feed(exact, Ranks())
    tokens = [sum(len(m.context_ids) + len(m.target_ids) for m in feed.given(step)) for step in range(5)]
    assert set(found.steps) == {tokens.index(min(tokens)), tokens.index(max(tokens))} and found.shapes is None


def test_the_run_is_as_without(bucketed):
    before = torch.get_rng_state()
    losses = []
    for warmed in (False, True):
        if warmed:
            jk.warmup(bucketed, device="cpu", steps=1)
            assert torch.equal(torch.get_rng_state(), before)
        trainer, feed = Trainer(bucketed), Feed(bucketed, Ranks())
        losses.append([trainer.advance(feed[step]).measured()["loss"] for step in range(2)])
        torch.set_rng_state(before)
    assert losses[0] == losses[1]


def test_a_share_of_the_batch_is_what_one_of_several_processes_takes(bucketed):
    alone, shared = (Feed(bucketed, Ranks(world=world)).given(0)[0].batch for world in (1, 2))
    assert (alone, shared) == (4, 2) and jk.warmup(bucketed, device="cpu", world=2, steps=1).steps == (0,)


def test_bad_input_is_refused(bucketed):
    with pytest.raises(ValueError, match=r"^warmup: steps must be at least 1, got 0; leave it out for 100$"):
        jk.warmup(bucketed, steps=0)
    with pytest.raises(ValueError, match=r"^warmup: device must name a device of this machine, got 'tpu'"):
        jk.warmup(bucketed, device="tpu")
    with pytest.raises(ValueError, match=r"^train: data\.batch_size must be a multiple of 3, for 3 ranks"):
        jk.warmup(dataclasses.replace(bucketed), world=3)
    with pytest.raises(ValueError, match=r"did you mean ijepa\?"):
        jk.warmup("ijeppa")
