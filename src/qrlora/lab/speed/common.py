"""Parts that benchmarks share: a denoiser of real shapes, interleaved timing, a description of the machine."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from qrlora._files import write_atomically

TEXT_TOKENS, TEXT_WIDTH, POOLED_WIDTH, LATENT_CHANNELS, HEAD = 64, 1024, 768, 16, 128
WARM_UP, FEWEST_ROUNDS = 2, 5
LOAD = psutil.getloadavg()[0]
"""Threads that other work kept busy in the minute before."""

Times = dict[str, list[tuple[float, float]]]
"""(wall, processor) seconds of every turn of every arm, round by round."""


def machine(device: str) -> dict[str, Any]:
    """Describe the machine that the figures are of."""
    names = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="minutes"),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else (names or [platform.processor()])[0],
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": LOAD,
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "peft", "diffusers", "qrlora")},
    }


def settle(options: SimpleNamespace) -> None:
    """Choose the device that the options leave open; a quick run has a quarter of the width and few rounds."""
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.quick:
        options.width, options.rounds, options.seconds = options.width // 4, FEWEST_ROUNDS, 0.0


def report(options: SimpleNamespace, device: str, **found: Any) -> None:
    """Write what was found where `--json` says, with what was asked for and the machine's facts."""
    asked = {name: value for name, value in vars(options).items() if name != "json"}
    content = {"machine": machine(device), "options": asked, **found}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(options.json, (json.dumps(content, indent=1, default=str) + "\n").encode())
    print(f"\nwritten: {options.json}")


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def flux(width: int, blocks: int, device: str, dtype: torch.dtype) -> Any:
    """A frozen FLUX denoiser of random weights: `blocks` of each of its two kinds."""
    torch.manual_seed(0)
    denoiser: Any = FluxTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=blocks,
        num_single_layers=blocks,
        attention_head_dim=HEAD,
        num_attention_heads=width // HEAD,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=POOLED_WIDTH,
        guidance_embeds=True,
    )
    return denoiser.requires_grad_(False).to(device, dtype)


def conditions(n: int, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Random encodings of `n` prompts, as FLUX takes them."""
    return {
        "encoder_hidden_states": torch.randn(n, TEXT_TOKENS, TEXT_WIDTH, device=device).to(dtype),
        "pooled_projections": torch.randn(n, POOLED_WIDTH, device=device).to(dtype),
    }


def take_turns(arms: Mapping[str, Callable[[], object]], rounds: int, seconds: float, device: str) -> Times:
    """Run every arm once a round, the first one another each round, for so many rounds or seconds; at least a few."""
    times: Times = {name: [] for name in arms}
    order, started = list(arms), time.perf_counter()
    for number in range(WARM_UP + rounds):
        if number == WARM_UP:
            times, started = {name: [] for name in arms}, time.perf_counter()
        if number >= WARM_UP + FEWEST_ROUNDS and time.perf_counter() - started > seconds:
            break
        order = order[1:] + order[:1]
        for name in order if number % 2 else reversed(order):
            wall, processor = time.perf_counter(), time.process_time()
            arms[name]()
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            times[name].append((time.perf_counter() - wall, time.process_time() - processor))
    return times


def ratios(times: Times, name: str, baseline: str, clock: int = 0) -> list[float]:
    """Quartiles of an arm's time to a baseline's in the same round; clock: 0 is wall, 1 is processor time."""
    paired = zip(times[name], times[baseline], strict=True)
    return statistics.quantiles(own[clock] / other[clock] for own, other in paired)


def spread(quartiles: list[float]) -> str:
    low, middle, high = quartiles
    return f"{middle:.3f} ({low:.3f}-{high:.3f})"
