"""Networks with the attribute names, signatures and equations of the published I-JEPA, V-JEPA and V-JEPA 2 code."""

import torch
import torch.nn.functional as F
from torch import nn


def rotate_queries_or_keys(x, pos):
    """One axis of rotary positions: channels 2k and 2k + 1 are a pair, the frequencies are tiled, not paired."""
    half = x.shape[-1] // 2
    omega = 1.0 / 10000 ** (torch.arange(half, dtype=x.dtype, device=x.device) / half)
    angle = pos[..., None] * omega
    cos, sin = (torch.cat([turn, turn], -1) for turn in (angle.cos(), angle.sin()))
    partner = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    return x * cos + partner * sin


class _Attention(nn.Module):
    def __init__(self, dim, num_heads, qk_scale=None, attn_drop=0.0, proj_drop=0.0, use_sdpa=True, is_causal=False):
        super().__init__()
        self.num_heads = num_heads
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop_prob, self.proj_drop = proj_drop, nn.Dropout(proj_drop)
        self.use_sdpa, self.is_causal = use_sdpa, is_causal

    def heads(self, x):
        return self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)

    def attend(self, q, k, v, attn_mask=None):
        """(output, weights or None)"""
        attn = None
        if attn_mask is not None or self.use_sdpa:
            options = dict(dropout_p=self.proj_drop_prob, is_causal=self.is_causal)  # in eval too, as published
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, **options)
        else:
            attn = self.attn_drop((q @ k.mT * self.scale).softmax(-1))
            x = attn @ v
        return self.proj_drop(self.proj(x.transpose(1, 2).flatten(2))), attn


class IJEPAAttention(_Attention):
    def __init__(self, dim, num_heads, **options):
        super().__init__(dim, num_heads, use_sdpa=False, **options)
        del self.use_sdpa, self.is_causal, self.proj_drop_prob

    def forward(self, x):
        q, k, v = self.heads(x)
        attn = self.attn_drop((q @ k.mT * self.scale).softmax(-1))
        return self.proj_drop(self.proj((attn @ v).transpose(1, 2).flatten(2))), attn


class VJEPAAttention(_Attention):
    def forward(self, x, mask=None):
        return self.attend(*self.heads(x))


class Attention(_Attention):
    def forward(self, x, mask=None, attn_mask=None):
        return self.attend(*self.heads(x), attn_mask)[0]


class RoPEAttention(_Attention):
    def __init__(self, dim, num_heads, grid_size=4, **options):
        super().__init__(dim, num_heads, **options)
        self.grid_size = grid_size
        self.d_dim = self.h_dim = self.w_dim = 2 * (dim // num_heads // 3 // 2)

    def forward(self, x, mask=None, attn_mask=None, T=None, H_patches=None, W_patches=None):
        q, k, v = self.heads(x)
        height, width = (self.grid_size, self.grid_size) if H_patches is None else (H_patches, W_patches)
        ids = (
            torch.arange(x.shape[1], device=x.device) if mask is None else mask[:, None].expand(-1, self.num_heads, -1)
        )
        places = ids // (height * width), ids % (height * width) // width, ids % width
        q, k = (self.turned(y, places) for y in (q, k))
        return self.attend(q, k, v, attn_mask)[0]

    def turned(self, x, places):
        *axes, rest = x.split([self.d_dim, self.h_dim, self.w_dim, x.shape[-1] - 3 * self.d_dim], -1)
        return torch.cat([*(rotate_queries_or_keys(y, pos) for y, pos in zip(axes, places, strict=True)), rest], -1)


class ACRoPEAttention(RoPEAttention):
    def forward(self, x, mask=None, attn_mask=None, T=None, H=None, W=None, action_tokens=0):
        return super().forward(x, mask, attn_mask, T, H, W)


class MLP(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class _Block(nn.Module):
    def __init__(self, attention, dim, num_heads, **options):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(dim, eps=1e-6) for _ in range(2))
        self.attn = attention(dim, num_heads, **options)
        self.drop_path = nn.Identity()
        self.mlp = MLP(dim, 2 * dim)

    def rest(self, x, y):
        x = x + self.drop_path(y)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class IJEPABlock(_Block):
    """Of I-JEPA and V-JEPA, whose attention returns its weights too."""

    def forward(self, x, return_attention=False, mask=None):
        y, attn = self.attn(self.norm1(x))
        return attn if return_attention else self.rest(x, y)


class Block(_Block):
    def forward(self, x, mask=None, attn_mask=None, T=None, H_patches=None, W_patches=None):
        grid = dict(T=T, H_patches=H_patches, W_patches=W_patches) if isinstance(self.attn, RoPEAttention) else {}
        return self.rest(x, self.attn(self.norm1(x), mask=mask, attn_mask=attn_mask, **grid))


class PatchEmbed(nn.Module):
    def __init__(self, patch_size, in_chans, embed_dim):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class PatchEmbed3D(nn.Module):
    def __init__(self, patch_size, tubelet_size, in_chans, embed_dim):
        super().__init__()
        self.patch_size, self.tubelet_size = patch_size, tubelet_size
        sides = tubelet_size, patch_size, patch_size
        self.proj = nn.Conv3d(in_chans, embed_dim, sides, stride=sides)

    def forward(self, x, **kwargs):
        _batch, _channels, _frames, _height, _width = x.shape
        return self.proj(x).flatten(2).transpose(1, 2)


def kept(x, masks):
    """The tokens that masks [B, K] name, mask-major."""
    return torch.cat([x.gather(1, mask[..., None].expand(-1, -1, x.shape[-1])) for mask in masks])


class VisionTransformer(nn.Module):
    """I-JEPA's and V-JEPA's for an attention that returns its weights, V-JEPA 2's for one with rotary positions."""

    def __init__(self, attention, patch_embed, dim=64, depth=2, num_heads=2, num_patches=None, **options):
        super().__init__()
        block = Block if attention in (Attention, RoPEAttention) else IJEPABlock
        self.patch_embed = patch_embed
        self.pos_embed = None if num_patches is None else nn.Parameter(torch.randn(1, num_patches, dim))
        self.blocks = nn.ModuleList(block(attention, dim, num_heads, **options) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x, masks=None):
        height, width = (n // self.patch_embed.patch_size for n in x.shape[-2:])
        x = self.patch_embed(x)
        if self.pos_embed is not None:
            x = x + self.pos_embed
        grid = {}
        if isinstance(self.blocks[0], Block):
            grid = dict(T=x.shape[1] // (height * width), H_patches=height, W_patches=width)
        if masks is not None:
            x, masks = kept(x, masks), torch.cat(masks)
        for block in self.blocks:
            x = block(x, mask=masks, **grid)
        return self.norm(x)


class VisionTransformerPredictor(nn.Module):
    """V-JEPA 2's: tokens in the order of their places, square grids alone."""

    def __init__(self, dim=64, width=48, depth=2, num_heads=2, grid_size=4):
        super().__init__()
        self.predictor_embed = nn.Linear(dim, width)
        self.mask_tokens = nn.ParameterList(nn.Parameter(torch.randn(1, 1, width)) for _ in range(2))
        blocks = (Block(RoPEAttention, width, num_heads, grid_size=grid_size) for _ in range(depth))
        self.predictor_blocks = nn.ModuleList(blocks)
        self.predictor_norm = nn.LayerNorm(width, eps=1e-6)
        self.predictor_proj = nn.Linear(width, dim)

    def forward(self, x, masks_x, masks_y, mask_index=1):
        tokens = self.mask_tokens[mask_index].expand(*masks_y.shape, -1)
        x, ids = torch.cat([self.predictor_embed(x), tokens], 1), torch.cat([masks_x, masks_y], 1)
        order = ids.argsort(1)
        x, ids = kept(x, [order]), ids.gather(1, order)
        for block in self.predictor_blocks:
            x = block(x, mask=ids)
        x = kept(self.predictor_norm(x), [order.argsort(1)])[:, masks_x.shape[1] :]
        return self.predictor_proj(x)
