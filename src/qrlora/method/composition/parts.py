"""Name, check and collect the adapters of a composition: helpers of all ways to compose."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from qrlora.errors import MismatchError
from qrlora.method.adapter.record import Adapter
from qrlora.method.basis import TURNED, Basis, turned


def called(adapter: Adapter) -> str:
    """Return an adapter's name for messages and tables: its own, else its trigger or role."""
    return adapter.name or adapter.metadata.trigger or adapter.metadata.role or "unnamed"


def check_weights(parts: Sequence[tuple[Adapter, float]]) -> None:
    """Raise MismatchError unless there is a part, and every weight and its product with the adapter is finite."""
    bad = [weight for _, weight in parts if not math.isfinite(weight)]
    if not parts or bad:
        raise MismatchError("nothing to compose", expected="adapters with finite weights", got=bad or "no adapters")
    for adapter, weight in parts:
        adapter.check_strength(weight)


def check_sum(total: Tensor, parts: Sequence[tuple[Adapter, float]], layer: str) -> Tensor:
    """Return the sum of these parts in a layer; MismatchError if it overflows its dtype."""
    if not bool(torch.isfinite(total).all()):
        raise MismatchError(
            f"{layer}: the sum of {' and '.join(called(adapter) for adapter, _ in parts)} is not finite",
            expected=f"numbers up to {torch.finfo(total.dtype).max:.3g}",
            got=f"weights {[weight for _, weight in parts]}",
            remedy="lower the weights",
        )
    return total


def basis_difference(first: Adapter, second: Adapter) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return descriptions of the bases of two adapters if these differ, else ({}, {}).

    One basis: equal family, rank, algorithm, version of it, and seed, and in the layers both adapt equal base weights
    and, as far as the sketches of both are known, the same Q.
    So adapters of different layers of one model may still share it, though their fingerprints differ.
    """
    one, two = first.metadata, second.metadata
    names = ("family", "basis_rank", "algorithm", "basis_seed")
    ours, theirs = ({name: getattr(meta, name) for name in names} for meta in (one, two))
    ours["version"], theirs["version"] = first.basis_version, second.basis_version
    differing = [n for n in first.digests if n in second.digests and first.digests[n] != second.digests[n]]
    shared = [n for n in first.sketches if n in second.sketches and n not in differing]
    moved = [n for n in shared if not turned(first.sketches[n], second.sketches[n]) <= TURNED]
    if ours == theirs and not differing and not moved:
        return {}, {}
    for side, adapter in ((ours, first), (theirs, second)):
        side["fingerprint"] = adapter.metadata.basis_fingerprint
        side["base_model"] = adapter.metadata.base_model
        side["base_weights"] = {name: adapter.digests[name] for name in differing}
        side |= {"sketches_of_q": {name: adapter.sketches[name] for name in moved}} if moved else {}
    return ours, theirs


def on_one_basis(adapters: Sequence[Adapter]) -> bool:
    """Return True if all are ΔR on one basis, so that their weighted sum is exact."""
    return all(one.metadata.on_basis and basis_difference(adapters[0], one) == ({}, {}) for one in adapters)


def scaled_down(adapter: Adapter, layer: str) -> Float[Tensor, "rank in"]:
    """Return s · ΔR, float64 on the CPU."""
    return adapter.scaling * adapter.deltas[layer].detach().cpu().double()


def known_up(adapter: Adapter, basis: Basis | None, layer: str) -> Float[Tensor, "out rank"] | None:
    """Return the left factor, float64 on the CPU; None if it is columns of a basis that was not given."""
    if adapter.metadata.on_basis and basis is None:
        return None
    return adapter.up(layer, None if basis is None else basis[layer].q).detach().cpu().double()


def products(
    a: Float[Tensor, "rank_a width"], b: Float[Tensor, "rank_b width"], rows_a: Sequence[int], rows_b: Sequence[int]
) -> Float[Tensor, " products"]:
    """Return ⟨a, b⟩ over the rows both own, ⟨a, a⟩, ⟨b, b⟩; rows_x[i] is the basis column of row i of x."""
    common = sorted(set(rows_a) & set(rows_b))
    mine, yours = [list(rows_a).index(row) for row in common], [list(rows_b).index(row) for row in common]
    return torch.stack([(a[mine] * b[yours]).sum(), a.square().sum(), b.square().sum()])


def union(maps: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return all entries of all maps."""
    return {name: value for one in maps for name, value in one.items()}


def joined(texts: Iterable[str], by: str) -> str:
    """Return the different, non-empty texts in their first order."""
    return by.join(dict.fromkeys(text for text in texts if text))


def collected(parts: Sequence[tuple[Adapter, float]], null_space: float = 0.0) -> dict[str, Any]:
    """Return a composition's origin as metadata: every part by name, digest, weight and licence; and the strength of
    the null-space projection, unless 0."""
    metas = [adapter.metadata for adapter, _ in parts]
    listed = [
        {
            "name": called(adapter),
            "digest": adapter.digest,
            "weight": float(weight),
            "role": adapter.metadata.role,
            "trigger": adapter.metadata.trigger,
            "licence": adapter.metadata.licence,
            "recipe_digest": adapter.metadata.recipe_digest,
        }
        for adapter, weight in parts
    ]
    return {
        "role": "composition",
        "family": joined((meta.family for meta in metas), ", "),
        "denoiser": metas[0].denoiser,
        "base_model": joined((meta.base_model for meta in metas), ", "),
        "base_digest": joined((meta.base_digest for meta in metas), ", "),
        "trigger": joined((meta.trigger for meta in metas), ", "),
        "licence": joined((meta.licence for meta in metas), "; "),
        "provenance": {"parts": listed} | ({"null_space": null_space} if null_space else {}),
    }
