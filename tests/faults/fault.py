"""What a seeded fault is, and putting it into a tree."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Fault:
    """A slip in one place. old occurs once in the file; kind: of which sort of slip it is."""

    op: str
    backend: str
    file: str  # under csrc/ or jepa_kernels/ops/<op>/
    kind: str
    what: str
    old: str
    new: str

    @property
    def path(self) -> Path:
        """From the root of a tree."""
        return Path("csrc" if self.backend == "cpu" else f"jepa_kernels/ops/{self.op}") / self.file

    @property
    def key(self) -> tuple[str, str, str]:
        """Which one it is, in results."""
        return self.op, self.backend, self.what

    @property
    def text(self) -> str:
        """A hash of what is changed: results of another text are of another fault."""
        return hashlib.sha256(f"{self.path}\0{self.old}\0{self.new}".encode()).hexdigest()[:16]

    def applied(self, source: str) -> str:
        """The source with the fault; ValueError where `old` is not there exactly once."""
        if source.count(self.old) != 1:
            raise ValueError(
                f"faults: {self.path} must hold {self.old!r} once, got {source.count(self.old)} of {self.what!r}; "
                "write the fault anew for the source as it is"
            )
        return source.replace(self.old, self.new)
