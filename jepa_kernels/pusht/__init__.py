"""PushT, a disc that pushes a T-shaped block: the simulator of gym-pusht, episodes to learn from, the closed loop."""

from jepa_kernels.pusht.episodes import Episodes, Windows, load
from jepa_kernels.pusht.simulator import Simulator

__all__ = ["Episodes", "Simulator", "Windows", "load"]
