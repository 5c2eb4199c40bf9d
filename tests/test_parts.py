"""Parts of a batch of masks: the rows they have, what they count for, and that their mean loss is the whole batch's."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter

import jepa_kernels as jk
from jepa_kernels.masks import MaskBatch, MultiBlock2d, MultiBlock3d, Spec3d
from jepa_kernels.models.ijepa import IJEPA, IJEPAConfig
from jepa_kernels.models.vjepa import VJEPA, VJEPAConfig
from jepa_kernels.models.vjepa2 import VJEPA2, VJEPA2Config
from tests.models.training import failures, results

# Three images: a context each, and two targets. Of the first mask image 1 has no target, of the second image 1 alone.
CONTEXT, TARGET = np.array([2, 1, 3]), np.array([2, 0, 1, 0, 4, 0])
BATCH = MaskBatch(3, np.array([0, 5, 2, 1, 3, 4]), CONTEXT, np.array([6, 7, 8, 0, 3, 4, 5]), TARGET)


def same(a, b):
    arrays = "context_ids", "context_lengths", "target_ids", "target_lengths"
    return a.batch == b.batch and all(np.array_equal(getattr(a, name), getattr(b, name)) for name in arrays)


def test_a_part_has_the_rows_of_its_images_mask_after_mask():
    part = BATCH.part([2, 0], 2)
    assert part.batch == 2 and part.packed
    assert part.context_ids.tolist() == [1, 3, 4, 0, 5] and part.context_lengths.tolist() == [3, 2]
    assert part.target_ids.tolist() == [8, 6, 7] and part.target_lengths.tolist() == [1, 2, 0, 0]
    ids = np.arange(12).reshape(6, 2)
    whole = MaskBatch(3, ids[:3], np.full(3, 2), ids, np.full(6, 2))
    part = whole.part(np.array([1]), 3)
    assert not part.packed and part.context_ids.tolist() == [[2, 3]] and part.context_lengths.tolist() == [2]
    assert part.target_ids.tolist() == [[2, 3], [8, 9]] and part.target_lengths.tolist() == [2, 2]
    for sampler in (MultiBlock2d(8, truncate=True), MultiBlock2d(8), MultiBlock3d((2, 4, 4))):
        masks = sampler(5, step=1)
        assert same(masks.part(range(5), 1), masks)


def test_shares_by_hand():
    shares = BATCH.part([2, 0], 2).to("cpu").shares
    assert shares.images.tolist() == [np.float32(2 * 2 / 3)]
    # Contexts: 5 of 6 tokens, one mask of one. Targets: 3 of 3 tokens of the first mask, which alone of two has some.
    assert shares.context.mask.tolist() == shares.context.token.tolist() == [np.float32(2 * 5 / 6)]
    assert shares.target.mask.tolist() == [2 * 3 / 3 * 1 / 2, 0] and shares.target.token.tolist() == [
        np.float32(2 * 3 / 7)
    ]
    shares = BATCH.part([1], 2).to("cpu").shares
    assert shares.target.mask.tolist() == [0, 2 * 4 / 4 * 1 / 2]
    one = MaskBatch(3, BATCH.context_ids, CONTEXT, BATCH.target_ids[:3], np.array([2, 0, 1, 0, 0, 0]))
    assert one.part([0], 2).to("cpu").shares.target.mask.tolist() == [np.float32(2 * 2 / 3), 0]
    assert all(x.dtype == torch.float32 for x in (shares.images, *vars(shares.target).values()))
    assert BATCH.to("cpu").shares is None and BATCH.to("cpu").weights("target", "mask") is None


def test_every_token_has_the_weight_of_its_mask():
    part = BATCH.part([1, 2], 2).to("cpu")  # one token of the first mask, four of the second, in rows 1 and 2
    assert part.target_packing.lengths == (0, 1, 4, 0)
    first, second = np.float32(2 * 1 * 2 / (3 * 2)), np.float32(2 * 4 * 2 / (4 * 2))
    assert part.weights("target", "mask").tolist() == [first, *[second] * 4]
    assert part.weights("target", "token").tolist() == [np.float32(2 * 5 / 7)] * 5
    equal = MultiBlock2d(8, truncate=True)(6, step=0)
    for images in ([0, 1], [5, 3], [2, 4]):  # as many images of as many tokens: exactly 1
        part = equal.part(images, 3).to("cpu")
        for of in ("context", "target"):
            for reduction in ("mask", "token"):
                weights = part.weights(of, reduction)
                assert weights.shape == getattr(part, f"{of}_ids").shape and (weights == 1).all()


def test_parts_that_can_not_be_are_refused():
    numbers = r"^MaskBatch: images must be numbers of different images, got .*; pass a list of ints$"
    for images in ([], [0, 0], [0.5], [[0, 1]]):
        with pytest.raises(ValueError, match=numbers):
            BATCH.part(images, 2)
    for images in ([3], [-1, 0]):
        with pytest.raises(ValueError, match=r"^MaskBatch: images must lie in \[0, 3\), got .*; pass those of this"):
            BATCH.part(images, 2)
    with pytest.raises(ValueError, match=r"^MaskBatch: parts must be at least 1, got 0; pass how many"):
        BATCH.part([0], 0)
    with pytest.raises(ValueError, match=r"^MaskBatch: part must be one of a whole batch, got a part; divide"):
        BATCH.part([0, 1], 2).part([0], 2)


def test_pinned_and_pickled_parts_keep_what_they_know(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(x) or x.clone())
    part = BATCH.padded(4).part([2, 0], 2)
    for copied in (part.pin_memory(), pickle.loads(pickle.dumps(part))):
        assert same(copied, part) and copied.bucket == 4 and copied.to("cpu").context_packing.tokens == 8
        assert copied.to("cpu").shares.target.mask.tolist() == [1, 0]
    assert len(pinned) == 4


VIDEO = dict(crop_size=32, num_frames=4, patch_size=8, embed_dim=48, depth=4, num_heads=2)
VIDEO |= dict(predictor_embed_dim=48, predictor_depth=2)
PHOTO = dict(crop_size=64, patch_size=8, embed_dim=32, depth=2, num_heads=2, predictor_embed_dim=16, predictor_depth=2)
SPECS = Spec3d(2, (0.2, 0.2)), Spec3d(1, (0.5, 0.5))
MODELS = {
    "ijepa": lambda: IJEPA(IJEPAConfig(**PHOTO)),
    "vjepa": lambda: VJEPA(VJEPAConfig(**VIDEO, reg_coeff=0.5)),
    "vjepa2": lambda: VJEPA2(VJEPA2Config(**VIDEO, predictor_num_heads=2)),
    "predict_all": lambda: VJEPA2(VJEPA2Config(**VIDEO, predictor_num_heads=2, predict_all=True)),
    "unweighted": lambda: VJEPA2(
        VJEPA2Config(**VIDEO, predictor_num_heads=2, predict_all=True, weight_distance_loss=False)
    ),
}
DIVISIONS = [[2, 0, 3], [1]], [[0, 1], [2, 3]], [[3], [0, 2], [1]]


def drawn(name, run, truncate):
    """Four images or clips of a run, and their masks."""
    generator = torch.Generator().manual_seed(run)
    if name == "ijepa":
        sampler, shape = MultiBlock2d(8, truncate=truncate, seed=run), (4, 3, 64, 64)
    else:
        sampler, shape = MultiBlock3d((2, 4, 4), SPECS, truncate=truncate, seed=run), (4, 3, 4, 32, 32)
    return torch.randn(shape, generator=generator), sampler(4, step=0)


def mean_of_parts(model, pixels, masks, division):
    losses = [model.loss(pixels[p], masks.part(p, len(division)).to("cpu")) for p in division]
    return results(torch.stack(losses).mean(), model)


@pytest.mark.parametrize("average", ["mask", "token"])
@pytest.mark.parametrize("truncate", [False, True], ids=["packed", "truncated"])
@pytest.mark.parametrize("name", MODELS)
def test_the_mean_of_parts_is_the_whole_batch(name, truncate, average):
    torch.manual_seed(0)
    model = MODELS[name]()
    model.average = average
    double = copy.deepcopy(model).double()
    actual, exact, eager = [], [], []
    for run, division in enumerate(DIVISIONS):
        pixels, masks = drawn(name, run, truncate)
        actual.append(mean_of_parts(model, pixels, masks, division))
        with jk.use_backend("reference"):
            eager.append(results(model.loss(pixels, masks.to("cpu")), model))
            exact.append(results(double.loss(pixels.double(), masks.to("cpu")), double))
    assert not failures(actual, exact, eager)


@pytest.mark.parametrize("average", ["mask", "token"])
def test_compiled_code_takes_other_shares_as_it_is(average):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, counter = MODELS["ijepa"](), CompileCounter()
    model.average = average
    compiled = torch.compile(model.loss, fullgraph=True, backend=counter)
    for run, images in enumerate(([0, 2, 3], [1, 2, 3], [3, 1, 2])):  # from the second on lengths are dynamic
        pixels, masks = drawn("ijepa", run, truncate=False)
        part = masks.part(images, run + 2).to("cpu")
        assert torch.equal(compiled(pixels[images], part), model.loss(pixels[images], part))
    assert counter.frame_count == 2


def test_means_of_masks_and_of_tokens_differ_and_so_do_parts_without_their_shares():
    """What the test above would not see if all lengths were alike."""
    torch.manual_seed(0)
    model = MODELS["vjepa2"]().double()
    pixels, masks = drawn("vjepa2", 0, truncate=False)
    pixels, found = pixels.double(), {}
    for average in ("mask", "token"):
        model.average = average
        with jk.use_backend("reference"), torch.no_grad():
            found[average] = model.loss(pixels, masks.to("cpu"))
            alone = [model.loss(pixels[p], MaskBatch(len(p), *_rows(masks.part(p, 2))).to("cpu")) for p in DIVISIONS[0]]
            parts = [model.loss(pixels[p], masks.part(p, 2).to("cpu")) for p in DIVISIONS[0]]
        assert abs(sum(alone) / 2 - found[average]) > 1e-4 > 1e-6 > abs(sum(parts) / 2 - found[average])
    assert abs(found["mask"] - found["token"]) > 1e-4


def _rows(masks):
    return masks.context_ids, masks.context_lengths, masks.target_ids, masks.target_lengths
