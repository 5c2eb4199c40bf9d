"""VL-JEPA's predictor on images and clips with short and long questions: packed, against padded to the longest."""

from dataclasses import replace

import numpy as np

from benchmarks.answering import Answering
from benchmarks.workload import each
from jepa_kernels.models.vl_jepa import VLJEPAConfig

# The paper's proportions, an eighth as wide: 4 heads to a key, 4 times the width inside the MLP, heads of 64.
SMALL = VLJEPAConfig(
    vision_embed_dim=384, embed_dim=256, depth=2, num_heads=4, num_kv_heads=1, hidden=1024, vocab_size=1000, out_dim=192
)
PATCHES, TUBELETS, LONGEST = 64, 8, 512  # of two frames of 128 x 128 pixels; of 16 frames; the paper's longest question


def lengths(batch: int, seed: int = 0) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Videos of 1 to 16 frames, as many of each length, and questions of 4 to 512 tokens, log-uniform: an image is one
    tubelet; text ranges from a few words to a paragraph, and the short are many. The first draw; none was chosen."""
    rng = np.random.default_rng(seed)
    visual = PATCHES * rng.integers(1, TUBELETS + 1, batch)
    asked = np.exp(rng.uniform(np.log(4), np.log(LONGEST), batch)).astype(int)
    return tuple(visual.tolist()), tuple(asked.tolist())


WORKLOADS = (
    Answering("videos_1_to_16_frames_questions_4_to_512", SMALL, replace(SMALL, depth=1), *lengths(8)),
    Answering("smoke_videos_and_questions", replace(SMALL, depth=1), replace(SMALL, depth=1), *lengths(3), smoke=True),
)


@each("vl_jepa", WORKLOADS)
def test_vl_jepa(bench_answering, op, workload, stage, dtype):
    bench_answering(op, workload, stage, dtype)
