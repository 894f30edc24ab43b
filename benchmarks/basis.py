"""How much faster the `fast` basis is than a full SVD followed by a QR of the core, and what energy it keeps.

python benchmarks/basis.py                                 one random 3072x3072 weight
python benchmarks/basis.py --weights model.safetensors     every matrix of a real file, energy and total times
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from qrlora.basis import layer_basis


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=3072, help="rows and columns of the random weight")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument(
        "--decay", type=float, default=0.5, help="column j is scaled by j^-decay; 0 is white noise, the hardest case"
    )
    parser.add_argument("--weights", type=Path, help="a .safetensors file to use instead of a random weight")
    parser.add_argument("--summary", action="store_true", help="the last line only")
    arguments = parser.parse_args()
    named = matrices(arguments.weights, arguments.rank) if arguments.weights else [("random", random_weight(arguments))]
    print(f"rank {arguments.rank}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    small = torch.randn(256, 256, generator=torch.Generator().manual_seed(1))
    layer_basis(small, 16), full_svd_and_qr(small, 16)  # the first call starts threads, which is neither's time
    totals, least, count = [0.0, 0.0], 1.0, 0
    for name, weight in named:
        count += 1
        fast, fast_s = timed(lambda w=weight: layer_basis(w, arguments.rank))  # type: ignore[misc]
        best, full_s = timed(lambda w=weight: full_svd_and_qr(w, arguments.rank))  # type: ignore[misc]
        kept = fast.energy / best
        totals, least = [totals[0] + fast_s, totals[1] + full_s], min(least, kept)
        shape = "x".join(map(str, weight.shape))
        if not arguments.summary:
            print(
                f"{name} {shape}: fast {fast_s:.2f} s, full SVD + QR {full_s:.2f} s, energy {kept:.6f} of the optimum"
            )
    print(f"{count} weights: ratio {totals[1] / totals[0]:.1f}x, least energy {least:.6f} of the optimum")


def random_weight(arguments: argparse.Namespace) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    scale = torch.arange(1, arguments.size + 1) ** -arguments.decay
    return torch.randn(arguments.size, arguments.size, generator=generator) * scale


def matrices(path: Path, rank: int) -> Iterator[tuple[str, Tensor]]:
    """The weights of a file that have a basis of this rank."""
    with safe_open(path, framework="pt") as file:
        for name in sorted(file.keys()):
            weight = file.get_tensor(name)
            if weight.ndim >= 2 and min(weight.flatten(1).shape) >= rank:
                yield name, weight.flatten(1).float()


def full_svd_and_qr(weight: Tensor, rank: int) -> float:
    """The way without shortcuts: decompose everything, then factor the (out, in) core. Returns the optimal energy."""
    u, values, vh = torch.linalg.svd(weight, full_matrices=False)
    torch.linalg.qr((u[:, :rank] * values[:rank]) @ vh[:rank])
    energies = values.double().square()
    return float(energies[:rank].sum() / energies.sum())


def timed(work: Callable):  # type: ignore[no-untyped-def, type-arg]
    start = time.perf_counter()
    return work(), time.perf_counter() - start


if __name__ == "__main__":
    main()
