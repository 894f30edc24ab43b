"""Measure the cost of composed adapters at inference beside the alternatives: ``qrlora lab speed inference``.

One FLUX denoiser of random weights, 1024 wide, is given adapters, and a matrix is merged:

composed     k adapters, ours live (`qrlora.method.composition.Live`) and LoRAs by diffusers' `set_adapters`
changing     other weights for them, against one denoising step
mixed        n pictures with n different adapters: ours in one forward pass, PEFT's LoRA through `adapter_names` in one
             forward pass, and ours in n forward passes
layers       what the same eight add to one layer, without the base's own product
merging      merge and unmerge of a layer against the one product Q ΔR, and PEFT's merge of a LoRA

Every round takes one turn of everything that is compared, in turning order, and a ratio is that of one round, so what
else the machine does meets all alike. Times are the process's own processor time on a CPU, and wall time on a GPU; the
JSON has both. All ways share the tensors of one denoiser.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import statistics
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn

from qrlora import Adapter, Live, QRLoraConfig, adapter_from_model
from qrlora.lab.speed.common import (
    LATENT_CHANNELS,
    TEXT_TOKENS,
    Times,
    conditions,
    flux,
    ratios,
    report,
    settle,
    spread,
    take_turns,
)
from qrlora.method.adapter import remove_adapters
from qrlora.method.composition.batched import batched
from qrlora.models.families.flux import FLUX

ADAPTERS, PICTURES = (1, 2, 4, 8, 16), (2, 4, 8)
CLOCKS = ("wall", "cpu")
MERGED = (3072, 12288)


def main(options: SimpleNamespace) -> None:
    """Measure, print, write."""
    settle(options)
    warnings.filterwarnings("ignore", "Already found a `peft_config`")
    tables = {"composed": composed, "changing": changing, "mixed": mixed, "layers": layers, "merging": merging}
    with tempfile.TemporaryDirectory() as cache, torch.no_grad():
        os.environ["QRLORA_CACHE"] = cache  # bases of random weights are nothing to keep
        bench = Bench(options)
        results = {name: tables[name](bench) for name in options.only}
    report(options, options.device, results=results)


class Bench:
    """The bare denoiser, adapters for it, and inputs."""

    def __init__(self, options: SimpleNamespace):
        self.options, self.dtype = options, getattr(torch, options.dtype)
        self.bare = flux(options.width, options.blocks, options.device, self.dtype).eval()
        self.clock = 0 if options.device.startswith("cuda") else 1
        self.common = {"r": options.rank, "lora_alpha": options.rank, "target_modules": list(FLUX.targets)}
        self.subjects = self.adapters(max(ADAPTERS), columns="subject")
        self.styles = self.adapters(max(ADAPTERS) // 2, columns="style")

    def adapters(self, count: int, columns: str) -> list[Adapter]:
        """Adapters of random ΔR."""
        self.bare.add_adapter(QRLoraConfig(**self.common, columns=columns, triangular=False), "made")
        first = adapter_from_model(self.bare, "made")
        remove_adapters(self.bare, ["made"])
        return [
            dataclasses.replace(first, deltas={n: 0.01 * torch.randn(d.shape) for n, d in first.deltas.items()})
            for _ in range(count)
        ]

    def twin(self) -> Any:
        """A denoiser of its own with the bare one's tensors."""
        tensors = [*self.bare.parameters(), *self.bare.buffers()]
        return copy.deepcopy(self.bare, {id(tensor): tensor for tensor in tensors})

    def live(self, adapters: list[Adapter]) -> Live:
        return Live(self.twin(), {str(number): adapter for number, adapter in enumerate(adapters)})

    def inputs(self, n: int) -> dict[str, Tensor]:
        """Inputs of one denoising step of n pictures."""
        device, side = self.options.device, self.options.side
        return {
            "hidden_states": torch.randn(n, side**2, 4 * LATENT_CHANNELS, device=device).to(self.dtype),
            "timestep": torch.full((n,), 0.5, device=device).to(self.dtype),
            "guidance": torch.full((n,), 3.5, device=device),
            "img_ids": torch.zeros(side**2, 3, device=device),
            "txt_ids": torch.zeros(TEXT_TOKENS, 3, device=device),
            **conditions(n, device, self.dtype),
        }

    def step(self, denoiser: Any, inputs: dict[str, Tensor], **more: Any) -> Callable[[], object]:
        return lambda: denoiser(**inputs, **more, return_dict=False)

    def take(self, arms: dict[str, Callable[[], object]]) -> Times:
        return take_turns(arms, self.options.rounds, self.options.seconds, self.options.device)


def composed(bench: Bench) -> dict[str, Any]:
    """A step with k adapters; the last row has twice the columns, because half of the adapters are styles."""
    inputs = bench.inputs(1)
    arms = {"bare": bench.step(bench.bare, inputs)}
    groups = {f"{k}": bench.subjects[:k] for k in ADAPTERS}
    groups[f"{2 * len(bench.styles)}, half of them styles"] = bench.subjects[: len(bench.styles)] + bench.styles
    for label, adapters in groups.items():
        live = bench.live(adapters)
        live.compose([{name: 1 / len(adapters) for name in live.names}])
        arms[f"ours {label}"] = bench.step(live.denoiser, inputs)
    for k in ADAPTERS:
        denoiser, names = bench.twin(), [f"lora{number}" for number in range(k)]
        for name in names:
            denoiser.add_adapter(LoraConfig(**bench.common, init_lora_weights=False), name)
        denoiser.set_adapters(names, [1 / k] * k)
        arms[f"set_adapters {k}"] = bench.step(denoiser, inputs)
    times = bench.take(arms)
    ours = {name: f"{name.split()[0]} 1" for name in arms if name != "bare"}
    return table(bench, "composed: a step with k adapters", times, {"bare": "bare", "1 adapter": ours})


def changing(bench: Bench) -> dict[str, Any]:
    """Other weights for all adapters that are attached, for one composition and for eight."""
    most = max(ADAPTERS)
    live, denoiser, inputs = bench.live(bench.subjects), bench.twin(), bench.inputs(1)
    names = [f"lora{number}" for number in range(most)]
    for name in names:
        denoiser.add_adapter(LoraConfig(**bench.common, init_lora_weights=False), name)
    rows = [{name: (number + place) / most for place, name in enumerate(live.names)} for number in range(8)]
    several = bench.live(bench.subjects)
    times = bench.take(
        {
            "a step, bare": bench.step(bench.bare, inputs),
            f"ours, {most} adapters": lambda: live.compose(rows[:1]),
            f"ours, {most} adapters for 8 pictures": lambda: several.compose(rows),
            f"set_adapters, {most} LoRAs": lambda: denoiser.set_adapters(names, [0.5] * most),
        }
    )
    return table(bench, "changing: other weights, against a step", times, {"a step": "a step, bare"})


def mixed(bench: Bench) -> dict[str, Any]:
    """Time a step of n pictures, each with an adapter of its own."""
    results = {}
    config = LoraConfig(**bench.common, init_lora_weights=False)
    loras = get_peft_model(bench.twin(), config, "0", autocast_adapter_dtype=False).eval()
    for number in range(1, max(PICTURES)):
        loras.add_adapter(
            str(number), LoraConfig(**bench.common, init_lora_weights=False), autocast_adapter_dtype=False
        )
    for n in PICTURES:
        inputs, one = bench.inputs(n), bench.inputs(1)
        together, apart = bench.live(bench.subjects[:n]), bench.live(bench.subjects[:n])
        rows = [{name: 1.0} for name in together.names]
        together.compose(rows)

        def one_by_one(apart: Live = apart, rows: list[dict[str, float]] = rows, one: Any = one) -> None:
            for row in rows:
                apart.compose([row])
                apart.denoiser(**one)

        ours, loop = f"ours, {n} compositions", f"adapter_names, {n} LoRAs"
        times = bench.take(
            {
                "bare": bench.step(bench.bare, inputs),
                ours: bench.step(together.denoiser, inputs),
                loop: bench.step(loras, inputs, adapter_names=list(together.names)),
                f"ours, {n} forward passes": one_by_one,
            }
        )
        results[str(n)] = table(bench, f"mixed: a step of {n} pictures", times, {"bare": "bare", "ours": ours})
    return results


class Given(nn.Module):
    """A base layer whose output is there already, so that what is timed is the adapters alone."""

    def __init__(self, output: Tensor):
        super().__init__()
        self.output = output

    def forward(self, _: Tensor) -> Tensor:
        return self.output


def adapted(bench: Bench, config: Any, weight: Tensor, names: list[str]) -> Any:
    """A layer (out, in) with an adapter of each of these names."""
    model: Any = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], False, bench.options.device, bench.dtype))
    model[0].weight.copy_(weight)
    for name in names:
        inject_adapter_in_model(config, model, name)
    return model[0].eval()


def layers(bench: Bench) -> dict[str, Any]:
    """Time what adapters add to one layer for eight pictures, and the base's product beside it."""
    results: dict[str, Any] = {}
    n, rank, width = max(PICTURES), bench.options.rank, bench.options.width
    tokens = bench.options.side**2 + TEXT_TOKENS
    own = {"r": rank, "lora_alpha": rank, "target_modules": "0", "init_lora_weights": False}
    names = [str(number) for number in range(n)]
    for out, into in ((width, width), (4 * width, width), (width, 4 * width)):
        weight = 0.02 * torch.randn(out, into, device=bench.options.device)
        one, ours = (adapted(bench, QRLoraConfig(**own), weight, ["0"]) for _ in range(2))
        one.lora_A["0"], ours.lora_A["0"] = (batched(layer.lora_A["0"]) for layer in (one, ours))
        one.lora_A["0"].hold(torch.randn(1, rank, into))
        ours.lora_A["0"].hold(torch.randn(n, rank, into))
        loop = adapted(bench, LoraConfig(**own), weight, names)
        x = torch.randn(n, tokens, into, device=bench.options.device).to(bench.dtype)
        base = ours.base_layer
        for layer in (one, ours, loop):
            layer.base_layer = Given(base(x))
        arms: dict[str, Callable[[], object]] = {
            "the base's product": partial(base, x),
            "ours, 1 composition": partial(one, x),
            f"ours, {n} compositions": partial(ours, x),
            f"adapter_names, {n} LoRAs": partial(loop, x, adapter_names=names),
        }
        baselines: dict[str, Any] = {"the base's": "the base's product", "ours": f"ours, {n} compositions"}
        results[f"{out}x{into}"] = table(
            bench, f"layers: what adapters add to {out}x{into}", bench.take(arms), baselines
        )
    return results


def merging(bench: Bench) -> dict[str, Any]:
    """ΔW into a weight and out again, against Q ΔR into new memory; of two layers, one is always there to do it to."""
    out, width = (side // 4 if bench.options.quick else side for side in MERGED)
    weight = 0.02 * torch.randn(out, width, device=bench.options.device)
    rank = bench.options.rank

    def pair(config: Any) -> list[Any]:
        found = [adapted(bench, config, weight, ["0"]) for _ in range(2)]
        found[0].merge()
        return found

    ours = pair(QRLoraConfig(r=rank, lora_alpha=rank, target_modules="0", init_lora_weights=False))
    loras = pair(LoraConfig(r=rank, lora_alpha=rank, target_modules="0", init_lora_weights=False))
    q, delta = (part.to(bench.dtype) for part in (ours[0].lora_B["0"].q, ours[0].delta_r("0")))
    arms: dict[str, Callable[[], object]] = {"Q ΔR": lambda: q @ delta}
    for name, both in {"ours": ours, "peft lora": loras}.items():
        arms[f"{name}, merge"] = partial(_turn, both, merged=False)
        arms[f"{name}, unmerge"] = partial(_turn, both, merged=True)
    return table(bench, f"merging: {out}x{width}, rank {rank}", bench.take(arms), {"Q ΔR": "Q ΔR"})


def _turn(both: list[Any], *, merged: bool) -> None:
    """Unmerge the one of two layers that is merged, or merge the other."""
    layer = next(layer for layer in both if bool(layer.merged) == merged)
    layer.unmerge() if merged else layer.merge()


def table(bench: Bench, title: str, times: Times, baselines: dict[str, str | dict[str, str]]) -> dict[str, Any]:
    """Medians, and quartiles of the ratio to each baseline; printed too. A baseline is one arm, or one for each arm."""
    rounds = len(next(iter(times.values())))
    print(f"\n{title}; {rounds} rounds, medians of paired ratios with their quartiles")
    print(f"{'':34} {'ms':>9} " + " ".join(f"{'to ' + name:>22}" for name in baselines))
    results: dict[str, Any] = {}
    for arm in times:
        found = results[arm] = {"seconds": statistics.median(turn[bench.clock] for turn in times[arm])}
        cells = []
        for label, baseline in baselines.items():
            other = baseline if isinstance(baseline, str) else baseline.get(arm)
            if other:
                for clock, suffix in enumerate(CLOCKS):
                    found[f"to_{label}_{suffix}"] = ratios(times, arm, other, clock)
            cells.append(spread(found[f"to_{label}_{CLOCKS[bench.clock]}"]) if other else "")
        print(f"{arm:34} {1e3 * found['seconds']:9.2f} " + " ".join(f"{cell:>22}" for cell in cells))
    return results
