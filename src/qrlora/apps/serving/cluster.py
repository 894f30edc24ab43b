"""Run the server on Ray Serve: one front, which queues and batches, and engines on one machine or many.

Every engine serves every composition, because all adapters stand on one basis: nothing is loaded or swapped for a
request, so Serve's model multiplexing has nothing to do here.
"""

from __future__ import annotations

import logging
import math
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

from qrlora.apps.quiet import hush
from qrlora.apps.serving.app import create_app
from qrlora.apps.serving.protocol import Event, Facts, Limits, Settings
from qrlora.apps.serving.service import Service
from qrlora.errors import ModelError, QrloraError
from qrlora.models.request import Request

NAME = "qrlora"
OBJECT_STORE_BYTES = 256 * 2**20  # pictures on their way from an engine to the front
QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)
DRIVER: dict[str, Any] = {"logging_level": logging.WARNING, "namespace": NAME}


class EngineReplica:
    """An engine in a process of its own."""

    def __init__(self, *arguments: Any):
        hush()
        from qrlora.apps.serving.engine import Engine  # here, because the front does without torch

        self.engine = Engine(*arguments)

    async def run(self, settings: Settings, pictures: Sequence[Request], progress: bool) -> AsyncIterator[Event]:
        async for event in self.engine.run(settings, pictures, progress):
            yield event

    async def facts(self) -> Facts:
        return await self.engine.facts()


class RemoteEngines:
    """All engine replicas; Serve picks a free one for each batch."""

    def __init__(self, handle: Any):
        self.handle = handle

    async def run(self, settings: Settings, pictures: Sequence[Request], progress: bool) -> AsyncIterator[Event]:
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
    """The HTTP application, its queue and its batches, in one process in front of all engines."""

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
    """Address, engines and threads of a server on Ray.

    Attributes:
        host, port: that it listens on; on a cluster, every node that runs a part of it does.
        address: of the Ray cluster to join; "local" starts one of this machine alone, which ends with the server.
        engines: copies of the base model.
        threads: processor cores of each; equal shares of this machine's, or of the cluster's smallest node, if None.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    address: str = "local"
    engines: int = 1
    threads: int | None = None


def start(model: str, folder: Path, dtype: str, place: Place, limits: Limits) -> Any:
    """Start front and engines, and wait until they serve; return a handle of `Front`.

    Raises:
        QrloraError: no such cluster, no room on it, or it serves already, elsewhere or the same.
        ModelError: the engines did not start, and why.
    """
    threads = _start_alone(place) if place.address == "local" else _join(place)
    _listen(place)
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
        failed = _not_started(error)
        _take_down()
        raise failed from error
    except BaseException:  # Ctrl-C: a cluster would go on without us
        _take_down()
        raise


def _start_alone(place: Place) -> int:
    """A Ray of this machine; returns the cores of an engine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = place.threads or max(1, cores // place.engines)
    options: dict[str, Any] = {"num_cpus": threads * place.engines, "object_store_memory": OBJECT_STORE_BYTES}
    system = {"enable_metrics_collection": False, "prestart_worker_first_driver": False}
    ray.init("local", include_dashboard=False, _system_config=system, **options, **DRIVER)
    return threads


def _join(place: Place) -> int:
    """The cluster there; returns the cores of an engine."""
    try:
        ray.init(place.address, **DRIVER)
    except (ConnectionError, RuntimeError, ValueError) as error:
        remedy = "start one: ray start --head --port 6379"
        raise QrloraError(f"no Ray cluster to join at {place.address}", got=error, remedy=remedy) from error
    nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    each = math.ceil(place.engines / len(nodes))
    threads = place.threads or max(1, min(nodes) // each)
    room = sum(cores // threads for cores in nodes)
    if room < place.engines:  # Serve would wait for more nodes without a word
        raise QrloraError(
            "the cluster has no room for so many engines",
            expected=f"{place.engines} times {threads} cores, each on one node",
            got=f"nodes of {', '.join(map(str, nodes))} cores: room for {room}",
            remedy="lower --engines or --threads, or add nodes: ray start --address HOST:PORT",
        )
    return threads


def _listen(place: Place) -> None:
    """Listen on the port on every node that needs it."""
    where = ProxyLocation.HeadOnly if place.address == "local" else ProxyLocation.EveryNode
    # What this process is told of Serve, its controller has to know, wherever it runs.
    told = {name: value for name, value in os.environ.items() if name.startswith("RAY_SERVE_")}
    http = {"host": place.host, "port": place.port}
    controller = {"runtime_env": {"env_vars": told}}
    try:
        serve.start(proxy_location=where, http_options=http, logging_config=QUIET, controller_options=controller)
    except TimeoutError as error:
        remedy = "let other work on its machines end, or set RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S higher"
        raise QrloraError("Ray Serve did not start in time", got=error, remedy=remedy) from error
    # A Serve that was there before keeps its own address, and says so in its log alone.
    connected: Any = serve.context._get_global_client()
    there, running = connected.http_config, list(serve.status().applications)
    if (there.host, there.port) != (place.host, place.port) or NAME in running:
        raise QrloraError(
            "the cluster serves already",
            expected=f"no Ray Serve there, or one on {place.host}, port {place.port}, without an application {NAME!r}",
            got=f"one on {there.host}, port {there.port}, applications: {', '.join(running) or 'none'}",
            remedy="end qrlora there (if it was killed: `serve shutdown`)"
            if NAME in running
            else f"--host {there.host} --port {there.port}",
        )


def _not_started(error: RuntimeError) -> ModelError:
    """Extract the engine's own error from the text of Ray Serve."""
    deployments = serve.status().applications[NAME].deployments.values()
    said = "\n".join(deployment.message for deployment in deployments)
    ours = re.findall(r"qrlora\.errors\.\w+: (.+)", said, re.DOTALL)
    return ModelError("the engines did not start", got=(ours or [said or error])[-1])


def stop(front: Any, limits: Limits) -> None:
    """Refuse new requests, let those begun come to an end, and take the server down; of a cluster, only the server."""
    try:
        front.drain.remote().result(timeout_s=limits.drain_seconds + 10)
    finally:
        _take_down()


def _take_down() -> None:
    serve.delete(NAME)
    if not serve.status().applications:  # else its port stays taken, by nobody, on every node
        serve.shutdown()


def leave() -> None:
    """Disconnect from Ray; a Ray of this machine alone ends."""
    ray.shutdown()
