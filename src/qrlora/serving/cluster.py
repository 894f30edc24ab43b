"""The server on Ray Serve: one front, which queues and batches, and engines on one machine or many.

Every engine serves every composition, because all adapters stand on one basis: nothing is loaded or swapped for a
request, so Serve's model multiplexing has nothing to do here.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve.config import ProxyLocation
from ray.serve.schema import LoggingConfig

from qrlora.errors import ModelError
from qrlora.quiet import hush
from qrlora.serving.app import Limits, Service, create_app
from qrlora.serving.protocol import Event, Facts, Picture, Settings

NAME = "qrlora"
OBJECT_STORE_BYTES = 256 * 2**20  # pictures on their way from an engine to the front
QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)


class EngineReplica:
    """An engine in a process of its own."""

    def __init__(self, *arguments: Any):
        hush()
        from qrlora.serving.engine import Engine  # here, because the front does without torch

        self.engine = Engine(*arguments)

    async def run(self, settings: Settings, pictures: Sequence[Picture], progress: bool) -> AsyncIterator[Event]:
        async for event in self.engine.run(settings, pictures, progress):
            yield event

    async def facts(self) -> Facts:
        return await self.engine.facts()


class RemoteEngines:
    """All engine replicas, of which Serve picks a free one for each batch."""

    def __init__(self, handle: Any):
        self.handle = handle

    async def run(self, settings: Settings, pictures: Sequence[Picture], progress: bool) -> AsyncIterator[Event]:
        events = self.handle.options(stream=True).run.remote(settings, pictures, progress)
        try:
            async for event in events:
                yield event
        finally:
            events.cancel()  # nothing, if it has ended

    async def facts(self) -> Facts:
        return await self.handle.facts.remote()


@serve.ingress()
class Front:
    """The HTTP application, its queue and its batches: one process, which the pictures' makers outnumber."""

    def __init__(self, engines: Any, limits: Limits):
        self.service = Service(RemoteEngines(engines), limits)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self.service)

    async def facts(self) -> Facts:
        return await self.service.facts()

    async def drain(self) -> None:
        await self.service.drain()


@dataclass(frozen=True)
class Place:
    """Where the server runs.

    Attributes:
        host, port: that it listens on; on a cluster, every node that runs a part of it does.
        address: of the Ray cluster to run on; "local" starts one of this machine alone, which ends with the server.
        engines: copies of the base model.
        threads: processor cores of each; those of this machine in equal shares if None.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    address: str = "local"
    engines: int = 1
    threads: int | None = None


def start(model: str, folder: Path, dtype: str, place: Place, limits: Limits) -> Any:
    """Start all of it, and wait until it serves; returns a handle of `Front`.

    Raises:
        ModelError: the engines did not start, and why.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = place.threads or max(1, cores // place.engines)
    common: dict[str, Any] = {"logging_level": logging.WARNING, "namespace": NAME}
    alone = place.address == "local"
    if not alone:
        ray.init(place.address, **common)
    else:
        options: dict[str, Any] = {"num_cpus": threads * place.engines, "object_store_memory": OBJECT_STORE_BYTES}
        system = {"enable_metrics_collection": False, "prestart_worker_first_driver": False}
        ray.init("local", include_dashboard=False, _system_config=system, **options, **common)
    where = ProxyLocation.HeadOnly if alone else ProxyLocation.EveryNode
    http = {"host": place.host, "port": place.port}
    serve.start(proxy_location=where, http_options=http, logging_config=QUIET)
    resources = {"num_cpus": threads, "num_gpus": int("GPU" in ray.cluster_resources())}
    ending: dict[str, Any] = {"graceful_shutdown_wait_loop_s": 0.1, "graceful_shutdown_timeout_s": 5}
    # One batch at a time: so Serve gives the next one to an engine that is free.
    engine: Any = serve.deployment(
        EngineReplica,
        num_replicas=place.engines,
        ray_actor_options=resources,
        max_ongoing_requests=1,
        max_constructor_retry_count=1,
        **ending,
    )
    # No limit here: the front's own queue refuses what is too much, in words.
    front: Any = serve.deployment(Front, ray_actor_options={"num_cpus": 0}, max_ongoing_requests=100_000, **ending)
    engines = engine.bind(model, str(folder.resolve()), dtype, threads)
    try:
        return serve.run(front.bind(engines, limits), name=NAME, logging_config=QUIET)
    except RuntimeError as error:
        raise _not_started(error) from error


def _not_started(error: RuntimeError) -> ModelError:
    """What the engine said, of all that Serve says about it."""
    deployments = serve.status().applications[NAME].deployments.values()
    said = "\n".join(deployment.message for deployment in deployments)
    ours = re.findall(r"qrlora\.errors\.\w+: (.+)", said, re.DOTALL)
    return ModelError("the engines did not start", got=(ours or [said or error])[-1])


def stop(front: Any, limits: Limits) -> None:
    """Refuse new requests, let those begun come to an end, and take the server down; of a cluster, only the server."""
    front.drain.remote().result(timeout_s=limits.drain_seconds + 10)
    serve.delete(NAME)


def leave() -> None:
    """Disconnect from Ray; a Ray of this machine alone ends."""
    ray.shutdown()
