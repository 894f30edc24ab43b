"""The published claims (arXiv 2507.04599) as measurements: each function returns numbers, none returns a verdict.

Where a number could come about by chance, or by two runs having begun alike, what that alone would give stands beside
it. `qrlora lab claims` trains what is needed on pico and prints them all.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from qrlora.lab.baselines.adapters import is_target, orthonormal
from qrlora.lab.baselines.context import Context
from qrlora.lab.baselines.deltas import Learned, applied
from qrlora.lab.baselines.directions import positive_qr
from qrlora.method.adapter import Adapter
from qrlora.method.basis import Basis, layer_basis
from qrlora.method.composition import similarity
from qrlora.models.families import ModelFamily
from qrlora.models.families.flux import FLUX
from qrlora.models.families.sd3 import SD3
from qrlora.models.families.sdxl import SDXL

Sizes = dict[str, tuple[int, int]]
"""Layer -> (out, in) of its weight."""

_SD3_5: dict[str, Any] = {
    "sample_size": 128, "in_channels": 16, "out_channels": 16, "attention_head_dim": 64, "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048, "qk_norm": "rms_norm",
}  # fmt: skip
PUBLIC: dict[str, tuple[ModelFamily, type, dict[str, Any]]] = {
    "FLUX.1": (FLUX, FluxTransformer2DModel, {}),
    "SD 3.5 medium": (
        SD3,
        SD3Transformer2DModel,
        {**_SD3_5, "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536,
         "pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13))},
    ),
    "SD 3.5 large": (
        SD3,
        SD3Transformer2DModel,
        {**_SD3_5, "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432,
         "pos_embed_max_size": 192},
    ),
    "SDXL": (
        SDXL,
        UNet2DConditionModel,
        {"sample_size": 128, "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048,
         "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
         "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
         "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20),
         "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
         "projection_class_embeddings_input_dim": 2816},
    ),
}  # fmt: skip
"""Public models by what their published configurations say: family, denoiser, its arguments other than the default."""


def sizes_of(denoiser: nn.Module, family: ModelFamily) -> Sizes:
    """Return the sizes of the weights that are adapted by default."""
    named = [(name, module) for name, module in denoiser.named_modules() if isinstance(module, nn.Linear)]
    return {n: (m.out_features, m.in_features) for n, m in named if is_target(n, family.targets)}


def public_sizes() -> dict[str, Sizes]:
    """Return these sizes for the models in PUBLIC, built on the meta device, because only shapes are needed."""
    found = {}
    for name, (family, kind, config) in PUBLIC.items():
        with torch.device("meta"):
            found[name] = sizes_of(kind(**config), family)
    return found


def half_the_parameters(sizes: Mapping[str, tuple[int, int]], rank: int) -> dict[str, float]:
    """ "Half the trainable parameters of LoRA": r · in for ΔR (less the triangle's zeros) against r · (out + in)."""
    lora = sum(rank * (out + width) for out, width in sizes.values())
    dense = sum(rank * width for _, width in sizes.values())
    triangular = dense - len(sizes) * rank * (rank - 1) // 2
    counts = {"layers": len(sizes), "lora": lora, "dense": dense, "triangular": triangular}
    return counts | {"dense_ratio": dense / lora, "triangular_ratio": triangular / lora}


def core_before_qr(weights: Mapping[str, Tensor], rank: int) -> dict[str, float]:
    """ "SVD core, then QR, keeps more than QR of W": share of ‖W‖² in the span of Q, mean and least over the layers.

    svd        Q of the basis (by Eckart and Young 1936 no r columns hold more)
    qr         the first r columns of the Q of W = Q R, which are the span of the first r columns of W
    random     a random Q; r / out in the mean
    svd_wins   share of the layers in which svd > qr
    """
    shares: dict[str, list[float]] = {"svd": [], "qr": [], "random": []}
    for name, weight in weights.items():
        matrix = weight.detach().float().flatten(1)
        columns = {
            "svd": layer_basis(matrix, rank, algorithm="exact", name=name).q,
            "qr": torch.linalg.qr(matrix).Q[:, :rank],
            "random": orthonormal(len(matrix), rank, f"claim {name}"),
        }
        whole = float(matrix.square().sum())
        for way, q in columns.items():
            shares[way].append(float((q.T @ matrix).square().sum()) / whole)
    found = {
        f"{way}_{what}": f(values) for way, values in shares.items() for what, f in (("mean", fmean), ("least", min))
    }
    return found | {"svd_wins": fmean(a > b for a, b in zip(shares["svd"], shares["qr"], strict=True))}


def polar_factor(matrix: Float[Tensor, "out rank"]) -> Float[Tensor, "out rank"]:
    """U Vᵀ of A = U S Vᵀ, the orthonormal columns nearest to A in Frobenius norm (Fan and Hoffman 1955)."""
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u @ vh


def nearest_orthonormal(weights: Mapping[str, Tensor], rank: int) -> dict[str, float]:
    """ "Orthonormalising by QR gives the nearest orthonormal matrix in Frobenius norm": mean ‖A - X‖ / ‖A‖ of layers.

    A has three forms: the first r columns of W; those of the rank-r core U S Vᵀ; and U S, whose columns are orthogonal,
    which makes QR and polar factor one. X is the polar factor or the Q of A's QR with positive pivots.

    *_qr_beats   share of the layers in which QR is nearer than the polar factor by more than rounding: 0 by theorem
    """
    found: dict[str, list[float]] = {}
    for weight in weights.values():
        matrix = weight.detach().double().flatten(1)
        u, values, vh = torch.linalg.svd(matrix, full_matrices=False)
        u, values, vh = u[:, :rank], values[:rank], vh[:rank]
        forms = {"columns": matrix[:, :rank], "core": (u * values @ vh)[:, :rank], "scaled": u * values}
        for form, a in forms.items():
            ways = {"polar": polar_factor(a), "qr": positive_qr(a)}
            away = {way: float((a - x).norm() / a.norm()) for way, x in ways.items()}
            for way, distance in away.items():
                found.setdefault(f"{form}_{way}", []).append(distance)
            found.setdefault(f"{form}_qr_beats", []).append(float(away["qr"] < away["polar"] * (1 - 1e-9)))
    return {name: fmean(values) for name, values in found.items()}


def alike(adapters: Sequence[Adapter], basis: Basis | None = None) -> dict[str, float]:
    """ "R and A are alike across tasks while ΔR is not": cosines of two adapters' parts, mean over all pairs.

    The keys are those of `similarity` (q, r, delta_r, a, b, delta_w), and for adapters on a basis

    r_by_start        what the cosine of R + ΔR would be if the ΔR had nothing in common: the frozen R alone makes it
    delta_r_chance    root mean square of the cosine of random ΔR of these sizes and norms, and of random ΔW
    delta_w_chance
    """
    pairs = [_pair(a, b, basis) for a, b in itertools.combinations(adapters, 2)]
    return {key: fmean(pair[key] for pair in pairs) for key in pairs[0]}


def _pair(a: Adapter, b: Adapter, basis: Basis | None) -> dict[str, float]:
    found = dict(similarity(a, b, basis, basis).total)
    if not a.metadata.on_basis or basis is None:
        return found
    own = [{n: adapter.scaling * d.double() for n, d in adapter.deltas.items()} for adapter in (a, b)]
    frozen = sum(float(basis[name].r[list(a.columns(name))].double().square().sum()) for name in a.deltas)
    norms = [sum(float(delta.square().sum()) for delta in one.values()) for one in own]
    found["r_by_start"] = frozen / math.sqrt((frozen + norms[0]) * (frozen + norms[1]))
    for key, places in (("delta_r", lambda n: a.deltas[n].numel()), ("delta_w", lambda n: math.prod(a.shapes[n]))):
        crossed = sum(float(own[0][n].square().sum() * own[1][n].square().sum()) / places(n) for n in own[0])
        found[f"{key}_chance"] = math.sqrt(crossed / (norms[0] * norms[1]))
    return found


def alike_trained(adapters: Sequence[Adapter]) -> dict[str, float]:
    """ "Q is alike across tasks when it may train": of adapters by train_basis, cosines, mean over all pairs.

    q, r             Q + ΔQ and R + ΔR
    delta_q, delta_r what training added
    q_by_start       what the cosine of Q + ΔQ would be if the ΔQ had nothing in common, and of R + ΔR
    r_by_start
    q_moved          ‖ΔQ‖ / ‖Q‖, and ‖ΔR‖ / ‖R‖
    r_moved
    """
    parts = [_trained_parts(adapter) for adapter in adapters]
    found: dict[str, float] = {}
    for side in "qr":
        start, moves = parts[0][side], [part[f"delta_{side}"] for part in parts]
        pairs = list(itertools.combinations(moves, 2))
        found[side] = fmean(float(cosine_similarity(start + x, start + y, 0)) for x, y in pairs)
        found[f"delta_{side}"] = fmean(float(cosine_similarity(x, y, 0)) for x, y in pairs)
        energies = [float(start.square().sum() + move.square().sum()) for move in moves]
        alone = float(start.square().sum())
        found[f"{side}_by_start"] = fmean(alone / math.sqrt(x * y) for x, y in itertools.combinations(energies, 2))
        found[f"{side}_moved"] = fmean(float(move.norm() / start.norm()) for move in moves)
    return found


def _trained_parts(adapter: Adapter) -> dict[str, Float[Tensor, " entries"]]:
    """Q, ΔQ, R, ΔR of all layers end to end, from up [Q, ΔQ] and down [ΔR; R + ΔR]."""
    rank = adapter.metadata.rank // 2
    assert adapter.ups is not None
    ups, downs = list(adapter.ups.values()), list(adapter.deltas.values())
    pieces = {
        "q": [up[:, :rank] for up in ups],
        "delta_q": [up[:, rank:] for up in ups],
        "r": [down[rank:] - down[:rank] for down in downs],
        "delta_r": [down[:rank] for down in downs],
    }
    return {name: torch.cat([piece.double().flatten() for piece in values]) for name, values in pieces.items()}


@torch.no_grad()
def held_out_loss(context: Context, part: int, learned: Learned, draws: int = 16) -> float:
    """Return the loss on a part's picture under noise that training did not use, the same for every ΔW."""
    with applied(context.denoiser, learned):
        return fmean(context.loss(context.call(part, 10_000 + number)) for number in range(draws))
