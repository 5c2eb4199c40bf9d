"""Transformer blocks: one that attends itself, and one whose caller does."""

import math
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from jepa_kernels.nn.attention import Attention
from jepa_kernels.nn.linear import Linear, gelu_of
from jepa_kernels.nn.modulation import Modulation, modulate
from jepa_kernels.packing import Packing
from jepa_kernels.rotary import Rope

Attend = Callable[[Tensor], Tensor]  # of qkv [B, T, n, 3 D] -> [B, T, n, D], which `attn.proj` takes
NORM_EPS = 1e-6
ADALN_STD = 0.2  # of JEPA-WMs: 0.02 times their factor of 10


class MLP(nn.Module):
    """fc2(gelu(fc1(x))), with the exact (erf) GELU."""

    def __init__(self, embed_dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(embed_dim, hidden)
        self.fc2 = Linear(hidden, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(gelu_of(self.fc1, x))


class Block(nn.Module):
    """Pre-norm: x += attn(norm1(x)); x += mlp(norm2(x))."""

    def __init__(self, embed_dim: int, num_heads: int, mlp_ratio: float = 4.0, *, eps: float = NORM_EPS) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dim, eps=eps)
        self.attn = Attention(embed_dim, num_heads)
        self.norm2 = nn.LayerNorm(embed_dim, eps=eps)
        self.mlp = MLP(embed_dim, int(embed_dim * mlp_ratio))

    def forward(
        self,
        x: Tensor,
        packing: Packing | None = None,
        rope: Rope | None = None,
        qkv: Tensor | None = None,
        **sight: Any,
    ) -> Tensor:
        """x [B, N, E], or packed [T, E] with `packing` -> the same shape.

        qkv: what `self.qkv(x)` gives, if known. sight: which keys a token sees (see `Attention`).
        """
        if qkv is None:
            x = x + self.attn(self.norm1(x), packing, rope, **sight)
        else:
            x = x + self.attn.attend(qkv, packing, rope, **sight)
        return x + self.mlp(self.norm2(x))

    def qkv(self, x: Tensor) -> Tensor:
        """The block's first product, of each token by itself: x [..., E] -> [..., 3 E]."""
        return self.attn.qkv(self.norm1(x))

    def cross(
        self,
        x: Tensor,
        context: Tensor,
        packing: Packing | None = None,
        context_packing: Packing | None = None,
        rope: Rope | None = None,
    ) -> Tensor:
        """`forward` at the rows x of the sequences `context` alone: the others are only looked at."""
        x = x + self.attn.cross(self.norm1(x), self.norm1(context), packing, context_packing, rope)
        return x + self.mlp(self.norm2(x))


class ActionBlock(nn.Module):
    """A pre-norm block whose caller attends; with `modulated` the action shifts, scales and gates both branches:

    x += gate attn(norm1(x) (1 + scale) + shift);  x += gate' mlp(norm2(x) (1 + scale') + shift').
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, modulated: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = MLP(dim, int(dim * mlp_ratio))
        self.adaLN_modulation = Modulation(dim, std=ADALN_STD) if modulated else None
        self._halves = ActionBlock.before, ActionBlock.after

    def forward(self, x: Tensor, action: Tensor, attend: Attend, qkv: Tensor | None = None) -> Tensor:
        """x [B, T, n, D], action [B, T, 1, D]; qkv: what `before` gives of x, if known, without modulation."""
        before, after = self._halves
        parts: tuple[Tensor, ...] = ()
        if qkv is None:
            qkv, parts = before(self, x, action)
        return after(self, x, attend(qkv), parts)

    def before(self, x: Tensor, action: Tensor | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The first product, of each token by itself, x [..., D] -> [..., 3 D]; and what modulation leaves to `after`.

        action: with modulation.
        """
        x, parts = self.norm1(x), ()
        if self.adaLN_modulation is not None:
            shift, scale, *parts = self.adaLN_modulation(action)
            x = modulate(x, shift, scale)
        return self.attn.qkv(x), tuple(parts)

    def after(self, x: Tensor, attended: Tensor, parts: tuple[Tensor, ...]) -> Tensor:
        """What follows attention, of each token by itself: x and attended [..., D] -> [..., D]."""
        attended = self.attn.proj(attended)
        if not parts:
            x = x + attended
            return x + self.mlp(self.norm2(x))
        gate, mlp_shift, mlp_scale, mlp_gate = parts
        x = torch.addcmul(x, gate, attended)
        return torch.addcmul(x, mlp_gate, self.mlp(modulate(self.norm2(x), mlp_shift, mlp_scale)))

    def compile(self, **options: Any) -> None:
        """Compile what stands before and after attention, a graph each for all blocks: the caller attends between."""
        self._halves = torch.compile(ActionBlock.before, **options), torch.compile(ActionBlock.after, **options)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_halves": (ActionBlock.before, ActionBlock.after)}  # as copies of modules


def compile_blocks(network: nn.Module, **options: Any) -> None:
    """Compile every block of `network`, in place, at its first call: norms, casts, GELU and sums run as few kernels.

    Under autocast on a GPU these read and write more than all else but the products, which stay as they are. Blocks of
    one width share their code, whatever the lengths, packed or not: an `IJEPA`, its target encoder included, compiles
    three graphs. Of an `ActionBlock` both sides of its attention are compiled. Names in the state dict stay; copies by
    `copy.deepcopy` are not compiled.
    options: as of torch.compile; dynamic=True unless given.
    """
    for module in network.modules():
        if isinstance(module, Block | ActionBlock):
            module.compile(**{"dynamic": True, **options})


def init_weights(module: nn.Module) -> None:
    """The published start: Linear and convolution weights normal (std 0.02, cut at +-2), biases 0, norms 1 and 0.

    Source: I-JEPA; its rescaling of the residual branches by depth is overwritten again before training.
    """
    if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


def rescale_blocks(blocks: Iterable[nn.Module], first: int = 1) -> None:
    """V-JEPA 2's start: what block n = first, first + 1, ... adds to its input is smaller by sqrt(2 n)."""
    for n, block in enumerate(blocks, first):
        for linear in (cast(Block, block).attn.proj, cast(Block, block).mlp.fc2):
            linear.weight.data.div_(math.sqrt(2 * n))
