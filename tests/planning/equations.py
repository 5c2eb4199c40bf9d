"""The published planners, written plainly from their equations: loops, one option after another."""

import torch


def cem_of_vjepa2_ac(
    step,
    goal,
    noise,
    *,
    horizon,
    samples,
    iterations,
    elites,
    maxnorm,
    momentum_mean,
    momentum_std,
    gripper_mean=0.15,
    gripper_std=0.15,
    axis=None,
    close_gripper=None,
):
    """noise(samples) -> [samples, 4] for each step; step(frames, actions) -> the next frame of every sample."""
    z = goal.new_zeros
    mean = z(horizon, 4)
    std = torch.cat([z(horizon, 3) + maxnorm, z(horizon, 1) + 1], 1)
    for _ in range(iterations):
        actions, frames = [], None
        for h in range(horizon):
            a = noise(samples) * std[h] + mean[h]
            a[:, :3] = a[:, :3].clip(-maxnorm, maxnorm)
            a[:, 3] = a[:, 3].clip(-0.75, 0.75)
            for dim, value in (axis or {}).items():
                a[:, dim] = value
            if close_gripper is not None and h >= close_gripper:
                a[:, 3] = 1.0
            actions.append(torch.cat([a[:, :3], z(samples, 3), a[:, 3:]], 1))
            frames = step(torch.stack(actions, 1))
        energies = (frames - goal).abs().mean((1, 2))
        best = torch.stack(actions, 1)[energies.topk(elites, largest=False).indices]
        mu, sigma = best.mean(0), best.std(0)
        mean = torch.cat(
            [
                mu[:, :3] * (1 - momentum_mean) + mean[:, :3] * momentum_mean,
                mu[:, 6:] * (1 - gripper_mean) + mean[:, 3:] * gripper_mean,
            ],
            1,
        )
        std = torch.cat(
            [
                sigma[:, :3] * (1 - momentum_std) + std[:, :3] * momentum_std,
                sigma[:, 6:] * (1 - gripper_std) + std[:, 3:] * gripper_std,
            ],
            1,
        )
    grip = mean[:, 3:].clone()
    grip[grip.abs() < 0.25] = 0
    return torch.cat([mean[:, :3], z(horizon, 3), grip], 1), mean, std


def cem_of_jepa_wms(unroll, goal, noise, *, samples, iterations, elites, var_scale, groups=()):
    """noise() -> [horizon, samples, A] of each iteration; unroll([samples, horizon, A]) -> frames.

    groups: (dims, max). Samples first: with steps first, as published, torch adds elites in another order: an ulp off.
    """
    mean, std = None, None
    energies_of = []
    for _ in range(iterations):
        z = noise().transpose(0, 1)
        if mean is None:
            mean, std = torch.zeros_like(z[0]), torch.full_like(z[0], var_scale)
        actions = mean + std * z
        actions[0] = mean
        for dims, most in groups:
            actions[:, :, dims] = actions[:, :, dims].clip(-most, most)
        energies = (unroll(actions)[:, -1] - goal).square().mean((1, 2))
        chosen = actions[torch.topk(-energies, elites).indices]
        mean, std = chosen.mean(0), chosen.std(0)
        energies_of.append(energies)
    return mean, std, torch.stack(energies_of)


def cem_of_eb_jepa(unroll, goal, noise, *, samples, iterations, elites, longest):
    """noise() -> [horizon, samples, A] of each iteration; every action is at most `longest` long; sums over frames."""
    mean, std, energies_of = None, None, []
    for _ in range(iterations):
        z = noise().transpose(0, 1)
        if mean is None:
            mean, std = torch.zeros_like(z[0]), torch.ones_like(z[0])
        actions = mean + std * z
        for sample in actions:
            for action in sample:
                if action.norm() > longest:
                    action *= longest / action.norm()
        energies = sum((frame - goal).square().mean((1, 2)) for frame in unroll(actions).unbind(1))
        chosen = actions[torch.topk(-energies, elites).indices]
        mean, std = chosen.mean(0), chosen.std(0)
        energies_of.append(energies)
    return mean, std, torch.stack(energies_of)


def mppi(unroll, goal, noise, *, temperature, elites, std_range):
    """noise [iterations, S, H, A]; all sums one sample after another."""
    _, _, horizon, action_dim = noise.shape
    mean, std = goal.new_zeros(horizon, action_dim), goal.new_ones(horizon, action_dim)
    for z in noise:
        actions = mean + std * z
        energies = (unroll(actions)[:, -1] - goal).abs().mean((1, 2))
        order = energies.argsort()[:elites]
        weights = [torch.exp(-(energies[i] - energies[order[0]]) / temperature) for i in order]
        total = sum(weights)
        mean = sum(w * actions[i] for w, i in zip(weights, order, strict=True)) / total
        var = sum(w * (actions[i] - mean) ** 2 for w, i in zip(weights, order, strict=True)) / total
        std = var.sqrt().clip(*std_range)
    return mean, std
