"""What processes are asked to do: a job for one process, and a task of jobs that are measured together."""

from __future__ import annotations

from dataclasses import dataclass

CORRECTNESS, SPEED, TRAINING, KERNELS, ESTIMATES = PARTS = ("correctness", "speed", "training", "kernels", "estimates")


@dataclass(frozen=True)
class Job:
    """The work of one process.

    Attributes:
        part: One of `PARTS`.
        subject: Name of a model in `SUBJECTS`.
        what: The check, or the variant of the model.
        mode: "eager", "compiled", "graphs" (with CUDA graphs) or "autotune".
        batch: Images or clips.
        tiny: Whether it is for a dry run.
    """

    part: str
    subject: str
    what: str
    mode: str = "eager"
    batch: int = 4
    tiny: bool = False

    @property
    def device(self) -> str:
        """Where it runs."""
        return "cpu" if self.tiny else "cuda"


@dataclass(frozen=True)
class Task:
    """Jobs whose results belong together.

    Attributes:
        name: Unique; by it a later run knows what is done.
        jobs: One that checks, or several that are timed in turns.
        limit: Seconds for each of its processes.
    """

    name: str
    jobs: tuple[Job, ...]
    limit: float

    @property
    def part(self) -> str:
        """Its part."""
        return self.jobs[0].part

    @property
    def timed(self) -> bool:
        """Whether its jobs are variants that are timed in turns."""
        return self.part != CORRECTNESS
