"""What the closed loop looked like: a video of every episode, and curves of energy and distance."""

from __future__ import annotations

import io
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np

from jepa_kernels import report
from jepa_kernels.data import extra
from jepa_kernels.pusht.goals import Task, distance
from jepa_kernels.pusht.loop import Trace
from jepa_kernels.pusht.policies import POLICIES
from jepa_kernels.pusht.simulator import Simulator

SIDE, GAP, LINE = 224, 8, 24  # pixels: of a picture, between pictures, of a line of text
PANEL = SIDE + 2 * GAP, SIDE + 2 * LINE + 2 * GAP  # width and height with text; even, as the codec wants them
FULL_BAR = 300.0  # pixels of distance that fill a bar
RATE, HELD = 6, 6  # actions a second; frames that an episode's last picture stays
COLOURS = {"random": (130, 130, 130), "greedy": (214, 137, 16), "cem": (31, 97, 214), "simulator": (30, 142, 62)}
DARK = (40, 40, 40)


def video(episodes: list[tuple[Task, dict[str, Trace]]]) -> bytes:
    """An mp4: for each episode the goal, and beside it what each policy does; its block's goal is drawn in green."""
    av, simulator, buffer = extra("av", "plan"), Simulator(SIDE), io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("h264", rate=Fraction(RATE))
        stream.pix_fmt = "yuv420p"
        stream.width, stream.height = PANEL[0] * (1 + len(episodes[0][1])), PANEL[1]
        for number, (task, traces) in enumerate(episodes, 1):
            for picture in _pictures(simulator, f"goal {number} of {len(episodes)}", task, traces):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def _pictures(simulator: Simulator, title: str, task: Task, traces: dict[str, Trace]) -> Iterator[np.ndarray]:
    """One of each moment, uint8 [H, W, 3], the last one HELD times."""
    simulator.set(task.goal)
    goal = _panel(simulator.frame(), title, None, DARK)
    moments = len(next(iter(traces.values())).states)
    for moment in [*range(moments), *[moments - 1] * HELD]:
        panels = [goal]
        for name, trace in traces.items():
            simulator.set(trace.states[moment])
            left = float(distance(trace.states[moment], task.goal).total)
            panels.append(_panel(simulator.frame(ghost=task.goal), POLICIES[name], left, COLOURS[name]))
        yield np.concatenate(panels, 1)


def _panel(frame: np.ndarray, title: str, left: float | None, colour: tuple[int, int, int]) -> np.ndarray:
    """A picture under its title, with the distance that is left as a bar and a number."""
    pygame = extra("pygame", "plan")
    pygame.font.init()
    font = pygame.font.Font(None, LINE - 4)
    canvas = pygame.Surface(PANEL)
    canvas.fill((255, 255, 255))
    canvas.blit(font.render(title, True, colour), (GAP, GAP))
    canvas.blit(pygame.surfarray.make_surface(frame.transpose(2, 1, 0)), (GAP, GAP + LINE))
    if left is not None:
        below = SIDE + LINE + 2 * GAP
        canvas.fill(colour, (GAP, below, round(SIDE * min(1.0, left / FULL_BAR)), 4))
        canvas.blit(font.render(f"{left:.0f} px", True, colour), (GAP, below + 6))
    return np.ascontiguousarray(pygame.surfarray.array3d(canvas).transpose(1, 0, 2))


def curves(episodes: list[dict[str, Any]]) -> bytes:
    """A PNG: distance and energy over actions, medians with quartiles, and where every episode ended."""
    extra("matplotlib", "plan").use("Agg")
    pyplot = extra("matplotlib.pyplot", "plan")
    figure, (far, latent, ends) = pyplot.subplots(1, 3, figsize=(14, 4), layout="constrained")
    names = list(episodes[0]["policies"])
    for place, name in enumerate(names):
        colour = tuple(part / 255 for part in COLOURS[name])
        for axis, key in ((far, "total"), (latent, "energy")):
            low, middle, high = np.quantile([e["policies"][name][key] for e in episodes], [0.25, 0.5, 0.75], axis=0)
            axis.plot(middle, color=colour, label=POLICIES[name])
            axis.fill_between(range(len(middle)), low, high, color=colour, alpha=0.15, linewidth=0)
        last = sorted(e["policies"][name]["total"][-1] for e in episodes)
        ends.plot(np.linspace(place - 0.3, place + 0.3, len(last)), last, "o", color=colour, markersize=4)
        ends.hlines(np.median(last), place - 0.35, place + 0.35, color=colour)
    far.set(title="distance to the goal, pixels", xlabel="actions")
    latent.set(title="energy: squared distance of latents", xlabel="actions")
    ends.set(title="distance after the last action", xticks=range(len(names)), xticklabels=names)
    for axis in (far, latent, ends):
        axis.set_ylim(bottom=0)
    far.legend(fontsize="small")
    return report.png(figure)
