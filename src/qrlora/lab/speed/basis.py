"""Time the `fast` basis against other ways to a weight's leading columns, with the energy each keeps.

qrlora lab speed basis                                 one random 3072x3072 weight, against full SVD + QR
qrlora lab speed basis --shapes flux.1 --peft          the shapes of a model, against PEFT's initialisations too
qrlora lab speed basis --whole flux.1                  `fast` alone, on as many random weights as that model has
qrlora lab speed basis --weights model.safetensors     every matrix of a real file, energy and total times
qrlora lab speed basis --reproduce                     how far Q turns with threads, processor kernels and devices

Every round times every way on the same weight in turn; a ratio is that of one round. "two products" is W X and Wᵀ Y
with as many columns as the rank: no way to a weight's leading columns can do with less. "needed products" are those of
the fewest steps of a block Krylov iteration, blocks as wide as `fast` has, whose space holds 0.999 of the best energy:
no such iteration can do with less.
"""

from __future__ import annotations

import functools
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from qrlora.lab.speed.common import report
from qrlora.method.basis import block_width, layer_basis

SHAPES = {
    "flux.1": [(3072, 3072), (12288, 3072), (3072, 12288)],
    "sd3.5-medium": [(1536, 1536), (6144, 1536), (1536, 6144)],
    "sdxl": [(640, 640), (640, 2048), (1280, 1280), (1280, 2048)],
}
"""The shapes (out, in) of the weights that are adapted by default."""
WHOLE = {
    "flux.1": {(3072, 3072): 19 * 8 + 38 * 3, (12288, 3072): 19 * 2 + 38, (3072, 12288): 19 * 2, (3072, 15360): 38}
}
"""All attention and feed-forward matrices of a model: 418 of FLUX.1-dev's."""

Way = Callable[[Tensor, int], Tensor]
"""(weight, rank) -> columns that span what the way found."""


def main(arguments: SimpleNamespace) -> None:
    """Measure, print, write."""
    print(f"rank {arguments.rank}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    warm_up()
    found: dict[str, Any] = (reproduce if arguments.reproduce else whole if arguments.whole else compare)(arguments)
    report(arguments, "cpu", results=found)


def warm_up() -> None:
    """Compute once before timing, because the first call starts threads."""
    small = torch.randn(256, 256, generator=torch.Generator().manual_seed(1))
    for way in WAYS.values():
        way(small, 16)


def compare(arguments: SimpleNamespace) -> dict[str, dict[str, float]]:
    """Time every way on every weight; way -> its time to `fast`'s, and the least energy, of all together."""
    ways = WAYS | (PEFT if arguments.peft else {})
    bounds = (BOUND, NEEDED)
    totals, least, count = dict.fromkeys([*ways, NEEDED], 0.0), dict.fromkeys([*ways, NEEDED], 1.0), 0
    for name, weight in weights_of(arguments):
        count += 1
        ways[NEEDED] = functools.partial(products, steps=steps_needed(weight, arguments.rank))
        seconds, energies = compared(ways, weight, arguments.rank, arguments.rounds)
        for way in ways:
            kept = energies[way] / energies["full SVD + QR"]
            totals[way], least[way] = totals[way] + sum(seconds[way]), min(least[way], kept)
            if not arguments.summary and way not in bounds:
                print(row(name, way, seconds, kept))
    found = {}
    for way in ways:
        ratio = totals[way] / totals["fast"]
        found[way] = {"seconds": totals[way], "times_fast": ratio, "least_energy": least[way]}
        energy_of = "" if way in bounds else f", least energy {least[way]:.6f} of the optimum"
        print(f"{count} weights, {way}: {ratio:.2f} times `fast`{energy_of}")
    return found


def whole(arguments: SimpleNamespace) -> dict[str, float]:
    """Seconds of `fast` on random weights of all of a model's layers, made one at a time and not counted, and the most
    memory that this process ever held beyond what it held before, in bytes, the weight included."""
    before, seconds, count = peak(), 0.0, 0
    for shape, number in WHOLE[arguments.whole].items():
        weight, took = random_weight(shape, arguments.decay), 0.0
        for _ in range(number):
            weight.mul_(1.0001)  # another weight each time, at no cost to speak of
            start = time.perf_counter()
            layer_basis(weight, arguments.rank)
            took += time.perf_counter() - start
        seconds, count = seconds + took, count + number
        print(f"{number} of {shape[0]}x{shape[1]}: {took:.1f} s", flush=True)
    found = {"layers": count, "seconds": seconds, "bytes_beyond": peak() - before}
    print(f"{count} layers: {seconds:.0f} s, {found['bytes_beyond'] / 1e9:.2f} GB beyond what was held before")
    return found


def peak() -> int:
    """The most bytes this process has held."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def weights_of(arguments: SimpleNamespace) -> Iterator[tuple[str, Tensor]]:
    if arguments.weights:
        yield from matrices(arguments.weights, arguments.rank)
        return
    for shape in SHAPES[arguments.shapes] if arguments.shapes else [(arguments.size, arguments.size)]:
        yield f"random {shape[0]}x{shape[1]}", random_weight(shape, arguments.decay)


def random_weight(shape: tuple[int, int], decay: float) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    # In no order: a QR decomposition without pivots would meet the strongest inputs first.
    scale = torch.arange(1, shape[1] + 1)[torch.randperm(shape[1], generator=generator)] ** -decay
    return torch.randn(shape, generator=generator) * scale


def matrices(path: Path, rank: int) -> Iterator[tuple[str, Tensor]]:
    """The weights of a file that have a basis of this rank."""
    with safe_open(path, framework="pt") as file:
        for name in sorted(file.keys()):
            weight = file.get_tensor(name)
            if weight.ndim >= 2 and min(weight.flatten(1).shape) >= rank:
                yield f"{name} {'x'.join(map(str, weight.shape))}", weight.flatten(1).float()


def compared(
    ways: dict[str, Way], weight: Tensor, rank: int, rounds: int
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of every way in every round, and the share of the weight's energy that its columns hold."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    energies = {}
    for _ in range(rounds):
        for name, way in ways.items():
            given = weight.clone()  # PEFT writes the residual into it
            start = time.perf_counter()
            columns = way(given, rank)
            seconds[name].append(time.perf_counter() - start)
            energies[name] = energy(columns, weight)
    return seconds, energies


def two_products(weight: Tensor, rank: int) -> Tensor:
    """W X and Wᵀ Y, of random columns: the least that reading a weight from both sides takes."""
    y = weight @ torch.randn(weight.shape[1], rank, generator=torch.Generator().manual_seed(2))
    weight.T @ y
    return y


def steps_needed(weight: Tensor, rank: int) -> int:
    """The least steps (a product from either side) whose Krylov space holds 0.999 of the best energy."""
    best, block = layer_basis(weight, rank).energy * float(weight.double().square().sum()), block_width(rank)
    x = torch.randn(weight.shape[1], block, generator=torch.Generator().manual_seed(2))
    left = torch.linalg.qr(weight @ x).Q
    held = left.T @ weight
    while float(torch.linalg.svdvals(held)[:rank].double().square().sum()) < 0.999 * best:
        new = weight @ held[-block:].T
        for _ in range(2):
            new = torch.linalg.qr(new - left @ (left.T @ new)).Q
        left, held = torch.cat([left, new], 1), torch.cat([held, new.T @ weight])
    return len(held) // block


def products(weight: Tensor, rank: int, steps: int) -> Tensor:
    """W X and Yᵀ W of blocks of random columns, so many times over."""
    x = torch.randn(weight.shape[1], block_width(rank), generator=torch.Generator().manual_seed(2))
    for _ in range(steps):
        y = weight @ x
        y.T @ weight
    return y


def reproduce(arguments: SimpleNamespace) -> dict[str, dict[str, float]]:
    """||Q - Q'||_F / sqrt(rank) for weights of several spectra, Q' computed in a process with other rounding."""
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        computed = {}
        for name, (variables, device) in VARIANTS.items():
            if device == "cuda" and not torch.cuda.is_available():
                continue
            path = Path(folder) / "q.safetensors"
            subprocess.run(
                [sys.executable, "-c", OTHERWISE, str(arguments.rank), device, str(path)],
                env=os.environ | variables, check=True,
            )  # fmt: skip
            computed[name] = load_file(path)
    first = next(iter(computed))
    for name in list(computed)[1:]:
        found[name] = {}
        for weight, q in computed[name].items():
            found[name][weight] = float((q - computed[first][weight]).norm()) / arguments.rank**0.5
        shown = ", ".join(f"{weight} {angle:.1e}" for weight, angle in found[name].items())
        print(f"{name} against {first}: {shown}")
    return found


VARIANTS = {
    "one thread": ({"OMP_NUM_THREADS": "1"}, "cpu"),
    "two threads": ({"OMP_NUM_THREADS": "2"}, "cpu"),
    "other kernels of the BLAS": ({"OMP_NUM_THREADS": "1", "MKL_CBWR": "COMPATIBLE"}, "cpu"),
    "a GPU": ({}, "cuda"),
}
"""Environment and device of processes that compute the same in another order."""
OTHERWISE = """
import sys
import torch
from safetensors.torch import save_file
from qrlora.lab.speed.basis import random_weight
from qrlora.method.basis import layer_basis
rank, device, path = sys.argv[1:]
found = {}
for decay in (1.0, 0.5, 0.25, 0.1, 0.0):
    weight = random_weight((1024, 1536), decay).to(device)
    found[f"i^-{decay}"] = layer_basis(weight, int(rank)).q.cpu().contiguous()
save_file(found, path)
"""


def energy(columns: Tensor, weight: Tensor) -> float:
    held = torch.linalg.qr(columns).Q.T @ weight
    parts = [torch.linalg.vector_norm(part, dim=1).double().square().sum() for part in (held, weight)]
    return float(parts[0] / parts[1])


def row(name: str, way: str, seconds: dict[str, list[float]], kept: float) -> str:
    ratios = sorted(own / fast for own, fast in zip(seconds[way], seconds["fast"], strict=True))
    spread = f" ({ratios[0]:.1f} to {ratios[-1]:.1f})" if len(ratios) > 1 else ""
    return (
        f"{name}  {way:<15}{statistics.median(seconds[way]):8.2f} s  {statistics.median(ratios):6.1f} times `fast`"
        f"{spread}, energy {kept:.6f} of the optimum"
    )


def fast(weight: Tensor, rank: int) -> Tensor:
    return layer_basis(weight, rank).q


def full(weight: Tensor, rank: int) -> Tensor:
    """The way without shortcuts, which is the published code's: decompose everything, then factor the large core."""
    u, values, vh = torch.linalg.svd(weight, full_matrices=False)
    return torch.linalg.qr((u[:, :rank] * values[:rank]) @ vh[:rank]).Q[:, :rank]


def peft_way(initialisation: str) -> Way:
    """PEFT's own initialisation of a layer that carries this weight, called on the layer itself."""

    def initialised(weight: Tensor, rank: int) -> Tensor:
        with torch.device("meta"):
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight = nn.Parameter(weight)
        options: dict[str, Any] = {"r": rank, "lora_alpha": rank, "target_modules": ["0"]}
        config = LoraConfig(init_lora_weights=initialisation, **options)  # type: ignore[arg-type]
        layer: Any = get_peft_model(nn.Sequential(linear), config).base_model.model[0]  # type: ignore[index]
        return layer.lora_B["default"].weight.detach()

    return initialised


BOUND, NEEDED = "two products", "needed products"
WAYS: dict[str, Way] = {"fast": fast, "full SVD + QR": full, BOUND: two_products}
PEFT: dict[str, Way] = {name: peft_way(name) for name in ("pissa", "pissa_niter_16", "olora", "mica")}
