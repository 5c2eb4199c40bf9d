"""V-JEPA 2-AC's plans as its authors compute them, on the same weights: the rival of ours."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from jepa_kernels.models.vjepa2_ac import WorldModel
from jepa_kernels.models.world import Context


class Published:
    """Every prefix is predicted anew, from a context that is repeated for every sample; products, and turns by many
    small operations, of action, state and patches apart; a dense mask, made by loops and moved at every call; poses
    one at a time, by SciPy."""

    def __init__(self, model: WorldModel):
        self.model, self.tokens = model, model.predictor.frame_tokens
        self.mask = torch.zeros(model.max_frames * self.tokens, model.max_frames * self.tokens, dtype=torch.bool)
        for seeing in range(model.max_frames):
            for seen in range(seeing + 1):
                rows, columns = (slice(t * self.tokens, (t + 1) * self.tokens) for t in (seeing, seen))
                self.mask[rows, columns] = True

    @torch.no_grad()
    def cem(self, context: Context, goal: Tensor, noise: Tensor, elites: int) -> Tensor:
        """Actions [horizon, 7] by the published planner, its steps and momenta; noise [iterations, S, horizon, 4]."""
        longest, momentum = 0.05, 0.15
        limit = noise.new_tensor([longest, longest, longest, 0.75])
        mean, std = torch.zeros_like(noise[0, 0]), torch.ones_like(noise[0, 0])
        std[:, :3] = longest
        for draw in noise:
            actions = (draw * std + mean).clamp(-limit, limit)
            last = self.rollout(context, expanded(actions))[:, -1]
            energies = (last - goal).abs().mean((1, 2))
            best = actions[energies.topk(elites, largest=False).indices]
            mean = best.mean(0) * (1 - momentum) + mean * momentum
            std = best.std(0) * (1 - momentum) + std * momentum
        mean[:, 3] = torch.where(mean[:, 3].abs() < 0.25, 0, mean[:, 3])
        return expanded(mean)

    @torch.no_grad()
    def rollout(self, context: Context, actions: Tensor) -> Tensor:
        """actions [S, horizon, A] -> latents [S, horizon, N, E], of a context of one frame."""
        assert context.states is not None
        samples, horizon = actions.shape[:2]
        latents = context.latents.flatten(0, 1).repeat(samples, 1, 1)
        states = context.states.repeat(samples, 1, 1)
        patches = context.latents.shape[1]
        for n in range(horizon):
            new = self.predict(latents, actions[:, : n + 1], states)[:, -patches:]
            latents = torch.cat([latents, F.layer_norm(new, new.shape[-1:])], 1)
            states = torch.cat([states, next_poses(states[:, -1:], actions[:, n : n + 1])], 1)
        return latents[:, patches:].unflatten(1, (horizon, patches))

    def predict(self, latents: Tensor, actions: Tensor, states: Tensor) -> Tensor:
        """[S, T N, E] -> the same shape."""
        predictor, frames = self.model.predictor, actions.shape[1]
        x = predictor.predictor_embed(latents).unflatten(1, (frames, -1))
        told = predictor.action_encoder(actions).unsqueeze(2), predictor.state_encoder(states).unsqueeze(2)
        x = torch.cat([*told, x], 2).flatten(1, 2)
        mask = self.mask[: x.shape[1], : x.shape[1]].to(x.device)
        for block in predictor.predictor_blocks:
            x = x + self.attend(block.attn, block.norm1(x), frames, mask)
            x = x + block.mlp(block.norm2(x))
        x = x.unflatten(1, (frames, self.tokens))[:, :, 2:].flatten(1, 2)
        return predictor.predictor_proj(predictor.predictor_norm(x))

    def attend(self, attention: Any, x: Tensor, frames: int, mask: Tensor) -> Tensor:
        x = x.unflatten(1, (frames, self.tokens))
        parts = [x[:, :, i] for i in range(2)] + [x[:, :, 2:].flatten(1, 2)]
        groups = [self.heads(attention, part, i, frames) for i, part in enumerate(parts)]
        q, k, v = (self.merged([group[i] for group in groups], frames) for i in range(3))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return attention.proj(out.transpose(1, 2).flatten(2))

    def heads(self, attention: Any, x: Tensor, kind: int, frames: int) -> tuple[Tensor, ...]:
        """Turned queries and keys, and values, [S, H, n, D] of one kind of tokens: 0 action, 1 state, 2 patches."""
        q, k, v = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
        frame = torch.arange(frames, device=x.device)
        if kind < 2:  # turned by its frame alone
            return turned(q, [frame]), turned(k, [frame]), v
        height, width = self.model.grid
        id = torch.arange(frames * height * width, device=x.device)
        places = [id // (height * width), id // width % height, id % width]
        return turned(q, places), turned(k, places), v

    def merged(self, groups: list[Tensor], frames: int) -> Tensor:
        """Kinds of tokens put back into their frames."""
        return torch.cat([group.unflatten(2, (frames, -1)) for group in groups], 3).flatten(2, 3)


def turned(x: Tensor, places: list[Tensor]) -> Tensor:
    """x [S, H, n, D] by its place on each axis [n], an axis at a time; channels that are left stay."""
    parts, width = [], x.shape[-1] // 3 // 2 * 2
    for axis, place in enumerate(places):
        part = x[..., axis * width : (axis + 1) * width]
        frequencies = 1.0 / 10000 ** (torch.arange(width // 2, dtype=x.dtype, device=x.device) / (width / 2))
        angles = torch.einsum("n,j->nj", place.to(x.dtype), frequencies)
        sin, cos = (wave.repeat(1, 1, 1, 2) for wave in (angles.sin(), angles.cos()))
        even, odd = part.unflatten(-1, (-1, 2)).unbind(-1)
        parts.append(part * cos + torch.stack((-odd, even), -1).flatten(-2) * sin)
    return torch.cat([*parts, x[..., len(places) * width :]], -1)


def expanded(actions: Tensor) -> Tensor:
    """(x, y, z, gripper) to a pose's seven numbers, rotations 0."""
    return torch.cat([actions[..., :3], torch.zeros_like(actions[..., :3]), actions[..., 3:]], -1)


def next_poses(poses: Tensor, actions: Tensor) -> Tensor:
    """[S, 1, 7], a sample at a time on the host."""
    from scipy.spatial.transform import Rotation

    found = []
    for pose, action in zip(poses[:, 0].cpu().numpy(), actions[:, 0].cpu().numpy(), strict=True):
        turn, orientation = (Rotation.from_euler("xyz", x[3:6]).as_matrix() for x in (action, pose))
        angles = Rotation.from_matrix(turn @ orientation).as_euler("xyz")
        grip = (pose[6:] + action[6:]).clip(0, 1)
        found.append(torch.cat([torch.as_tensor(x) for x in (pose[:3] + action[:3], angles, grip)]))
    return torch.stack(found).to(poses)[:, None]
