"""PushT, a disc that pushes a T-shaped block: the simulator of gym-pusht, episodes to learn from, the closed loop."""

from jepa_kernels.pusht.episodes import Episodes, Windows, load
from jepa_kernels.pusht.probes import probes
from jepa_kernels.pusht.simulator import ACTION_DIM, Simulator

__all__ = ["ACTION_DIM", "Episodes", "Simulator", "Windows", "load", "probes"]
