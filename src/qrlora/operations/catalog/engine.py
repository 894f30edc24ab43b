"""Submit jobs to workers, never more at once than they have room for, also when jobs or workers fail.

A pool is where the workers are: `Here` in this process, `cluster.Actors` on Ray.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from qrlora.operations.catalog.plan import Settings

AHEAD = 2
"""Jobs given to a worker: the one it does, and the one it does next without waiting for the driver."""


@dataclass(frozen=True)
class Lost:
    """The result of a job whose worker died.

    Attributes:
        begun: False if the job waited behind another, so that it is not what killed it.
    """

    reason: str
    begun: bool


@runtime_checkable
class Pool(Protocol):
    """A set of workers, each of which does one thing at a time."""

    @property
    def room(self) -> int:
        """Number of jobs that can be submitted now."""

    @property
    def busy(self) -> int:
        """Number of submitted jobs that are not done."""

    def submit(self, method: str, job: Any) -> None:
        """Submit a job to this method of a worker. Requires `room`."""

    def wait(self) -> list[tuple[Any, Any]]:
        """Wait for jobs or workers; return the finished jobs, each with its result or `Lost`. Raises what a worker
        raised."""

    def close(self) -> None: ...


class Here:
    """The one worker in this process, which is made when it is first needed."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.worker, self.given = settings, None, deque[tuple[str, Any]]()

    @property
    def room(self) -> int:
        return 1 - len(self.given)

    @property
    def busy(self) -> int:
        return len(self.given)

    def submit(self, method: str, job: Any) -> None:
        self.given.append((method, job))

    def wait(self) -> list[tuple[Any, Any]]:
        if self.worker is None:
            from qrlora.operations.catalog.worker import Worker  # torch, which a catalog that is finished does without

            self.worker = Worker(self.settings)  # type: ignore[assignment]
        method, job = self.given.popleft()
        return [(job, getattr(self.worker, method)(job))]

    def close(self) -> None:
        self.given.clear()


def drain(pool: Pool, method: str, jobs: Iterator[Any], finish: Callable[[Any, Any], Iterable[Any]]) -> None:
    """Run every job on a worker, and pass (job, result) to `finish`, which returns jobs to submit again."""
    again: deque[Any] = deque()
    ahead = _Ahead(jobs)
    while True:
        while pool.room > 0 and (again or ahead.there()):
            pool.submit(method, again.popleft() if again else ahead.take())
        if not (pool.busy or again or ahead.there()):
            return
        for job, result in pool.wait():
            again.extend(finish(job, result))


class _Ahead:
    """An iterator that can tell whether there is more."""

    def __init__(self, jobs: Iterator[Any]) -> None:
        self.jobs, self.kept = jobs, deque[Any]()

    def there(self) -> bool:
        if not self.kept:
            self.kept.extend(job for job in [next(self.jobs, None)] if job is not None)
        return bool(self.kept)

    def take(self) -> Any:
        return self.kept.popleft()
