"""The vision transformer that encodes images and videos, whole or by kept patches."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from jepa_kernels._core.check import fail
from jepa_kernels.nn.block import NORM_EPS, Block, init_weights
from jepa_kernels.nn.patch_embed import PatchEmbed, frozen_table, resized, sincos
from jepa_kernels.packing import Packing
from jepa_kernels.rotary import Rope, patch_positions, published_frequencies

PRECISIONS = "float32", "bf16_exponent", "bfloat16"  # of rotary angles
LEVELS = 4  # the quarters of the blocks, after each of which V-JEPA 2.1 has a norm
UNEVEN = {48: (12, 24, 38, 48)}  # of ViT-G, whose third part is published as 14 blocks, the last as 10


class Encoder(nn.Module):
    """Pre-norm ViT without class token; patches outside `ids` cost nothing.

    tubelet_size: frames of a video's patch; None: images.
    rope: how queries and keys turn with their patch's frame, row and column, a pairing of `Rope` ("tiled": V-JEPA 2,
        "interleaved": V-JEPA 2.1): pixels of any size and number of frames. None: a table of positions is added to
        the patches, I-JEPA's for images of crop_size alone, V-JEPA's for clips of num_frames of them.
    rope_precision: "float32": exact angles. "bf16_exponent": frequencies from exponents in bf16, off by up to 1.5 %, as
        published training under autocast has them; angles are exact. "bfloat16": angles are rounded too, as in
        published code whose weights are bf16.
    num_frames, uniform_power: of the table for clips (see `sincos_3d`). interpolate_positions: clips of other sizes and
        numbers of frames have it resized, trilinear, as published; False: they are refused.
    pretrained_grid: of positions with rope (see `patch_positions`); V-JEPA 2.1: 256 // patch_size.
    frame_causal: a patch sees those of its own frame and of earlier ones alone.
    levels: None: the last block's output has a norm, `norm`. 1 to 4: `norms_block`, one after each quarter of the
        blocks (of 48: after 12, 24, 38 and 48 of them, as published), of which the last `levels` are trained and make
        up dense latents (V-JEPA 2.1).
    image_tokenizer: images, and clips of one frame, have patches of one frame, by a layer of their own.
    modality_embedding: a learned vector is added to every patch, one for images and one for videos.
    mean, std: of each channel, applied to pixels on the way in (see `embed_patches`); uint8 pixels need them.

    Under autocast the blocks of an encoder with I-JEPA's table add up in the weights' dtype, others in autocast's, each
    as in its published code.
    """

    autocast_casts = ("pos_embed",)  # by embed_patches: low-precision twins copy it too

    def __init__(
        self,
        crop_size: int | tuple[int, int],
        patch_size: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        in_chans: int = 3,
        *,
        tubelet_size: int | None = None,
        rope: str | None = None,
        rope_precision: str = "float32",
        num_frames: int | None = None,
        uniform_power: bool = True,
        interpolate_positions: bool = False,
        pretrained_grid: int | None = None,
        frame_causal: bool = False,
        levels: int | None = None,
        image_tokenizer: bool = False,
        modality_embedding: bool = False,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        check_rope("Encoder", rope, rope_precision)
        self.grid: tuple[int, ...] = _grid(crop_size, patch_size)
        if tubelet_size is not None and rope is None:
            self.grid = (frames_of("Encoder", num_frames, tubelet_size), *self.grid)
        if levels is not None and (depth % LEVELS or not 1 <= levels <= LEVELS):
            wanted = f"be 1 to {LEVELS}, for a depth of as many equal parts"
            fail("Encoder", "levels", wanted, f"{levels} with depth {depth}", "leave it out for one norm")
        self.rope, self.pretrained_grid, self.frame_causal, self.levels = rope, pretrained_grid, frame_causal, levels
        self.rope_precision, self.head_dim = rope_precision, embed_dim // num_heads
        given = dict(mean=mean, std=std)
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim, tubelet_size, **given)
        self.patch_embed_img = PatchEmbed(patch_size, in_chans, embed_dim, 1, **given) if image_tokenizer else None
        self.img_mod_embed, self.video_mod_embed = modality_embeddings(embed_dim, modality_embedding)
        if interpolate_positions and (rope is not None or tubelet_size is None):
            wanted, remedy = "be False without a table for clips", "rotary positions are of any size"
            fail("Encoder", "interpolate_positions", wanted, True, remedy)
        self.pos_embed, self.uniform_power, self.interpolate_positions = None, uniform_power, interpolate_positions
        if rope is None:
            self.pos_embed = frozen_table("Encoder", "embed_dim", self.grid, embed_dim, uniform_power=uniform_power)
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio) for _ in range(depth))
        if levels is None:
            self.norm = nn.LayerNorm(embed_dim, eps=NORM_EPS)
        else:
            self.norms_block = nn.ModuleList(nn.LayerNorm(embed_dim, eps=NORM_EPS) for _ in range(LEVELS))
        self.apply(init_weights)

    def forward(
        self, pixels: Tensor, ids: Tensor | None = None, packing: Packing | None = None, *, dense: bool = False
    ) -> Tensor:
        """Encode every patch of images or videos, or the kept ones of all masks in one pass.

        pixels [B, C, H, W] or [B, C, T, H, W]; an image given to a video encoder without a tokenizer of its own is
        shown for a whole tubelet.
        ids None: every patch -> [B, N, E]. ids int64 [M, K], sorted in each row, row s of image s % B -> [M, K, E].
        ids int64 [T] with `packing` of masks * B sequences -> [T, E].
        dense: the latents of all trained levels side by side, [..., levels * E], which predictors read.
        """
        norms, outputs = self._norms(), self._outputs(pixels, ids, packing)
        if not dense:
            return norms[-1](outputs[-1])
        return _side_by_side([norm(x) for norm, x in zip(norms, outputs, strict=True)])

    def ragged(self, views: Sequence[Tensor]) -> tuple[Tensor, Packing]:
        """Encode every patch of views of several sizes in one packed pass, each view by itself.

        views: pixels [n, C, H, W] of a size each, which takes rope where there are several; or clips of an encoder that
        is not frame_causal. Returns packed [T, E], views one after another as given, and their packing.
        """
        if self.frame_causal:
            fail("Encoder", "ragged", "be of an encoder that is not frame_causal", True, "encode each size by itself")
        embedded = [self._embed(view, None, None) for view in views]
        lengths = [x.shape[1] for x in embedded for _ in range(len(x))]
        packing, rope = Packing.from_lengths(lengths, device=embedded[0].device), None
        if self.rope is not None:
            places = [self._positions(view, None).repeat(len(view), 1) for view in views]
            rope = self._turning(torch.cat(places))
        x = torch.cat([x.flatten(0, 1) for x in embedded])
        for block in self.blocks:
            x = block(x, packing, rope)
        return self._norms()[-1](x), packing

    def features(self, pixels: Tensor, ids: Tensor | None = None, packing: Packing | None = None) -> Tensor:
        """`forward(dense=True)` without the last norms."""
        return _side_by_side(self._outputs(pixels, ids, packing))

    def last_norm(self) -> tuple[Tensor, Tensor, float]:
        """Weight, bias and eps of what `features` leaves out, as `latent_loss(norm=)` takes it, levels side by side."""
        norms = self._norms()
        return _side_by_side([n.weight for n in norms]), _side_by_side([n.bias for n in norms]), norms[0].eps

    def grid_of(self, pixels: Tensor) -> tuple[int, int, int]:
        """(Gt, Gh, Gw): how many patches these pixels have along time, height and width."""
        *tubelet, height, width = self.patch_embed.proj.kernel_size
        frames = 1 if self.shows_images(pixels) else pixels.shape[2] // tubelet[0]
        return frames, pixels.shape[-2] // height, pixels.shape[-1] // width

    def shows_images(self, pixels: Tensor) -> bool:
        """Whether pixels are images, or clips of one frame with a tokenizer for these."""
        return pixels.dim() == 4 or (self.patch_embed_img is not None and pixels.shape[2] == 1)

    def reset_positions(self) -> None:
        """Write the table of positions anew, if there is one, as after `to_empty`."""
        if self.pos_embed is not None:
            self.pos_embed.data.copy_(sincos(self.grid, self.pos_embed.shape[-1], self.uniform_power))

    def _norms(self) -> list[nn.LayerNorm]:
        return [self.norm] if self.levels is None else cast(list[nn.LayerNorm], list(self.norms_block)[-self.levels :])

    def _outputs(self, pixels: Tensor, ids: Tensor | None, packing: Packing | None) -> list[Tensor]:
        """Of the last block of each trained level."""
        x = self._embed(pixels, ids, packing)
        rope, sight = self._rope(pixels, ids), self._sight(pixels, ids, packing)
        ends, outputs = _ends(len(self.blocks), self.levels or 1), []
        for n, block in enumerate(self.blocks, 1):
            x = block(x, packing, rope, **sight)
            if n in ends:
                outputs.append(x)
        return outputs or [x]

    def _embed(self, pixels: Tensor, ids: Tensor | None, packing: Packing | None) -> Tensor:
        image = self.shows_images(pixels)
        embed = self.patch_embed_img if image and self.patch_embed_img is not None else self.patch_embed
        modality = self.img_mod_embed if image else self.video_mod_embed
        table, shift = self.pos_embed, None if modality is None else modality[0, 0]
        grid = self.grid_of(pixels)[-len(self.grid) :]
        if table is not None and self.interpolate_positions and grid != self.grid:
            return embed(pixels, ids, packing, resized(table[0], self.grid, grid), shift)
        x = embed(pixels, ids, packing, None if table is None else table[0], shift)
        if table is not None and grid != self.grid:  # of as many patches
            wanted, remedy = f"have {self.grid} patches like the table of positions", "crop to the config's size"
            fail("Encoder", "pixels", wanted, self.grid_of(pixels), remedy)
        if table is not None and len(grid) == 2:  # I-JEPA's: under autocast the blocks add up in full precision
            x = x.to(self._norms()[-1].weight.dtype)
        return x

    def _rope(self, pixels: Tensor, ids: Tensor | None) -> Rope | None:
        return None if self.rope is None else self._turning(self._positions(pixels, ids))

    def _turning(self, positions: Tensor) -> Rope:
        exactness = rounding(self.rope_precision, self.head_dim, positions.device)
        return Rope(positions, pairing=cast(str, self.rope), **exactness)

    def _positions(self, pixels: Tensor, ids: Tensor | None) -> Tensor:
        """Frame, row and column of these patches; of all: [N, 3]."""
        grid = self.grid_of(pixels)
        if ids is None:
            ids = torch.arange(grid[0] * grid[1] * grid[2], device=pixels.device)
        return patch_positions(ids, grid, pretrained_grid=self.pretrained_grid)

    def _sight(self, pixels: Tensor, ids: Tensor | None, packing: Packing | None) -> dict[str, Any]:
        if not self.frame_causal:
            return {}
        frames, height, width = self.grid_of(pixels)
        if ids is None:
            return {"frame_size": height * width}
        return {"key_ranges": frame_ranges(ids, height * width, frames * height * width, packing)}


def frame_ranges(ids: Tensor, frame_size: int, count: int, packing: Packing | None) -> Tensor:
    """The kept patches that each one sees where no later frame is seen, as `key_ranges` of `masked_attention`.

    ids: int64 [M, K], or [T] with `packing`, sorted in each sequence, in [0, count). Found on the device, without a
    sync: how many ids of the sequence lie before the end of the patch's frame.
    """
    after = (ids // frame_size + 1) * frame_size
    if packing is None:
        end = torch.searchsorted(ids, after)
    else:  # places on one line, sequence after sequence; rows past the last one lie behind all that are asked for
        sequence = packing.sequence_of_token()
        start = packing.cu_seqlens[sequence]
        end = torch.searchsorted(ids + sequence * count, after + sequence * count) - start
    end = end.to(torch.int32)
    return torch.stack([torch.zeros_like(end), end], -1)


def check_rope(module: str, rope: str | None, precision: str = "float32") -> None:
    """A pairing of the three axes of a patch's place, or None, and the precision of its angles."""
    if precision not in PRECISIONS:
        wanted = f"be {', '.join(PRECISIONS[:-1])} or {PRECISIONS[-1]}"
        fail(module, "rope_precision", wanted, repr(precision), "leave it out for exact angles")
    if rope not in (None, "interleaved", "tiled"):
        fail(module, "rope", "be interleaved, tiled or None", repr(rope), "V-JEPA 2 was trained with 'tiled'")


def rounding(precision: str, head_dim: int, device: torch.device) -> dict[str, Any]:
    """What a Rope of three axes takes for angles of this precision."""
    if precision == "float32":
        return {}
    pairs = head_dim // 3 // 2
    if precision == "bf16_exponent":
        return {"frequencies": published_frequencies(pairs, torch.bfloat16, device, torch.float32)}
    frequencies = published_frequencies(pairs, torch.bfloat16, device)
    return {"frequencies": frequencies.float(), "angle_dtype": torch.bfloat16}


def modality_embeddings(dim: int, wanted: bool) -> tuple[nn.Parameter | None, nn.Parameter | None]:
    """Of images and of videos, [1, 1, dim] each, near 0 at the start; None where they are not wanted."""
    if not wanted:
        return None, None
    image, video = (nn.Parameter(torch.empty(1, 1, dim).normal_(std=1e-6)) for _ in range(2))
    return image, video


def _ends(depth: int, levels: int) -> tuple[int, ...]:
    """How many blocks stand before each of the last `levels` norms."""
    quarters = tuple(depth * n // LEVELS for n in range(1, LEVELS + 1))
    return UNEVEN.get(depth, quarters)[-levels:]


def _side_by_side(levels: Sequence[Tensor]) -> Tensor:
    return levels[0] if len(levels) == 1 else torch.cat(list(levels), -1)


def _grid(crop_size: int | tuple[int, int], patch_size: int) -> tuple[int, int]:
    """(Gh, Gw) of the crop."""
    crop = (crop_size, crop_size) if isinstance(crop_size, int) else tuple(crop_size)
    if patch_size < 1 or len(crop) != 2:
        sizes = f"crop_size {crop_size} and patch_size {patch_size}"
        fail("Encoder", "sizes", "be a side or (height, width), and at least 1", sizes, "pass pixels")
    if crop[0] % patch_size or crop[1] % patch_size:
        fail("Encoder", "crop_size", f"be a multiple of patch_size {patch_size}", crop_size, "crop to a multiple")
    return crop[0] // patch_size, crop[1] // patch_size


def frames_of(module: str, num_frames: int | None, tubelet_size: int) -> int:
    """Gt of clips of num_frames."""
    if num_frames is None:
        fail(module, "num_frames", "be given for a video's table of positions", None, "or pass rope='tiled'")
    if tubelet_size < 1 or num_frames < 1 or num_frames % tubelet_size:
        requirement = f"be a multiple of tubelet_size {tubelet_size}"
        fail(module, "num_frames", requirement, num_frames, "cut the clip to one")
    return num_frames // tubelet_size
