"""What a part of a batch counts for in the loss of the whole batch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from jepa_kernels.packing import Packing


@dataclass(frozen=True)
class Whole:
    """A batch that was divided into `parts`: its images, and the tokens of each mask's contexts and targets [masks]."""

    parts: int
    images: int
    context_tokens: np.ndarray
    target_tokens: np.ndarray


@dataclass(frozen=True)
class Share:
    """Of losses of tokens, as `latent_loss` averages them; fp32.

    mask [masks]: what the tokens of each mask are multiplied by with reduction "mask";
    token [1]: all of them, with reduction "token".
    """

    mask: Tensor
    token: Tensor

    def weights(self, reduction: str, ids: Tensor, packing: Packing | None, batch: int) -> Tensor:
        """Of the tokens of `ids`, in its shape, as `latent_loss` takes them; no wait for the device."""
        if reduction == "token":
            return self.token.expand(ids.shape)
        if packing is None:
            return self.mask.repeat_interleave(batch, output_size=len(ids))[:, None].expand(ids.shape)
        number = packing.sequence_of_token() // batch  # rows past the end, of no mask, have any weight
        return self.mask[number.clamp(max=len(self.mask) - 1)]


@dataclass(frozen=True)
class Shares:
    """Of a part with n_j tokens in mask j, F masks that have some, b images; N_j, M, B of the whole batch, P parts.

    images [1]: P b / B, of what is averaged over images.
    context, target: P n_j F / (N_j M) for the mean over tokens of each mask, then over masks that have some;
        P n / N for the mean over all n of N tokens.
    The part's own means have n_j F, n and b in their denominators, so that the mean over parts has those of the whole.
    """

    images: Tensor
    context: Share
    target: Share

    @classmethod
    def of(
        cls, whole: Whole, images: int, context: np.ndarray, target: np.ndarray, *, device: torch.device | str
    ) -> Shares:
        """From the tokens of each mask in the part; one small copy to the device."""
        of_images = np.array([whole.parts * images / whole.images])
        found = [of_images, *_share(whole.parts, context, whole.context_tokens)]
        found += _share(whole.parts, target, whole.target_tokens)
        both = torch.from_numpy(np.concatenate(found)).float()
        if torch.device(device).type == "cuda":
            both = both.pin_memory()
        alone, *rest = both.to(device, non_blocking=True).split([len(x) for x in found])
        return cls(alone, Share(*rest[:2]), Share(*rest[2:]))


def _share(parts: int, own: np.ndarray, whole: np.ndarray) -> list[np.ndarray]:
    """[masks] and [1] of a Share, from exact products of counts."""
    mask = parts * own * (own > 0).sum() / np.maximum(whole * (whole > 0).sum(), 1)
    return [mask, parts * own.sum(keepdims=True) / np.maximum(whole.sum(keepdims=True), 1)]
