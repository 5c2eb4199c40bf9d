"""The frozen description of patches: its equation in float64, black, places, and what a linear map reads off it."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from jepa_kernels.nn.color_features import ColorFeatures

SIDE, PATCH = 24, 8


def features(**options):
    torch.manual_seed(0)
    return ColorFeatures(SIDE, PATCH, features=8, **options)


def test_the_equation_patch_by_patch():
    encoder = features(bandwidth=3.0, gain=1.5)
    pixels = torch.randint(0, 256, (2, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    found = encoder(pixels)
    assert found.shape == (2, 9, encoder.embed_dim) and encoder.embed_dim == 8 * 18
    w, b = encoder.weight.double(), encoder.phase.double()
    for row, column in ((0, 0), (1, 2)):
        patch = pixels[1, :, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8].double() / 255
        f = math.sqrt(2) * 1.5 * (torch.cos(torch.einsum("chw,dc->hwd", patch, w) + b) - b.cos())
        cells = [f[i : i + 2, j : j + 2].mean((0, 1)) / 4 for i in range(0, 8, 2) for j in range(0, 8, 2)]
        expected = torch.cat([3 * f.mean((0, 1)), *cells, encoder.positions[0, row * 3 + column].double()])
        torch.testing.assert_close(found[1, row * 3 + column].double(), expected, rtol=1e-5, atol=1e-5)


def test_black_is_nothing_but_its_place_and_nothing_is_trained():
    encoder = features()
    found = encoder(torch.zeros(1, 3, SIDE, SIDE, dtype=torch.uint8))
    assert found[..., :-8].abs().max() < 1e-6 and torch.equal(found[..., -8:], encoder.positions)
    assert list(encoder.parameters()) == [] and set(encoder.state_dict()) == {"weight", "phase", "positions"}
    assert encoder(torch.zeros(0, 3, SIDE, SIDE, dtype=torch.uint8)).shape == (0, 9, encoder.embed_dim)


def test_pairs_of_color_and_shape_that_a_linear_map_was_not_fitted_on_are_told():
    """Four colors and four shapes; fitted on all pairs but those of the diagonal, asked about these."""
    g = torch.Generator().manual_seed(2)
    colors = torch.tensor([[255, 0, 0], [0, 255, 0], [60, 60, 255], [200, 200, 0]])
    shapes = (torch.rand(4, PATCH, PATCH, generator=g) < 0.4).long()
    pictures = torch.zeros(16, 3, SIDE, SIDE, dtype=torch.uint8)
    pictures[:, :, :PATCH, :PATCH] = (colors[:, None, :, None, None] * shapes[None, :, None]).flatten(0, 1).byte()
    torch.manual_seed(0)
    seen = ColorFeatures(SIDE, PATCH)(pictures)[:, 0].double()
    wanted = torch.cat([torch.eye(4).repeat_interleave(4, 0), torch.eye(4).repeat(4, 1)], 1).double()
    fitted = torch.tensor([n for n in range(16) if n // 4 != n % 4])
    mean, middle = seen[fitted].mean(0), wanted[fitted].mean(0)
    x = seen[fitted] - mean
    dual = torch.linalg.solve(x @ x.T + 0.1 * x.square().sum(1).mean() * torch.eye(12), wanted[fitted] - middle)
    scores = (seen - mean) @ x.T @ dual + middle
    diagonal = scores[[0, 5, 10, 15]]
    right = (diagonal[:, :4].argmax(1) == torch.arange(4)) & (diagonal[:, 4:].argmax(1) == torch.arange(4))
    assert right.sum() >= 3, normalize(diagonal)


def test_refusals():
    encoder = features()
    with pytest.raises(ValueError, match=r"ColorFeatures: pixels must be \[B, 3, 24, 24\], got \(1, 3, 16, 24\); .+"):
        encoder(torch.zeros(1, 3, 16, 24, dtype=torch.uint8))
    with pytest.raises(TypeError, match=r"ColorFeatures: pixels must .+"):
        encoder(torch.zeros(1, 3, SIDE, SIDE))
    with pytest.raises(ValueError, match=r"ColorFeatures: patch_size must .+ got 6; .+"):
        ColorFeatures(24, 6)
