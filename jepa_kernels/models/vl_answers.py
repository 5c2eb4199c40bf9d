"""What VL-JEPA's embeddings say: the nearest of candidate texts, classes by their names, and when a stream says anew.

Embeddings are compared by cosine, as the loss compares them. Source: arXiv:2512.10942, sections 2 and 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from jepa_kernels._core.check import check_tensor, fail, is_number
from jepa_kernels.models.vl_jepa import VLJEPA


@torch.no_grad()
def embed(model: VLJEPA, texts: Sequence[str]) -> Tensor:
    """Unit embeddings of texts, [S, out_dim]; the model's text encoder has `tokens`, as `TextEncoder` has."""
    tokens = model.text.tokens(texts, device=model.log_temperature.device)  # type: ignore[operator]
    return F.normalize(model.answer(*tokens), dim=-1)


def name_classes(model: VLJEPA, names: Sequence[str], templates: Sequence[str] = ("{}",)) -> Tensor:
    """Unit embeddings of classes, [C, out_dim]: the mean over templates of each name's unit embeddings.

    templates: texts with a place for the name, such as "a picture of {}".
    Source: CLIP (arXiv:2103.00020) section 3.1.4.
    """
    bare = [template for template in templates if template.count("{}") != 1]
    if bare or not templates:
        found = repr(bare[0]) if bare else "none"
        fail("name_classes", "templates", "each hold {} once", found, "leave it out for the name alone")
    if not names:
        fail("name_classes", "names", "hold at least one class", "none", "pass the classes' names")
    texts = [template.replace("{}", name) for name in names for template in templates]
    return F.normalize(embed(model, texts).unflatten(0, (len(names), len(templates))).mean(1), dim=-1)


def classify(predicted: Tensor, candidates: Tensor) -> Tensor:
    """Cosines of predicted embeddings [B, E] and those of classes or texts [C, E] -> [B, C]."""
    check_tensor("classify", "predicted", predicted, "B E")
    check_tensor("classify", "candidates", candidates, "C E", device=predicted.device)
    if predicted.shape[1] != candidates.shape[1]:
        found, remedy = candidates.shape[1], "embed them by the model that predicted"
        fail("classify", "candidates", f"have {predicted.shape[1]} channels like predicted", found, remedy)
    return F.normalize(predicted, dim=-1) @ F.normalize(candidates, dim=-1).T


def retrieve(predicted: Tensor, candidates: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
    """The k candidates nearest by cosine: predicted [B, E], candidates [C, E] -> cosines, falling, and int64 [B, k]."""
    scores = classify(predicted, candidates)
    if not 1 <= k <= scores.shape[1]:
        fail("retrieve", "k", f"lie in 1..{scores.shape[1]}, the candidates", k, "ask for fewer")
    if not scores.isfinite().all():
        at = int((~scores.isfinite().all(1)).nonzero()[0])
        fail("retrieve", "embeddings", "be finite", f"row {at} that is not", "look for the input that made it")
    nearest, ids = scores.topk(k, dim=1)
    return nearest, ids


def emissions(stream: Tensor, threshold: float) -> tuple[list[int], Tensor]:
    """When text is to be decoded from a stream [T, E] of predicted embeddings: where it moves.

    A step is a distance d_t = 1 - cos(z_t, m) from the mean m of the unit embeddings since the last emission; beyond
    `threshold`, in 0..2, it is emitted and a new mean begins. The first step is always emitted. Steps are decided one
    after another, from those before alone.

    Returns the emitted steps, rising, and d [T], of which the first is 0. Raises ValueError for an empty stream and for
    values that are not finite.
    """
    _check_stream("emissions", stream)
    if not is_number(threshold) or not 0 <= threshold <= 2:
        fail("emissions", "threshold", "lie in [0, 2]", threshold, "pass a distance of cosines, such as 0.2")
    z = F.normalize(stream.detach().double().cpu(), dim=-1)
    steps, total, distances = [0], z[0], torch.zeros(len(z), dtype=torch.float64)
    for t in range(1, len(z)):
        distances[t] = 1 - F.cosine_similarity(z[t], total, dim=0)
        moved = bool(distances[t] > threshold)
        steps += [t] if moved else []
        total = z[t] if moved else total + z[t]
    return steps, distances


def segments(stream: Tensor, count: int) -> list[int]:
    """Where each of `count` segments of a whole stream [T, E] begins: Ward's clustering of neighbours in time.

    The published form, for streams that are all there: from T segments on, those two neighbours are joined whose union
    adds least to the sum of squared distances of unit embeddings from their segment's mean. Raises ValueError as
    `emissions` does, and for a count that is not in 1..T.
    """
    _check_stream("segments", stream)
    if not 1 <= count <= len(stream):
        fail("segments", "count", f"lie in 1..{len(stream)}, the steps", count, "ask for fewer")
    sums = list(F.normalize(stream.detach().double().cpu(), dim=-1))
    starts, sizes = list(range(len(sums))), [1] * len(sums)
    costs = [_cost(sums, sizes, i) for i in range(len(sums) - 1)]
    while len(starts) > count:
        i = costs.index(min(costs))
        sums[i], sizes[i] = sums[i] + sums[i + 1], sizes[i] + sizes[i + 1]
        del sums[i + 1], sizes[i + 1], starts[i + 1], costs[i]
        costs[max(0, i - 1) : i + 1] = [_cost(sums, sizes, j) for j in (i - 1, i) if 0 <= j < len(sums) - 1]
    return starts


def _cost(sums: list[Tensor], sizes: list[int], i: int) -> float:
    """What joining segments i and i + 1 adds to the sum of squared distances."""
    gap = float((sums[i] / sizes[i] - sums[i + 1] / sizes[i + 1]).square().sum())
    return gap * sizes[i] * sizes[i + 1] / (sizes[i] + sizes[i + 1])


def _check_stream(name: str, stream: Tensor) -> None:
    check_tensor(name, "stream", stream, "T E")
    if not len(stream):
        fail(name, "stream", "hold at least one step", "none", "wait for the first frame")
    if not stream.isfinite().all():
        at = int((~stream.isfinite().all(1)).nonzero()[0])
        fail(name, "stream", "be finite", f"step {at} that is not", "look for the frame that made it")
