"""Predictors of the next frame's latents from the frames so far and the actions taken in them."""

from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

import jepa_kernels as jk
from jepa_kernels._core.check import fail
from jepa_kernels.nn.block import NORM_EPS, ActionBlock, init_weights, rescale_blocks
from jepa_kernels.nn.encoder import check_rope
from jepa_kernels.nn.linear import Linear
from jepa_kernels.rotary import Rope

CONDITIONINGS = ("tokens", "adaln")


class ActionPredictor(nn.Module):
    """Latents of frame t + 1 from those of frames 0..t, at the place of frame t: what an action does to the world.

    A token sees every token of its own frame and of earlier ones. grid: (Gh, Gw), the patches of a frame.
    conditioning: "tokens" (V-JEPA 2-AC): in front of a frame's patches stand its action, its state, and with
        use_extrinsics its camera, each by a Linear of its own; one product makes queries, keys and values of all.
        "adaln" (JEPA-WMs): the action modulates every block, at each frame's tokens alike.
    state_dim, extrinsics_dim: None: no such Linear, and no such token. The published files hold one for extrinsics,
        which only use_extrinsics makes use of.
    rope: how queries and keys turn with frame, row and column; conditioning tokens stand at (t, 0, 0).
    rope_grid: rows and columns are spread over those of a square grid of this side, h rope_grid / Gh; None: h.
        Published: 16, that of 256 pixels.
    """

    def __init__(
        self,
        grid: tuple[int, int],
        embed_dim: int,
        predictor_embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        *,
        conditioning: str = "tokens",
        action_dim: int = 7,
        state_dim: int | None = 7,
        extrinsics_dim: int | None = 6,
        use_extrinsics: bool = False,
        rope: str = "tiled",
        rope_grid: int | None = None,
    ) -> None:
        super().__init__()
        dim, tokens = predictor_embed_dim, conditioning == "tokens"
        check_rope("ActionPredictor", rope)
        if conditioning not in CONDITIONINGS:
            fail("ActionPredictor", "conditioning", "be tokens or adaln", repr(conditioning), "V-JEPA 2-AC has tokens")
        if not tokens and not state_dim is extrinsics_dim is None:
            given = f"{state_dim} and {extrinsics_dim}"
            fail("ActionPredictor", "state_dim and extrinsics_dim", "be None with adaln", given, "leave them out")
        if depth < 1 or (use_extrinsics and extrinsics_dim is None):
            found = f"depth {depth}, extrinsics_dim {extrinsics_dim}, use_extrinsics {use_extrinsics}"
            fail("ActionPredictor", "sizes", "be at least 1, and known where used", found, "V-JEPA 2-AC has 24 blocks")
        self.grid, self.rope, self.rope_grid, self.use_extrinsics = grid, rope, rope_grid, use_extrinsics
        self.predictor_embed = Linear(embed_dim, dim)
        self.action_encoder = Linear(action_dim, dim)
        self.state_encoder = None if state_dim is None else Linear(state_dim, dim)
        self.extrinsics_encoder = None if extrinsics_dim is None else Linear(extrinsics_dim, dim)
        blocks = [ActionBlock(dim, num_heads, mlp_ratio, not tokens) for _ in range(depth)]
        self.predictor_blocks = nn.ModuleList(blocks)
        self.predictor_norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.predictor_proj = Linear(dim, embed_dim)
        modulations = [block.adaLN_modulation for block in blocks if block.adaLN_modulation is not None]
        started = [parameter.clone() for m in modulations for parameter in m.parameters()]
        self.apply(init_weights)
        rescale_blocks(self.predictor_blocks)
        for parameter, start in zip((p for m in modulations for p in m.parameters()), started, strict=True):
            parameter.data.copy_(start)
        # What stands before a frame's patches.
        self.cond_tokens = 1 + (state_dim is not None) + use_extrinsics if tokens else 0
        self.frame_tokens = self.cond_tokens + grid[0] * grid[1]

    def forward(
        self, latents: Tensor, actions: Tensor, states: Tensor | None = None, extrinsics: Tensor | None = None
    ) -> Tensor:
        """Predict the frame after every one: latents [B, T, N, E], actions [B, T, A] -> [B, T, N, E].

        states [B, T, Ds], extrinsics [B, T, Dx]: where the model has tokens of them.
        """
        action = self.action(actions)
        x = self.join(action, self.parts(self.predictor_embed(latents), states, extrinsics))
        rope = self.rope_of(0, latents.shape[1])
        for block in self.predictor_blocks:
            x = block(x, action, partial(self._attend, rope=rope))
        return self.predict(x)

    def action(self, actions: Tensor) -> Tensor:
        """What steers a frame: [..., A] -> [..., 1, D], its first token, or what modulates its blocks."""
        return _token(self.action_encoder, actions)

    def parts(self, patches: Tensor, states: Tensor | None, extrinsics: Tensor | None) -> list[Tensor]:
        """The other tokens of frames: of states and extrinsics where the model has them, and patches [..., N, D]."""
        found = [] if self.state_encoder is None else [_token(self.state_encoder, states)]
        if self.use_extrinsics:
            found.append(_token(self.extrinsics_encoder, extrinsics))
        return [*found, patches]

    def join(self, action: Tensor, parts: list[Tensor]) -> Tensor:
        """All tokens of frames, [..., n, D]."""
        x = torch.cat([action, *parts], -2) if self.cond_tokens else parts[0]
        return x.to(self.predictor_norm.weight.dtype)  # under autocast the blocks add up in full precision

    def rope_of(self, first: int, frames: int) -> Rope:
        """Of all tokens of so many frames, from number `first` on."""
        device, (height, width) = self.predictor_norm.weight.device, self.grid
        scales = [1.0 if self.rope_grid is None else self.rope_grid / side for side in self.grid]
        row, column = (torch.arange(side, device=device) * scale for side, scale in zip(self.grid, scales, strict=True))
        places = torch.zeros(frames, self.frame_tokens, 3, device=device)
        places[..., 0] = torch.arange(first, first + frames, device=device)[:, None]
        places[:, self.cond_tokens :, 1] = row.repeat_interleave(width)
        places[:, self.cond_tokens :, 2] = column.repeat(height)
        return Rope(places.flatten(0, 1), pairing=self.rope)

    def predict(self, x: Tensor) -> Tensor:
        """The last block's tokens [B, T, n, D] -> [B, T, N, E]."""
        return self.predictor_proj(self.predictor_norm(x[:, :, self.cond_tokens :]))

    def heads(self, qkv: Tensor) -> Tensor:
        """[B, T, n, 3 D] -> [B, T n, 3, H, D / H], a view."""
        return qkv.flatten(1, 2).unflatten(-1, (3, cast(ActionBlock, self.predictor_blocks[0]).attn.num_heads, -1))

    def _attend(self, qkv: Tensor, rope: Rope) -> Tensor:
        out = jk.masked_attention_qkv(self.heads(qkv), frame_size=self.frame_tokens, rope=rope)
        return out.transpose(1, 2).flatten(2).unflatten(1, qkv.shape[1:3])


def _token(encoder: nn.Linear | None, x: Tensor | None) -> Tensor:
    """[..., 1, D] of what a frame is told, [..., A], which may be wider than the weights: poses add up over frames."""
    layer, told = cast(nn.Linear, encoder), cast(Tensor, x)
    return layer(told.to(layer.weight.dtype))[..., None, :]
