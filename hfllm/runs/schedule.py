"""The job of this process: its stages in order, their approximate times, and the one running now.

An announced stage enters the job; a running chain plans the stages before it. Nothing here changes the output of a
stage: it is only information for the user.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


@dataclass(frozen=True)
class Planned:
    """A stage of the job.

    Args:
        name: the stage's.
        output_dir: its folder, to distinguish it from others of its name.
        minutes: about how long it takes, or `None` if unknown.
        parsed: its flags.
    """

    name: str
    output_dir: str
    minutes: float | None = None
    parsed: "Sequence[DataclassInstance]" = field(default=(), repr=False)


@dataclass(frozen=True)
class Job:
    """The stages of a job in order, the requested one last, and the index of the running one."""

    stages: tuple[Planned, ...]
    place: int = 0

    @property
    def minutes_after(self) -> float | None:
        """About how long the stages after this one take together; `None` if unknown."""
        later = [stage.minutes for stage in self.stages[self.place + 1 :]]
        return None if None in later else sum(later)


_job: Job | None = None


def current_job() -> Job | None:
    """Return the job of this process, `None` before any stage has been announced."""
    return _job


def runs_before_another() -> bool:
    """Return whether the running stage is not the requested one."""
    return _job is not None and _job.place < len(_job.stages) - 1


def enter(stage: Planned) -> None:
    """Note the beginning of a stage: one planned by the job, or else the only one of a new job."""
    global _job
    planned = [each.output_dir for each in _job.stages[:-1]] if _job else []
    if stage.output_dir in planned:
        _job = replace(_job, place=planned.index(stage.output_dir))
    else:
        _job = Job((stage,))


def plan(name: str, before: Sequence[Planned], minutes: float | None) -> bool:
    """Put stages before the requested stage of the job, if it is `name` and nothing has been planned yet.

    Args:
        minutes: about how long the requested stage of the job takes.

    Returns:
        Whether they were added: a stage of an already planned job plans nothing.
    """
    global _job
    if _job is None or len(_job.stages) > 1 or _job.stages[0].name != name or not before:
        return False
    _job = Job((*before, replace(_job.stages[0], minutes=minutes)))
    return True


def come_back(name: str) -> None:
    """Note the end of the stages before `name`, and its continuation."""
    global _job
    indices = [index for index, stage in enumerate(_job.stages) if stage.name == name] if _job else []
    if indices:
        _job = replace(_job, place=indices[-1])


def described(job: Job) -> str:
    """Return the stages of a job and about how long they take, as a line."""
    minutes = [stage.minutes for stage in job.stages]
    words, about = [], "about "
    for stage in job.stages:
        words.append(stage.name if stage.minutes is None else f"{stage.name} ({about}{stage.minutes:g} min)")
        about = about if stage.minutes is None else ""
    line = f"{len(words)} stages: {', '.join(words)}"
    return line if None in minutes else f"{line}; in all about {sum(minutes):g} min on two cores"
