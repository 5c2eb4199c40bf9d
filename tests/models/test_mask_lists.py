"""Masks that are no Masks: lists as published code passes them, and rows that do not go together."""

import pytest
import torch

from jepa_kernels.models.ijepa import IJEPA, IJEPAConfig
from jepa_kernels.models.vjepa2 import VJEPA2, VJEPA2Config

SIZES = dict(crop_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2, predictor_embed_dim=32, predictor_depth=1)
SHORT, LONG = torch.arange(5).repeat(2, 1), torch.arange(7).repeat(2, 1)


@pytest.fixture(scope="module")
def models():
    clips = VJEPA2(VJEPA2Config(**SIZES, num_frames=4, predictor_num_heads=2))
    return {clips: torch.zeros(2, 3, 4, 32, 32), IJEPA(IJEPAConfig(**SIZES)): torch.zeros(2, 3, 32, 32)}


@pytest.mark.parametrize(
    "masks, found",
    [
        (([SHORT, LONG], [LONG, SHORT]), "list, list"),
        ((SHORT, [LONG]), "Tensor, list"),
        ([SHORT, LONG], "list"),
        ((SHORT,), "Tensor"),
        (None, "NoneType"),
    ],
)
def test_lists_are_refused(models, masks, found):
    for model, batch in models.items():
        with pytest.raises(TypeError) as error:
            model.loss(batch, masks)
        assert str(error.value) == (
            f"{type(model).__name__}: masks must be Masks or two tensors (context, target), got {found}; "
            "pack lists of many lengths in a MaskBatch"
        )


@pytest.mark.parametrize("contexts, targets", [(2, 3), (4, 2), (3, 3)])
def test_lists_of_unequal_lengths_are_refused(models, contexts, targets):
    refuses(models, contexts, targets)


def test_one_context_of_several_targets_is_ijepas_alone(models):
    """Masks of a clip have a context each; with one too few they would take the mask tokens of others."""
    clips = {model: batch for model, batch in models.items() if isinstance(model, VJEPA2)}
    refuses(clips, 2, 4)


def refuses(models, contexts, targets):
    ids = torch.arange(4).repeat(4, 1)
    for model, batch in models.items():
        name, rows = type(model).__name__, rf"got \({contexts}, {targets}\); pass ids \["
        with pytest.raises(ValueError, match=rf"^{name}: masks must hold .* contexts.* targets, {rows}"):
            model.loss(batch, (ids[:contexts], ids[:targets]))
