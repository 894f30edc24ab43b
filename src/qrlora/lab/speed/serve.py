"""The server beside plain diffusers, many clients with a composition each: ``qrlora lab speed serve``.

`qrlora serve`, as it ships, against diffusers' own pipeline with every adapter loaded as a LoRA, which switches
to one composition after the other (`set_adapters`). The baseline is given what serving costs for free: its clients are
threads that share a queue, without HTTP, validation or encoding. Both take turns, round by round, on pico with random
adapters. The bare base model, called with whole batches and no adapters at all, is what remains to be saved. Ratios are
of wall time, and of processor time, which other work on the machine changes less. Then: whether every picture is the
one made alone, what the memory of the server's processes does over many requests, and (``--nodes 2``) whether the
engines of two Ray nodes of this machine share the work.
"""

from __future__ import annotations

import base64
import contextlib
import io
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import httpx2
import numpy as np
import psutil
import torch
import transformers
from PIL import Image

from qrlora import QRLoraConfig, adapter_from_model, load_adapter, load_pipeline, save_adapter
from qrlora.lab.speed.common import report
from qrlora.method.adapter import basis_of, remove_adapters
from qrlora.models.generation import generate, one_batch

ROLES = {"teapot": "subject", "rocket": "subject", "chalk": "style", "neon": "style"}
RANK, SPREAD = 16, 0.02
PROMPTS = ("a photo of a red mug", "a drawing of a blue car", "a photo of a green chair", "a drawing of a yellow hat")
TOLERANCE = 2  # of 255: what other shapes of a batch make of the last bits of float32

Job = tuple[str, int, dict[str, float]]


def main(options: SimpleNamespace) -> None:
    """Measure, print, write."""
    if options.quick:
        options.rounds, options.each, options.steps, options.requests = 1, 1, 8, 100
    with tempfile.TemporaryDirectory() as folder:
        report(options, "cpu", **measure(options, Path(folder)))


def measure(options: SimpleNamespace, folder: Path) -> dict[str, Any]:
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message="Already found a `peft_config`")
    files, loras = make_adapters(folder)
    jobs = make_jobs(options.clients * options.each)
    baseline = baseline_of(loras, options.steps)
    pipe, family = load_pipeline("pico")
    bare = lambda batch: one_batch(pipe, family, [job[:2] for job in batch], options.steps)  # noqa: E731
    baseline(jobs[0])  # warm
    bare(jobs[:1])
    with (
        ray_nodes(options.nodes) as address,
        served(files, options, address) as (url, process),
        httpx2.Client(timeout=600, limits=httpx2.Limits(max_connections=options.clients)) as client,
    ):

        def ours(job: Job, steps: int = options.steps) -> np.ndarray:
            prompt, seed, composition = job
            body = {"prompt": prompt, "seed": seed, "composition": composition, "steps": steps}
            answer = client.post(f"{url}/v1/images/generations", json=body).raise_for_status().json()
            return np.array(Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"])))).astype(int)

        each_round(ours, jobs[: options.clients], options.clients)  # warm
        rounds: dict[str, list[dict[str, Any]]] = {"qrlora": [], "diffusers": [], "bare": []}
        here = psutil.Process()
        for _ in range(options.rounds):
            rounds["qrlora"].append(each_round(ours, jobs, options.clients, [here, *parts(process).values()]))
            with ThreadPoolExecutor(1) as queue:
                asked = lambda job, queue=queue: queue.submit(baseline, job).result()  # noqa: E731
                rounds["diffusers"].append(each_round(asked, jobs, options.clients, [here]))
            rounds["bare"].append(each_round(bare, batches(jobs, options.batch_size), 1, [here]))
        made = {side: rounds[side][-1]["pictures"] for side in ("qrlora", "diffusers")}
        right = compare(made, files, jobs[: options.clients], options.steps)
        memory = watch(lambda job: ours(job, steps=2), options, process)
        work = {name: process.cpu_times().user for name, process in parts(process).items()}
    found = {"rounds": summary(rounds), "right": right, "memory": memory, "work": work}
    show(found, options)
    return found


def make_adapters(folder: Path) -> tuple[Path, Path]:
    """Random ΔR on pico's basis, as adapters and as the LoRAs they equal; the folders of both."""
    files, loras = folder / "adapters", folder / "loras"
    files.mkdir()
    loras.mkdir()
    pipe, family = load_pipeline("pico")
    for seed, (name, role) in enumerate(ROLES.items()):
        config = QRLoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(family.targets), columns=role)
        pipe.transformer.add_adapter(config, adapter_name=name)
        generator = torch.Generator().manual_seed(seed)
        for key, parameter in pipe.transformer.named_parameters():
            if "lora_A" in key:
                torch.nn.init.normal_(parameter.data, std=SPREAD, generator=generator)
        adapter = adapter_from_model(pipe.transformer, name, family=family.name, base_model="pico", role=role)
        remove_adapters(pipe.transformer, [name])
        save_adapter(adapter, files / f"{name}.safetensors")
        basis = basis_of(pipe.transformer, adapter)
        save_adapter(adapter, loras / f"{name}.safetensors", "lora", basis)
    return files, loras


def make_jobs(count: int) -> list[Job]:
    """Prompts and seeds, each with two or three of the adapters at weights that nobody else has."""
    draw = random.Random(0)
    jobs = []
    for seed in range(count):
        names = draw.sample(sorted(ROLES), draw.choice((2, 3)))
        jobs.append((draw.choice(PROMPTS), seed, {name: round(draw.uniform(-0.5, 1.2), 3) for name in names}))
    return jobs


def baseline_of(loras: Path, steps: int) -> Callable[[Job], np.ndarray]:
    """Make one picture by diffusers alone: switch to its composition, call the pipeline."""
    pipe, family = load_pipeline("pico")
    for name in ROLES:
        pipe.load_lora_weights(loras, weight_name=f"{name}.safetensors", adapter_name=name)

    def make(job: Job) -> np.ndarray:
        prompt, seed, composition = job
        pipe.set_adapters(list(composition), list(composition.values()))
        image = pipe(
            prompt=[prompt],
            generator=torch.Generator().manual_seed(seed),
            num_inference_steps=steps,
            guidance_scale=family.sampling(pipe)[1],
            height=family.resolution(pipe),
            width=family.resolution(pipe),
            **family.prompt_options(pipe, [prompt]),
        ).images[0]
        return np.array(image).astype(int)

    return make


@contextlib.contextmanager
def ray_nodes(count: int) -> Iterator[str | None]:
    """The address of a Ray cluster of that many nodes on this machine; None, and none, for one."""
    if count == 1:
        yield None
        return
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        for _ in range(count - 1):
            cluster.add_node(num_cpus=1)
        yield cluster.address
    finally:
        cluster.shutdown()


@contextlib.contextmanager
def served(files: Path, options: SimpleNamespace, address: str | None) -> Iterator[tuple[str, psutil.Process]]:
    """Start `qrlora serve` in processes of its own; yield its URL and its root process."""
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        port = trial.getsockname()[1]
    command = [sys.executable, "-m", "qrlora", "serve", "--adapters", str(files), "--port", str(port)]
    command += ["--batch-size", str(options.batch_size), "--engines", str(options.nodes)]
    command += ["--address", address, "--threads", "1"] if address else []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while not process.stdout.readline().startswith("ready at"):
            if process.poll() is not None:
                raise SystemExit("the server did not start")
        try:
            yield f"http://127.0.0.1:{port}", psutil.Process() if address else psutil.Process(process.pid)
        finally:
            process.terminate()


def batches(jobs: Sequence[Job], size: int) -> list[Sequence[Job]]:
    return [jobs[start : start + size] for start in range(0, len(jobs), size)]


def each_round(
    ask: Callable[[Any], Any], jobs: Sequence[Any], clients: int, processes: Sequence[psutil.Process] = ()
) -> dict[str, Any]:
    """Do every job once, from that many clients at the same time; counts the processor seconds of these processes."""

    def timed(job: Any) -> tuple[float, Any]:
        started = time.perf_counter()
        picture = ask(job)
        return time.perf_counter() - started, picture

    with ThreadPoolExecutor(clients) as pool:
        started, worked = time.perf_counter(), processor_seconds(processes)
        answers = list(pool.map(timed, jobs))
        seconds, worked = time.perf_counter() - started, processor_seconds(processes) - worked
    print(f"{len(jobs)} pictures in {seconds:.1f} s", file=sys.stderr, flush=True)
    return {
        "seconds": seconds,
        "processor_seconds": worked,
        "latencies": sorted(latency for latency, _ in answers),
        "pictures": [picture for _, picture in answers],
    }


def processor_seconds(processes: Sequence[psutil.Process]) -> float:
    return sum(times.user + times.system for times in (process.cpu_times() for process in processes))


def compare(made: dict[str, list[np.ndarray]], files: Path, jobs: Sequence[Job], steps: int) -> dict[str, Any]:
    """The pictures of both sides against those that `generate` makes alone, in levels of 255."""
    adapters = {name: load_adapter(files / f"{name}.safetensors") for name in ROLES}
    pipe, family = load_pipeline("pico")
    largest: dict[str, list[int]] = {side: [] for side in made}
    effect = []
    for place, (prompt, seed, composition) in enumerate(jobs):
        parts = [(adapters[name], weight) for name, weight in composition.items()]
        alone, bare = (
            np.array(generate(pipe, family, [prompt], [seed], adapters=weighted, steps=steps)[0]).astype(int)
            for weighted in (parts, [])
        )
        effect.append(int(abs(alone - bare).max()))
        for side, pictures in made.items():
            largest[side].append(int(abs(pictures[place] - alone).max()))
    return {
        "compared": len(jobs),
        "wrong": sum(difference > TOLERANCE for difference in largest["qrlora"]),
        "largest": {side: max(differences) for side, differences in largest.items()},
        "least_effect_of_a_composition": min(effect),
    }


def parts(root: psutil.Process) -> dict[str, psutil.Process]:
    """The server's own processes: those of Serve, by name, and the command that started them."""
    found = {}
    for process in [root, *root.children(recursive=True)]:
        name = " ".join(process.cmdline())[:60]
        if process == root or name.startswith("ray::"):
            found[f"{name.split(':')[-1].split('.')[0] if process != root else 'command'} {process.pid}"] = process
    return found


def watch(ask: Callable[[Job], np.ndarray], options: SimpleNamespace, root: psutil.Process) -> dict[str, Any]:
    """Resident megabytes of every part, after each tenth of the requests."""
    seen: dict[str, list[float]] = {}
    jobs, tenth = make_jobs(options.requests), max(1, options.requests // 10)
    for start in range(0, len(jobs), tenth):
        each_round(ask, jobs[start : start + tenth], options.clients)
        for name, process in parts(root).items():
            seen.setdefault(name, []).append(round(process.memory_info().rss / 1e6, 1))
    return {"requests": len(jobs), "megabytes": {name: values for name, values in seen.items() if len(values) > 1}}


def summary(rounds: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    pictures = len(rounds["qrlora"][0]["latencies"])
    for side, taken in rounds.items():
        latencies = sorted(latency for one in taken for latency in one["latencies"])
        found[side] = {
            "pictures_per_second": [pictures / one["seconds"] for one in taken],
            "processor_seconds_per_picture": [one["processor_seconds"] / pictures for one in taken],
            "p50": statistics.median(latencies),
            "p95": latencies[int(0.95 * (len(latencies) - 1))],
        }
    for clock in ("seconds", "processor_seconds"):
        for name, of, to in (("baseline", "diffusers", "qrlora"), ("limit", "qrlora", "bare")):
            pairs = zip(rounds[of], rounds[to], strict=True)
            found[f"{name}_{clock}"] = [one[clock] / other[clock] for one, other in pairs]
    return found


def show(found: dict[str, Any], options: SimpleNamespace) -> None:
    rounds = found["rounds"]
    print(f"{options.clients} clients, a composition to every request, {options.steps} steps, {options.nodes} node(s)")
    print(f"{'':10} {'pictures/s':>10} {'processor s each':>17} {'p50 s':>8} {'p95 s':>8}")
    for side in ("qrlora", "diffusers", "bare"):
        row = rounds[side]
        speed, work = (statistics.median(row[key]) for key in ("pictures_per_second", "processor_seconds_per_picture"))
        print(
            f"{side:10} {speed:10.2f} {work:17.3f}"
            + ("" if side == "bare" else f" {row['p50']:8.2f} {row['p95']:8.2f}")
        )
    for name, what in (("baseline", "diffusers takes, of qrlora's"), ("limit", "qrlora takes, of the bare model's")):
        both = (
            " ".join(f"{ratio:.2f}" for ratio in rounds[f"{name}_{clock}"])
            for clock in ("seconds", "processor_seconds")
        )
        print("{} time: {}; processor time: {}".format(what, *both))
    right = found["right"]
    print(f"{right['wrong']} wrong of {right['compared']} pictures; from the one made alone in levels of 255, at most:")
    print(", ".join(f"{side} {levels}" for side, levels in right["largest"].items()), end="; ")
    print(f"compositions change at least {right['least_effect_of_a_composition']}")
    print(f"resident MB after each tenth of {found['memory']['requests']} requests; processor seconds in all")
    for name, values in found["memory"]["megabytes"].items():
        print(f"  {name:30} {' '.join(f'{value:6.0f}' for value in values)}   {found['work'].get(name, 0):8.0f} s")
