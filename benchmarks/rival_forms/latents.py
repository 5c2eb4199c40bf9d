"""Losses, patch embedding and rotation."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.rival_forms.form import Form, step, timed


def latent_loss(small: bool) -> Iterator[Form]:
    item = 4 if small else 2
    shapes = {"ijepa_h14": (128, 256, 1280, 4, 42), "vjepa2_g": (24, 2048, 1408, 1, 972)}
    for workload, (batch, count, channels, masks, kept) in shapes.items():
        batch, kept = (2, 42) if small else (batch, kept)
        elements = masks * batch * kept * channels

        def published(pred: Tensor, target: Tensor, ids: Tensor, masks: int = masks) -> Tensor:
            normed = F.layer_norm(target.float(), target.shape[-1:])
            chosen = [normed.gather(1, i[..., None].repeat(1, 1, normed.shape[-1])) for i in ids.chunk(masks)]
            return F.smooth_l1_loss(pred.float(), torch.cat(chosen))

        def gather_first(pred: Tensor, target: Tensor, ids: Tensor, masks: int = masks) -> Tensor:
            image = torch.arange(len(ids), device=ids.device) % target.shape[0]
            chosen = target[image[:, None], ids].float()
            return F.smooth_l1_loss(pred.float(), F.layer_norm(chosen, chosen.shape[-1:]))

        forms = {"published": published, "gather_first": gather_first, "compile": torch.compile(gather_first)}
        for stage in ("forward", "backward"):
            for name, form in forms.items():

                def make(device, dtype, form=form, stage=stage, shape=(batch, count, channels, masks, kept)):
                    batch, count, channels, masks, kept = shape
                    ids = torch.rand(masks * batch, count, device=device).argsort(1)[:, :kept].sort(1).values
                    pred = torch.randn(masks * batch, kept, channels, device=device, dtype=dtype)
                    target = torch.randn(batch, count, channels, device=device, dtype=dtype)
                    return timed(stage, lambda p: form(p, target, ids), pred)

                moved = elements * item * (2 if stage == "forward" else 3)
                yield Form(name, f"latent_loss_{workload}", make, moved, 13 * elements, stage, False, name == "compile")


def patch_embedding(small: bool) -> Iterator[Form]:
    """Kept patches only: dense convolution and gather, against unfold, index and one product."""
    item = 4 if small else 2
    shapes = {"image": (128, 256, 70, 3 * 14 * 14, 1280), "video": (24, 2048, 508, 3 * 2 * 16 * 16, 1408)}
    for workload, (batch, count, kept, inside, width) in shapes.items():
        batch = 2 if small else batch
        video = workload == "video"

        def draw(device, dtype, batch=batch, count=count, kept=kept, inside=inside, width=width, video=video):
            size = (batch, 3, 16, 256, 256) if video else (batch, 3, 224, 224)
            kernel = (width, 3, 2, 16, 16) if video else (width, 3, 14, 14)
            ids = torch.rand(batch, count, device=device).argsort(1)[:, :kept].sort(1).values
            pixels, weight = (torch.randn(s, device=device, dtype=dtype) for s in (size, kernel))
            return pixels, weight, torch.zeros(width, device=device, dtype=dtype), ids

        def conv_gather(device, dtype, draw=draw, video=video):
            pixels, weight, bias, ids = draw(device, dtype)
            index = ids[..., None].expand(-1, -1, weight.shape[0])

            def run() -> Tensor:
                conv = F.conv3d if video else F.conv2d
                return conv(pixels, weight, bias, weight.shape[2:]).flatten(2).transpose(1, 2).gather(1, index)

            return run

        def unfold_linear(device, dtype, draw=draw, video=video):
            pixels, weight, bias, ids = draw(device, dtype)
            sizes = weight.shape[2:]
            image = torch.arange(len(ids), device=device)[:, None]

            def run() -> Tensor:
                patches = pixels
                for axis, size in enumerate(sizes):
                    patches = patches.unfold(2 + axis, size, size)
                grid = patches.shape[2 : 2 + len(sizes)]
                place = torch.unravel_index(ids, grid)
                chosen = patches.movedim(1, 1 + len(sizes))[(image, *place)]
                return F.linear(chosen.flatten(2), weight.flatten(1), bias)

            return run

        rows = batch * kept
        cost = dict(bytes=item * (rows * (inside + width) + inside * width), flops=2 * rows * inside * width)
        yield Form("conv_gather", f"embed_patches_{workload}", conv_gather, **cost)
        yield Form("unfold_linear", f"embed_patches_{workload}", unfold_linear, **cost)


def contrastive(small: bool) -> Iterator[Form]:
    """InfoNCE in both directions, logits materialised."""
    for size in (256,) if small else (2048, 4096, 24576):

        def loss(a: Tensor, b: Tensor) -> Tensor:
            logits, labels = (a @ b.T).float() / 0.07, torch.arange(len(a), device=a.device)
            return F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)

        def make(device, dtype, size=size, loss=loss):
            a, b = (F.normalize(torch.randn(size, 1536, device=device), dim=-1).to(dtype) for _ in range(2))
            return step(loss, a, b)

        cost = dict(bytes=4 * size * 1536 * (4 if small else 2), flops=6 * size**2 * 1536)
        yield Form("logits", f"info_nce_{size}", make, stage="backward", **cost)


def sigreg(small: bool) -> Iterator[Form]:
    """Epps-Pulley statistic on random slices: cosines and sines of every slice, sample and knot."""
    rows, slices = (256, 64) if small else (4096, 1000)

    def statistic(x: Tensor, directions: Tensor, knots: Tensor) -> Tensor:
        angles = (x @ directions).float()[..., None] * knots
        gap = (angles.cos().mean(0) - torch.exp(-0.5 * knots**2)) ** 2 + angles.sin().mean(0) ** 2
        return gap.sum(-1).mean()

    def make(device, dtype, form=statistic):
        x = torch.randn(rows, 512, device=device, dtype=dtype)
        directions = F.normalize(torch.randn(512, slices, device=device), dim=0).to(dtype)
        knots = torch.linspace(-5, 5, 17, device=device)
        return step(lambda x: form(x, directions, knots), x)

    cost = dict(bytes=(2 * rows * 512 + 512 * slices) * (4 if small else 2), flops=6 * rows * 512 * slices)
    yield Form("eager", "sigreg", make, stage="backward", **cost)

    def make_compiled(device, dtype):
        return make(device, dtype, torch.compile(statistic))

    yield Form("compile", "sigreg", make_compiled, stage="backward", compiles=True, **cost)


def rope(small: bool) -> Iterator[Form]:
    """V-JEPA 2's rotation by frame, row and column, as published: each axis apart, in fp32, then a concatenation."""
    batch, heads, tokens, dim = (2, 2, 256, 64) if small else (24, 22, 2048, 64)
    part = 2 * (dim // 3 // 2)

    def rotate(x: Tensor, positions: Tensor) -> Tensor:
        half = torch.arange(part // 2, device=x.device, dtype=torch.float32) / (part / 2)
        angles = positions.float()[:, None] * 10000.0**-half
        cosine, sine = (f(angles).repeat(1, 2) for f in (torch.cos, torch.sin))
        even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack((-odd, even), -1).flatten(-2)
        return (x * cosine + turned * sine).to(x.dtype)

    def both(q: Tensor, k: Tensor, positions: list[Tensor]) -> list[Tensor]:
        out = []
        for x in (q, k):
            pieces = [rotate(x[..., i * part : (i + 1) * part], p) for i, p in enumerate(positions)]
            out.append(torch.cat([*pieces, x[..., 3 * part :]], -1))
        return out

    def make(device, dtype, form=both):
        q, k = (torch.randn(batch, heads, tokens, dim, device=device, dtype=dtype) for _ in range(2))
        at = torch.arange(tokens, device=device)
        positions = [at // 256, at % 256 // 16, at % 16]
        return lambda: form(q, k, positions)

    cost = dict(bytes=4 * batch * heads * tokens * dim * (4 if small else 2))
    yield Form("published", "rope_vjepa2_g", make, **cost)
    yield Form("compile", "rope_vjepa2_g", lambda d, t: make(d, t, torch.compile(both)), compiles=True, **cost)


def nearest_distance(small: bool) -> Iterator[Form]:
    """Distance of each context token to the nearest target token: weights of a loss."""
    context, target = (256, 64) if small else (1024, 1024)

    def make(device, dtype):
        places = [torch.randint(0, 16, (8, n, 3), device=device).float() for n in (context, target)]
        return lambda: torch.cdist(*places).amin(-1)

    moved = 8 * 3 * 4 * (context + target)
    yield Form("cdist", "distance_weights", make, bytes=moved, flops=8.0 * 8 * context * target, fp32=True)
