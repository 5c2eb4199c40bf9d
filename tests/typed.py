"""Every public name as a user's own code calls it: checked by mypy in strict mode (see pyproject.toml), never run."""

import torch
from torch import Tensor, nn

import jepa_kernels as jk


def attention(q: Tensor, packing: jk.Packing, rope: jk.Rope) -> Tensor:
    out: Tensor = jk.masked_attention(q, q, q, packing, rope=rope, scale=0.5, backend="cpu")
    whole: Tensor = jk.masked_attention_qkv(torch.stack([q, q, q], 1), packing)
    part, lse = jk.masked_attention_lse(q, q, q, packing)
    merged, total = jk.merge_attention([part, part], [lse, lse])
    turned: Tensor = jk.rope(q, rope.positions, pairing="tiled")
    both: tuple[Tensor, Tensor] = jk.rope_qk(q, q, rope.positions)
    return out + whole + merged + turned + both[0] + total.sum()


def tokens(x: Tensor, ids: Tensor, pixels: Tensor, weight: Tensor) -> Tensor:
    lengths: tuple[int, ...] = jk.Packing.from_lengths([3, 4], device="cpu").lengths
    packed, packing = jk.pack([x[0], x[1]])
    kept: Tensor = jk.gather_tokens(x, ids) + sum(lengths) + packing.mean(packed).sum()
    embedded: Tensor = jk.embed_patches(pixels, ids, weight, None, None, mean=(0.5,) * 3, std=(0.2,) * 3)
    sequences: Tensor = jk.assemble_tokens(kept, weight, ids, ids, None)
    near: Tensor = jk.distance_weights(ids, ids, (1, 3, 3), scale=2.0)
    places: Tensor = jk.patch_positions(ids, (1, 3, 3), pretrained_grid=16)
    mixed: Tensor = jk.linear(sequences, weight, None, backend="cpu")
    return embedded.sum() + mixed.sum() + near.sum() + places.sum()


def losses(x: Tensor, ids: Tensor) -> Tensor:
    loss: Tensor = jk.latent_loss(x, x, ids, kind="l1", reduction="mean")
    contrast: Tensor = jk.info_nce(x, x, 0.1, label_smoothing=0.1)
    spread: Tensor = jk.sigreg(x, slices=64, seed=1)
    stats: jk.CollapseStats = jk.collapse_stats(x)
    return loss + contrast + spread + stats.std


def updates(network: nn.Module, target: nn.Module, tensors: list[Tensor]) -> Tensor:
    jk.ema_update(target, network, 0.99, form="ijepa")
    table = jk.EmaTable(tensors, tensors, shadow=None)
    table.update(0.99)
    optimizer: torch.optim.Optimizer = jk.AdamWEMA(network.parameters(), lr=1e-3, momentum=0.99)
    optimizer.step()
    jk.adamw_ema(tensors, tensors, tensors, tensors, tensors, None, lr=1e-3)
    return jk.grad_norm(tensors)


def machine() -> str:
    backends: tuple[str, ...] = jk.available_backends("rope")
    report: dict[str, object] = jk.info()
    try:
        with jk.use_backend("reference", rope="cpu"):
            said: str = jk.explain("rope", torch.zeros(1), torch.zeros(1))
    except (jk.BackendError, jk.BackendWarning):
        raise
    jk.empty_cache()
    with jk.profile() as recorded:
        report |= {"profile": recorded.report()}
    return said + str(jk.warmup("ijepa", device="cpu")) + str(report) + "".join(backends)
