"""What runs in the processes of a Ray cluster, and how a fault gets home from there."""

from __future__ import annotations

import logging
import os
import platform
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from gradsift.errors import GradsiftError, RunError
from gradsift.executors.environment import set_environment
from gradsift.progress import VisibleFormatter

T = TypeVar("T")
DEATHS = 4
"""Of the workers at one piece of work: machines are lost now and then, but not that often."""


class Begun:
    """How often each task was begun, counted in one process for all actors of a pass.

    Ray begins a task again without an end, or counts each try to reach a machine that is gone.
    """

    def __init__(self) -> None:
        self._times: Counter[int] = Counter()

    def count(self, task: int) -> int:
        """Return how often this task was begun, this time included."""
        self._times[task] += 1
        return self._times[task]


class Actor:
    """One worker of the pool pass, kept in a process of its own.

    It is opened in the first task, so that a death on the way there is counted too.
    """

    def __init__(self, folder: str, begun: Any, reference: Any) -> None:
        self._folder, self._begun, self._reference = folder, begun, reference
        self._work: Any = None
        self._tasks: Any = None
        self._name = f"process {os.getpid()} on {platform.node()}"

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Do the one task whose number comes, and tell what went wrong with it."""
        import ray

        [number] = batch["task"].tolist()
        times: Any = ray.get(self._begun.count.remote(number))

        def do() -> None:
            if times > DEATHS:
                raise too_many_died()
            if self._work is None:
                open_worker, self._tasks = ray.get(self._reference)
                self._work = open_worker()
            for _ in self._work([self._tasks[number]]):
                pass

        failure = run_and_catch(self._folder, do)["failure"]
        return {"task": [number], "failure": [failure], "worker": [self._name]}


def too_many_died() -> RunError:
    """Return what ends a run whose workers always die."""
    return RunError(
        f"workers of the Ray cluster died {DEATHS} times at the same work; look at what they and "
        "Ray wrote last, above and in /tmp/ray/session_latest/logs of their machine, and in its "
        "dmesg whether memory ran out: with fewer engine.workers each has more. Without --engine "
        "ray the same work runs in one process"
    )


def run_and_catch(folder: str, work: Callable[[], T]) -> dict[str, Any]:
    """Return what some work gives, or the fault that a user can mend: Ray would do it again.

    `folder` is what relative paths begin from.
    """
    _log_to_terminal()
    if Path(folder).is_dir():
        os.chdir(folder)
    try:
        return {"value": work(), "failure": None}
    except GradsiftError as error:
        return {"value": None, "failure": f"{type(error).__name__}: {error}"}


def raise_failure(outcome: dict[str, Any]) -> None:
    """Raise here what was raised there."""
    import gradsift.errors

    if outcome.get("failure"):
        name, _, message = outcome["failure"].partition(": ")
        raise getattr(gradsift.errors, name)(message)


class Failure:
    """The first fault of a training that a user can mend, kept through Ray Train's retries."""

    def __init__(self) -> None:
        self._failure: str | None = None

    def keep(self, failure: str) -> None:
        """Keep it, unless there is one already."""
        self._failure = self._failure or failure

    def get(self) -> str | None:
        """Return it, if there is one."""
        return self._failure


class _FailureError(Exception):
    """Ends all processes of a training: those that found nothing wrong would wait for the one."""


def train_loop(config: dict[str, Any]) -> None:
    """Do one process's part of a training; what goes wrong is kept in `failure`.

    Raises:
        _FailureError: If something did, and there are other processes. Ray Train then tries again,
            which ends at once.
    """
    import ray

    kept: Any = config["failure"]
    if ray.get(kept.get.remote()):
        return
    failure = run_and_catch(config["folder"], config["work"])["failure"]
    if failure:
        ray.get(kept.keep.remote(failure))
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise _FailureError(failure)


def _log_to_terminal() -> None:
    """Write this process's log to its stderr, which Ray brings to the terminal of the driver."""
    ours = logging.getLogger("gradsift")
    if not ours.handlers:
        ours.setLevel(logging.INFO)
        ours.addHandler(logging.StreamHandler(sys.stderr))
        ours.handlers[0].setFormatter(VisibleFormatter("%(message)s"))
        ours.propagate = False
        set_environment()
