"""Published attentive probes, of Meta and of Hugging Face."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jepa_kernels._core.check import fail
from jepa_kernels.models import checkpoints
from jepa_kernels.models.checkpoints import LoadReport, Source
from jepa_kernels.models.layouts import VJEPA2, recognise
from jepa_kernels.models.sizes import count, shape_of
from jepa_kernels.nn import AttentiveClassifier
from jepa_kernels.nn.pooler import PROBE_EPS

NAME = "AttentiveClassifier"
CROSS = "pooler.cross_attention_block."
HEADS = ("verb", "noun", "action")  # of EPIC-KITCHENS-100, in the order of their queries


def load_probe(source: Source, *, num_heads: int = 16, index: int = 0) -> tuple[AttentiveClassifier, LoadReport]:
    """Build the probe that a checkpoint holds the weights of, and load it.

    source: as of `JEPA.load`: `classifier` (V-JEPA), `classifiers` (V-JEPA 2, of which `index` is taken), the state
        dict of one, or Hugging Face's VJEPA2ForVideoClassification.
    num_heads: which no shape tells; 16 in Meta's. Hugging Face's have those of their config.
    Widths, depth and classes are those of the shapes; the order of blocks that of V-JEPA where its unused layer is;
    norms add 1e-5 to the variance, or Hugging Face's 1e-6.
    Raises ValueError for files without a probe, and as `JEPA.load` does.
    """
    found = recognise(NAME, checkpoints.read(NAME, source), probe=index)
    own = found.networks.get("classifier", {})
    query, hidden = shape_of(own, "pooler.query_tokens"), shape_of(own, f"{CROSS}mlp.fc1.bias")
    classes = _classes(own)
    if len(query) != 3 or not hidden or not classes:
        held = ", ".join([*found.networks, *found.ignored][:8]) or "nothing"
        fail(NAME, "checkpoint", f"hold probe {index}", held, "pass a file with classifier or classifiers")
    probe = AttentiveClassifier(
        query[2],
        classes,
        num_heads=num_heads,
        depth=1 + count(own, "pooler.blocks."),
        mlp_ratio=(hidden[0] + 0.5) / query[2],  # rounded down
        eps=1e-6 if found.layout is VJEPA2 else PROBE_EPS,
        cross_first=f"{CROSS}xattn.proj.weight" in own,
    )
    checkpoints.load(NAME, {"classifier": (probe, own)}, lambda _: "pass a published probe")
    ignored = {**found.ignored, **{other: "not of the probe" for other in found.networks if other != "classifier"}}
    return probe, LoadReport(NAME, found.layout.title, tuple(own), ignored, {})


def _classes(state: Mapping[str, Any]) -> int | dict[str, int]:
    """How many, or of each named head."""
    if linear := shape_of(state, "linear.bias"):
        return linear[0]
    named = {head: shape_of(state, f"{head}_classifier.bias") for head in HEADS}
    return {head: shape[0] for head, shape in named.items() if shape}
