"""Measure time and memory of a training step beside the alternatives: ``qrlora lab speed training``.

One FLUX denoiser of random weights, 1024 wide, carries each method in turn: ours (all columns of the basis, and a
subject's share of a basis twice as wide), PEFT's LoRA, PiSSA, OLoRA and MiCA, and the published QR-LoRA layer written
out from its equations, which multiplies ΔR with a mask twice in every forward pass. A step is what the trainer does:
forward, FLUX's loss, backward, clipping, AdamW. Every round takes one step of each method, in turning order, and a
method's ratio to LoRA is taken within the round, so what else the machine does meets all alike.

Memory is counted, not sampled: what a method adds to the denoiser, its optimiser state, and the most that a step holds
beyond that, by the allocator's own record.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from peft import LoraConfig
from torch import Tensor, nn

from qrlora import QRLoraConfig
from qrlora.lab.speed.common import LATENT_CHANNELS, conditions, flux, ratios, report, settle, spread, take_turns
from qrlora.method.basis import layer_basis
from qrlora.models.families.flux import FLUX

METHODS: dict[str, Callable[..., Any] | None] = {
    "lora": LoraConfig,
    "qrlora": QRLoraConfig,
    "qrlora, subject's columns": lambda **common: QRLoraConfig(columns="subject", **common),
    "qrlora, dense": lambda **common: QRLoraConfig(triangular=False, **common),
    "pissa": lambda **common: LoraConfig(init_lora_weights="pissa_niter_4", **common),  # type: ignore[arg-type]
    "olora": lambda **common: LoraConfig(init_lora_weights="olora", **common),
    "mica": lambda **common: LoraConfig(init_lora_weights="mica", **common),
    "published": None,
}
BASELINE = "lora"


def main(options: SimpleNamespace) -> None:
    """Measure, print, write."""
    settle(options)
    options.methods = options.methods or ";".join(METHODS)
    results = {dtype: measure(options, getattr(torch, dtype)) for dtype in options.dtypes}
    report(options, options.device, results=results)


class PublishedLinear(nn.Module):
    """W_res x + s Q (R + ΔR) x, with ΔR rewritten and masked in every forward pass (arXiv 2507.04599, section 3.3)."""

    def __init__(self, base: nn.Linear, rank: int):
        super().__init__()
        basis = layer_basis(base.weight, rank)
        base.weight.data = (base.weight.float() - basis.q @ basis.r).to(base.weight.dtype)
        self.base = base
        self.q, self.r = (nn.Parameter(part, requires_grad=False) for part in (basis.q, basis.r))
        self.delta_r = nn.Parameter(torch.zeros_like(basis.r))
        self.register_buffer("mask", torch.triu(torch.ones_like(basis.r)))

    def forward(self, x: Tensor) -> Tensor:
        mask: Any = self.mask
        with torch.no_grad():
            self.delta_r.data = self.delta_r * mask
        down = self.r.to(x.dtype) + self.delta_r.to(x.dtype) * mask.to(x.dtype)
        return self.base(x) + x @ down.T @ self.q.to(x.dtype).T


@dataclass
class Arm:
    """A denoiser that carries a method, and what trains it."""

    denoiser: Any
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    added: int
    scheduler: Any
    batch: tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]

    def step(self) -> None:
        FLUX.loss(self.denoiser, self.scheduler, *self.batch).backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def build(method: str, options: SimpleNamespace, dtype: torch.dtype) -> Arm:
    denoiser = flux(options.width, options.blocks, options.device, dtype)
    before = tensor_bytes(resident(denoiser))
    config = METHODS[method]
    if config is None:
        for name, module in list(denoiser.named_modules()):
            if isinstance(module, nn.Linear) and any(name.endswith(f".{target}") for target in FLUX.targets):
                parent, _, child = name.rpartition(".")
                setattr(denoiser.get_submodule(parent), child, PublishedLinear(module, options.rank))
    else:
        denoiser.add_adapter(config(r=options.rank, lora_alpha=options.rank, target_modules=list(FLUX.targets)))
    parameters = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
    for name, parameter in denoiser.named_parameters():
        if parameter.requires_grad or ".lora_B." in name:  # MiCA's is frozen, and has to have the dtype of its A
            parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=1e-4, fused=True)
    added = tensor_bytes(resident(denoiser)) - before
    return Arm(
        denoiser, parameters, optimizer, added, FlowMatchEulerDiscreteScheduler(shift=3.0), batch(options, dtype)
    )


def batch(options: SimpleNamespace, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Latents, noise, timesteps and conditions of one step."""
    n, side = options.batch_size, 2 * options.side
    latents, noise = (torch.randn(n, LATENT_CHANNELS, side, side, device=options.device) for _ in range(2))
    return latents, noise, torch.full((n,), 500.0, device=options.device), conditions(n, options.device, dtype)


def resident(denoiser: nn.Module) -> Iterator[Tensor]:
    yield from itertools.chain(denoiser.parameters(), denoiser.buffers())


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of all storages behind these tensors, each once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def peak_of_step(arm: Arm, device: str) -> int:
    """The most bytes that one step holds at a time beyond what was there before it."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        arm.step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        arm.step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def measure(options: SimpleNamespace, dtype: torch.dtype) -> dict[str, Any]:
    """Measure every method at one precision of the denoiser; print and return the table."""
    arms = {method: build(method, options, dtype) for method in options.methods.split(";")}
    steps = {method: arm.step for method, arm in arms.items()}
    times = take_turns(steps, options.rounds, options.seconds, options.device)
    results: dict[str, Any] = {}
    for method, arm in arms.items():
        state = [value for entry in arm.optimizer.state.values() for value in entry.values()]
        results[method] = {
            "trained_parameters": sum(parameter.numel() for parameter in arm.parameters),
            "optimizer_bytes": tensor_bytes(state),
            "added_bytes": arm.added,
            "step_bytes": peak_of_step(arm, options.device),
            "seconds": statistics.median(wall for wall, _ in times[method]),
        }
        for place, clock in enumerate(("wall", "cpu")):
            results[method][f"{clock}_ratio"] = ratios(times, method, BASELINE, place)
    show(results, dtype, len(times[BASELINE]))
    return results


def show(results: dict[str, Any], dtype: torch.dtype, rounds: int) -> None:
    baseline = results[BASELINE]
    print(f"\n{dtype}, {rounds} rounds; ratios to {BASELINE} are medians of paired steps, with their quartiles")
    print(f"{'':26} {'s a step':>8} {'time':>20} {'processor time':>20} {'memory':>17} {'state':>13} {'trained':>15}")
    for method, found in results.items():
        memory, baselines = (r["added_bytes"] + r["optimizer_bytes"] + r["step_bytes"] for r in (found, baseline))
        cells = [f"{found['seconds']:8.3f}"]
        for clock in ("wall", "cpu"):
            cells.append(spread(found[f"{clock}_ratio"]))
        cells.append(f"{memory / 1e6:.1f} MB {memory / baselines:.3f}")
        state, trained = found["optimizer_bytes"], found["trained_parameters"]
        cells.append(f"{state / 1e6:.2f} MB {state / baseline['optimizer_bytes']:.2f}")
        cells.append(f"{trained:,} {trained / baseline['trained_parameters']:.2f}")
        print(f"{method:26} " + " ".join(cells))
