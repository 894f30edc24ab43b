"""Run workers as Ray actors: on a Ray of this machine alone, which ends with this process, or on a cluster.

Ray promises to run a job at most once or at least once. Here a job runs at least once, and that it ran twice does no
harm: a picture's file is renamed into place under the digest of its inputs, and its row is written by the driver alone.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import ray as untyped
from ray.exceptions import RayActorError, RayError, RayTaskError

from qrlora.errors import ModelError, QrloraError
from qrlora.operations.catalog.engine import AHEAD, Lost
from qrlora.operations.catalog.plan import Settings

ray: Any = untyped
PATIENCE = 60.0
"""Seconds without a single worker after which the catalog gives up."""
MOST_STARTS = 3
"""Failed starts in a row after which it gives up."""
OBJECT_STORE_BYTES = 80 * 2**20
"""Jobs and outcomes are texts; pictures go through the file system."""
PASSED_ON = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY", "QRLORA_CACHE")
"""Environment variables that workers get. Where the keys are is none of them: the driver alone signs."""
QUIET: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False, "configure_logging": True}
OFFLINE = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


class Actor:
    """A worker in a process of its own."""

    def __init__(self, settings: Settings, environment: dict[str, str]) -> None:
        for name, value in environment.items():
            os.environ.setdefault(name, value)  # before torch is loaded, which reads them once
        from qrlora.operations.catalog.worker import Worker

        node = ray.get_runtime_context().get_node_id()[:8]
        self.worker = Worker(settings, f"{node}/{os.getpid()}")

    def ready(self) -> str:
        return self.worker.name

    def train(self, job: Any) -> Any:
        return self.worker.train(job)

    def render(self, job: Any) -> Any:
        return self.worker.render(job)


@dataclass
class _Slot:
    """One actor, the references of its jobs in their order, and whether it has started."""

    handle: Any
    starting: Any
    jobs: deque[tuple[Any, Any]] = field(default_factory=deque)
    started: bool = False


class Actors:
    """So many workers on Ray.

    Raises:
        QrloraError: no such cluster, or no worker can be started.
    """

    def __init__(self, settings: Settings, workers: int | None = None, address: str = "local") -> None:
        os.environ.update({**OFFLINE, **os.environ})
        with _own_signals():
            _start_here(workers, settings.threads) if address == "local" else _join(address)
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        workers = workers or int(ray.cluster_resources().get("GPU", 0)) or len(nodes)
        cores = int(min(node.get("CPU", 0) for node in nodes))
        threads = settings.threads or max(1, cores // -(-workers // len(nodes)))
        self.settings = replace(settings, threads=threads)
        resources = {"num_cpus": threads, "num_gpus": int("GPU" in ray.cluster_resources())}
        self.kind: Any = ray.remote(max_restarts=0, max_task_retries=0, **resources)(Actor)
        self.environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        self.slots = [self._start() for _ in range(workers)]
        self.failed_starts, self.alone_since = 0, time.monotonic()

    def _start(self) -> _Slot:
        handle = self.kind.remote(self.settings, self.environment)
        return _Slot(handle, handle.ready.remote())

    @property
    def room(self) -> int:
        return sum(AHEAD - len(slot.jobs) for slot in self.slots if slot.started)

    @property
    def busy(self) -> int:
        return sum(len(slot.jobs) for slot in self.slots)

    def submit(self, method: str, job: Any) -> None:
        slot = min((slot for slot in self.slots if slot.started), key=lambda slot: len(slot.jobs))
        slot.jobs.append((getattr(slot.handle, method).remote(job), job))

    def wait(self) -> list[tuple[Any, Any]]:
        waiting = [slot.jobs[0][0] if slot.jobs else slot.starting for slot in self.slots if not self._idle(slot)]
        ready, _ = ray.wait(waiting, num_returns=1, timeout=5)
        finished: list[tuple[Any, Any]] = []
        for slot in list(self.slots):
            if not slot.started and slot.starting in ready:
                self._started(slot)
            elif slot.jobs and slot.jobs[0][0] in ready:
                finished += self._done(slot)
        self._check_alive()
        return finished

    @staticmethod
    def _idle(slot: _Slot) -> bool:
        return slot.started and not slot.jobs

    def _started(self, slot: _Slot) -> None:
        try:
            ray.get(slot.starting)
            slot.started, self.failed_starts = True, 0
        except RayError as error:
            self.failed_starts += 1
            if self.failed_starts >= MOST_STARTS:
                cause = getattr(error, "cause", None) or error
                raise ModelError(
                    "no worker starts",
                    got=str(cause).strip().splitlines()[-1],
                    remedy="try with --workers 0, which says more",
                ) from error
            self._replace(slot)

    def _done(self, slot: _Slot) -> list[tuple[Any, Any]]:
        """Return the first job of a worker with its result; all of its jobs, as lost, if it died."""
        reference, job = slot.jobs[0]
        try:
            result = ray.get(reference)
        except RayActorError as error:
            reason = f"its worker died: {str(error).strip().splitlines()[0]}"
            lost = [(job, Lost(reason, begun=place == 0)) for place, (_, job) in enumerate(slot.jobs)]
            self._replace(slot)
            return lost
        except RayTaskError as error:  # what stops the whole catalog: without the trace of another process
            raise (error.cause if isinstance(error.cause, QrloraError) else error) from None
        slot.jobs.popleft()
        return [(job, result)]

    def _replace(self, slot: _Slot) -> None:
        """Start another worker in its place, which waits until some machine has room for it."""
        ray.kill(slot.handle)
        self.slots[self.slots.index(slot)] = self._start()

    def _check_alive(self) -> None:
        if any(slot.started for slot in self.slots):
            self.alone_since = time.monotonic()
        elif time.monotonic() - self.alone_since > PATIENCE and not self._may_start():
            raise QrloraError(
                "no machine of the cluster has room for a worker",
                expected=f"{self.settings.threads} free cores",
                got=ray.available_resources(),
                remedy="start nodes (ray start --address HOST:PORT) and run the same command again",
            )

    def _may_start(self) -> bool:
        return any(
            node["Alive"] and node["Resources"].get("CPU", 0) >= (self.settings.threads or 1) for node in ray.nodes()
        )

    def close(self) -> None:
        """End the workers; of a cluster, nothing else."""
        for slot in self.slots:
            ray.kill(slot.handle)
        ray.shutdown()


def _start_here(workers: int | None, threads: int | None) -> None:
    """Start a Ray of this machine alone, which ends with this process."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    options: dict[str, Any] = {"num_cpus": max(cores, (workers or 1) * (threads or 1))}
    options["object_store_memory"] = OBJECT_STORE_BYTES
    # Ray's workers are nice by default: beside anything else on the machine they would stand still.
    system = {"enable_metrics_collection": False, "prestart_worker_first_driver": False, "worker_niceness": 0}
    place = {"_node_ip_address": "127.0.0.1", "include_dashboard": False}  # or Ray asks a name server who we are
    ray.init("local", _system_config=system, **place, **options, **QUIET)


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Restore our handler of SIGTERM after Ray has replaced it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _join(address: str) -> None:
    try:
        ray.init(address, **QUIET)
    except (ConnectionError, RuntimeError, ValueError) as error:
        remedy = "start one: ray start --head --port 6379"
        raise QrloraError(f"no Ray cluster to join at {address}", got=error, remedy=remedy) from error
