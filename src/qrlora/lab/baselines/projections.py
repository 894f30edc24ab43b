"""Merges by linear algebra: what of one ΔW lies in the other's way, in weights or in the activations they meet.

A layer with input x adds ΔWₐ x + ΔW_b x. What of ΔWₐ reads the directions that ΔW_b reads adds to its output whenever
that speaks up; so it is taken out (projection), or both are weighed so that each still gives, on its own inputs, what
it gave alone (least squares on E x xᵀ).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from qrlora.lab.baselines.context import Context, Moments
from qrlora.lab.baselines.deltas import Delta, Learned, inner, total

RIDGE = 1e-4
"""Added to the diagonal of E x xᵀ, as a share of its mean: directions that hardly occur do not decide."""


def project_out(
    of: Learned,
    other: Learned,
    rank: int | None = None,
    soft: float = math.inf,
    moments: Mapping[str, Float[Tensor, "in in"]] | None = None,
) -> Learned:
    """`of` less what of it lies in the dominant row space of `other`, layer by layer: ΔW (1 - c V Vᵀ), c = μ / (1 + μ).

    That is the least of ‖X - ΔW‖² + μ ‖X V‖², V (in, rank) the first right singular vectors of the other's ΔW.

    Args:
        rank: how many directions of the other are dominant; all it has if None.
        soft: μ, from 0 (nothing is taken) to infinity (all of it: X V = 0).
        moments: E x xᵀ by layer. With them lengths and angles are those of what the layers put out on such inputs:
            V is of ΔW M with M² = E x xᵀ, and ΔW (1 - c M V Vᵀ M⁻¹) is returned. Layers without stay as they are.
    """
    share = 1.0 if math.isinf(soft) else soft / (1 + soft)
    projected = dict(of)
    for name in of.keys() & other.keys():
        root, inverse = _roots(moments[name]) if moments else (None, None)
        seen = other[name] if root is None else other[name].seen_through(root.float())
        v = seen.decomposed()[2][:rank].T
        left, right = (v, v.T) if root is None or inverse is None else (root @ v, v.T @ inverse)
        projected[name] = _minus(of[name], share * left, right)
    return projected


def _minus(delta: Delta, left: Float[Tensor, "in k"], right: Float[Tensor, "k in"]) -> Delta:
    """ΔW (1 - left right), in the same form."""
    rows = (delta.whole if delta.factors is None else delta.factors[1]).double()
    less = (rows - rows @ left @ right).float()
    return Delta(matrix=less) if delta.factors is None else Delta(delta.factors[0], less)


def _roots(moment: Float[Tensor, "in in"]) -> tuple[Float[Tensor, "in in"], Float[Tensor, "in in"]]:
    """M and M⁻¹ with M² = E x xᵀ and a little of the identity."""
    values, vectors = torch.linalg.eigh(_ridged(moment))
    root = values.clamp(min=0).sqrt()
    return vectors * root @ vectors.T, vectors / root @ vectors.T


def _ridged(moment: Float[Tensor, "in in"]) -> Float[Tensor, "in in"]:
    return moment + RIDGE * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)


def nplora(
    parts: Sequence[Learned], context: Context | None = None, *, rank: int | None = None, soft: float = math.inf
) -> Learned:
    """NP-LoRA (Chen et al. 2025, arXiv 2511.11051): the style whole, the content in the null space of its directions.

    ΔW = ΔW_s + ΔW_c (1 - μ / (1 + μ) V Vᵀ) with V from the SVD of ΔW_s; μ -> ∞ is the hard projection. How many
    directions count is left open here (`rank`), and both are to be tuned.
    """
    subject, style = parts
    return _sum([project_out(subject, style, rank, soft), style])


def project_style(
    parts: Sequence[Learned], context: Context | None = None, *, rank: int | None = None, soft: float = math.inf
) -> Learned:
    """The mirror image of NP-LoRA: the subject whole, the style in the null space of its directions. Ours."""
    subject, style = parts
    return _sum([subject, project_out(style, subject, rank, soft)])


def project_both(
    parts: Sequence[Learned], context: Context | None = None, *, rank: int | None = None, soft: float = 1.0
) -> Learned:
    """Each gives way to the others in equal measure. Any number of parts. Ours."""
    others = [_together([*parts[:i], *parts[i + 1 :]]) for i in range(len(parts))]
    return _sum([project_out(part, read, rank, soft) for part, read in zip(parts, others, strict=True)])


def _together(parts: Sequence[Learned]) -> Learned:
    """One that reads all that any of them reads, as strongly: their rows under one another, so that none cancel.
    Layers that none of them reads are left out."""
    if len(parts) == 1:
        return parts[0]
    read: Learned = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        pieces = [part[name].decomposed()[1:] for part in parts if name in part]
        rows = torch.cat([values[:, None] * right for values, right in pieces])
        if len(rows):
            read[name] = Delta(torch.eye(len(rows), dtype=rows.dtype), rows)
    return read


def project_activation(
    parts: Sequence[Learned],
    context: Context,
    *,
    rank: int | None = None,
    soft: float = math.inf,
    giving: str = "subject",
) -> Learned:
    """As NP-LoRA, where "same direction" is judged by outputs on what both were taught instead of by weights. Ours.

    giving: which of the two gives way, subject or style.
    """
    context.check(parts)
    seen = [context.moments(i, part) for i, part in enumerate(parts)]
    mean = {name: (seen[0][name] + seen[1][name]) / 2 for name in seen[0].keys() & seen[1].keys()}
    subject, style = parts
    if giving == "style":
        return _sum([subject, project_out(style, subject, rank, soft, mean)])
    return _sum([project_out(subject, style, rank, soft, mean), style])


def activation_weights(parts: Sequence[Learned], context: Context) -> Learned:
    """Σ wᵢ ΔWᵢ with the weights of `weights_by_activation`. Any number of parts. Ours."""
    chosen = weights_by_activation(parts, context)
    return _sum([{n: d.scaled(chosen[n][i]) for n, d in part.items()} for i, part in enumerate(parts)])


def weights_by_activation(parts: Sequence[Learned], context: Context) -> dict[str, list[float]]:
    """For each layer the weights w that minimise Σⱼ E ‖(Σᵢ wᵢ ΔWᵢ - ΔWⱼ) xⱼ‖², xⱼ the inputs when part j is alone.

    The normal equations need inner products ⟨A, B⟩_G = tr(A G Bᵀ) alone: no solve larger than the number of parts.
    """
    context.check(parts)
    seen = [context.moments(i, part) for i, part in enumerate(parts)]
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: _weights([part.get(name) for part in parts], [one.get(name) for one in seen]) for name in names}


def _weights(deltas: Sequence[Delta | None], moments: Sequence[Float[Tensor, "in in"] | None]) -> list[float]:
    there = [i for i, delta in enumerate(deltas) if delta is not None]
    own: list[Delta] = [delta for delta in deltas if delta is not None]
    grams = []
    for j in there:
        moment = moments[j]
        assert moment is not None  # it was measured on the layers of the part
        through = [delta.seen_through(moment.float()) for delta in own]
        grams.append(torch.tensor([[inner(a, b) for b in own] for a in through], dtype=torch.float64))
    target = torch.stack([gram[:, k] for k, gram in enumerate(grams)]).sum(0)
    matrix = torch.stack(grams).sum(0)
    solved = torch.linalg.lstsq(matrix, target[:, None], driver="gelsd").solution[:, 0].tolist()
    weights = [0.0] * len(deltas)
    for i, weight in zip(there, solved, strict=True):
        weights[i] = weight
    return weights


def regmean(parts: Sequence[Learned], context: Context, *, off_diagonal: float = 0.9) -> Learned:
    """RegMean (Jin et al. 2023, arXiv 2212.09849): ΔW = Σ ΔWᵢ Gᵢ (Σ Gᵢ)⁻¹, Gᵢ = E x xᵀ of part i; any number of parts.

    The paper's equation for W: with one base weight it is the same for ΔW. Its scaling of what is off the diagonal is
    `off_diagonal`. Adapted: inputs come from the denoiser on the training picture, noised.
    """
    context.check(parts)
    seen = [_shrunk(context.moments(i, part), off_diagonal) for i, part in enumerate(parts)]
    merged: Learned = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        pairs = [(part[name], one[name]) for part, one in zip(parts, seen, strict=True) if name in part]
        inverse = torch.linalg.inv(_ridged(torch.stack([moment for _, moment in pairs]).sum(0)))
        merged[name] = total([delta.seen_through((moment @ inverse).float()) for delta, moment in pairs])
    return merged


def _shrunk(moments: Moments, off_diagonal: float) -> Moments:
    return {n: off_diagonal * g + (1 - off_diagonal) * torch.diag(g.diagonal()) for n, g in moments.items()}


def _sum(parts: Sequence[Learned]) -> Learned:
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: total([part[name] for part in parts if name in part]) for name in names}
