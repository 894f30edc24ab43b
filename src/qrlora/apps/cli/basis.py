"""`qrlora basis`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import rich_click as click

from qrlora._files import default_cache_dir
from qrlora.apps.cli.command import Options, command
from qrlora.apps.cli.shared import COUNT, DTYPE, MODEL_HELP, Bar

if TYPE_CHECKING:
    import torch


@command(
    "basis",
    "Compute the basis of a base model ahead of training, one layer at a time, and verify it",
    "Reads the denoiser's safetensors files and never loads the pipeline. Every layer is cached as soon as it is done "
    "($QRLORA_CACHE, else ~/.cache/qrlora): an interrupted run continues where it stopped, and `qrlora train` with the "
    "same model, rank and dtype computes no basis.",
)
@click.argument("model", default="pico", metavar="[MODEL]", help=MODEL_HELP + " (default: pico)")
@click.option("--rank", type=COUNT, help="rank of the adapters to be trained (default: that of `train`)")
@click.option(
    "--columns", default="subject", help="columns of the basis that they train (see `train`; default: subject)"
)
@click.option("--basis-rank", type=COUNT, help="rank of the whole basis (default: the least that has those columns)")
@click.option("--targets", help="module names (to_q,to_k), a regular expression, or all-linear (see `train`)")
@click.option(
    "--algorithm",
    type=click.Choice(["fast", "exact"]),
    default="fast",
    help="truncated SVD by: fast, block Krylov iteration; exact, the full SVD (default: fast)",
)
@click.option(
    "--dtype",
    type=DTYPE,
    default="float32",
    help="precision in which the base model will be trained (default: float32)",
)
@click.option("--json", is_flag=True, help="print what was done as JSON")
def run_basis(options: Options) -> None:
    """Compute or find Q of every layer, check it, and say so."""
    import torch

    from qrlora.method.basis import VERSIONS, clipped_rank, clipping, fingerprint
    from qrlora.method.tuner.config import least_basis_rank, resolve_columns
    from qrlora.models.families import default_device
    from qrlora.models.stored import stored_weights
    from qrlora.models.training.recipe import DEFAULT_RANK, module_names

    rank = options.rank or DEFAULT_RANK
    resolve_columns(options.columns, rank, options.basis_rank)
    basis_rank = options.basis_rank or least_basis_rank(options.columns, rank)
    targets = module_names(options.targets) if options.targets else None
    weights, family = stored_weights(options.model, targets, getattr(torch, options.dtype))
    ranks = {name: clipped_rank(shape, basis_rank) for name, shape in weights.shapes.items()}
    if clipped := clipping({name: (held, basis_rank) for name, held in ranks.items()}):
        print(clipped, file=sys.stderr)
    device, started = default_device(), time.perf_counter()
    digests, layers = _compute(weights, ranks, options.algorithm, device)
    report = {
        "model": options.model,
        "family": family.name,
        "rank": basis_rank,
        "algorithm": options.algorithm,
        "version": VERSIONS[options.algorithm],
        "fingerprint": fingerprint(digests, basis_rank, options.algorithm, 0),
        "device": device.type,
        "cache": str(default_cache_dir()),
        "computed": sum(not layer["cached"] for layer in layers.values()),
        "seconds": round(time.perf_counter() - started, 3),
        "layers": layers,
    }
    print(json.dumps(report, indent=2) if options.json else _summary(report))


def _compute(
    weights: Mapping[str, torch.Tensor], ranks: Mapping[str, int], algorithm: str, device: torch.device
) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
    """Digest of every weight, and what its basis is like; a layer at a time, each kept before the next is begun."""
    from qrlora.method.basis import cache_path, cached_layer_basis, verify, weight_digest

    digests: dict[str, str] = {}
    layers: dict[str, dict[str, Any]] = {}
    bar = Bar("layer")
    try:
        for name in weights:
            started, weight = time.perf_counter(), weights[name]
            digests[name], rank = weight_digest(weight), ranks[name]
            cached = cache_path(digests[name], rank, algorithm=algorithm).exists()
            weight = weight.to(device)
            basis = cached_layer_basis(weight, digests[name], rank, algorithm=algorithm, name=name)
            checked = asdict(verify(weight, basis, name))
            seconds = round(time.perf_counter() - started, 3)
            layers[name] = {"shape": list(weight.shape), "rank": rank, "cached": cached, **checked, "seconds": seconds}
            bar(len(layers), len(weights), name)
    except KeyboardInterrupt as interrupt:
        kept = f"interrupted; {len(layers)} of {len(weights)} layers are kept, and the same command does the rest"
        raise KeyboardInterrupt(kept) from interrupt
    return digests, layers


def _summary(report: dict[str, Any]) -> str:
    layers = report["layers"].values()
    energies = [layer["energy"] for layer in layers]
    off, reach = (max(layer[key] for layer in layers) for key in ("off_orthonormal", "within_reach"))
    return (
        f"{report['model']} ({report['family']}): basis of rank {report['rank']}, {len(layers)} layers, "
        f"{report['computed']} computed and {len(layers) - report['computed']} found in {report['cache']}, "
        f"{report['seconds']:.1f} s on {report['device']}\n"
        f"verified: columns orthonormal to {off:.1e}; they hold {min(energies):.3f} to {max(energies):.3f} of a "
        f"weight's energy, to which another iteration would add at most {reach:.1e} of it"
    )
