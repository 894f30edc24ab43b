"""Identity of a basis: digests of its weights, their fingerprint, and a sketch by which a recomputed Q is checked."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

VERSIONS = {"exact": 1, "fast": 2}
"""Algorithm -> its version, part of every fingerprint and cache name: raise it when a weight would get another Q."""

ALGORITHMS = tuple(VERSIONS)

TURNED = 0.03  # how far Q may be from the one an adapter was trained on, as the root mean square over its columns


def weight_digest(weight: Tensor) -> str:
    """Return the SHA-256 of shape and values as float32, so that a half-precision file and its upcast agree."""
    values = weight.detach().to("cpu", torch.float32).contiguous()
    digest = hashlib.sha256(json.dumps(list(values.shape)).encode())
    digest.update(values.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fingerprint(digests: Mapping[str, str], rank: int, algorithm: str, seed: int, version: int | None = None) -> str:
    """Return the identity of a base model's basis, from the digests of its weights (layer name -> digest).

    version: of the algorithm; this package's unless given.
    """
    version = VERSIONS.get(algorithm) if version is None else version
    identity = [version, algorithm, rank, seed, sorted(digests.items())]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def version_of(found: str, digests: Mapping[str, str], rank: int, algorithm: str, seed: int) -> int | None:
    """The version of the algorithm whose basis has the fingerprint ``found``; None if none up to this package's has."""
    versions = range(VERSIONS.get(algorithm, 0), 0, -1)
    return next((v for v in versions if fingerprint(digests, rank, algorithm, seed, v) == found), None)


def sketch(q: Float[Tensor, "out rank"]) -> tuple[float, float, float]:
    """Return three random projections of Q, to check a recomputed Q by: zᵀ Q w / sqrt(rank), z and w seeded noise.

    The sketches of Q and Q' differ in proportion to ||Q - Q'||_F (:func:`turned`), and hardly by rounding, which would
    change a digest of Q. So an adapter file carries the sketch in place of its basis.
    """
    z, w = _noise_of_sketch(*q.shape)
    found = ((z.to(q.device) @ q.detach().float()) * w.to(q.device)).sum(1) / q.shape[1] ** 0.5
    return tuple(round(float(value), 5) for value in found)  # type: ignore[return-value]


@functools.lru_cache(maxsize=64)
def _noise_of_sketch(out: int, rank: int) -> tuple[Float[Tensor, "3 out"], Float[Tensor, "3 rank"]]:
    """Return z and w. Files hold what :func:`sketch` makes of them, so they must never change."""
    generator = torch.Generator().manual_seed(0)
    z, w = (torch.randn(3, n, generator=generator, dtype=torch.float32, device="cpu") for n in (out, rank))
    return z, w


def turned(first: Sequence[float], second: Sequence[float]) -> float:
    """Estimate of ||Q - Q'||_F / sqrt(rank) from the sketches of both: 0 is the same Q, sqrt(2) an unrelated one.

    ΔW on Q' is off by that share of itself. Above ``TURNED`` an adapter is refused.
    """
    return math.sqrt(sum((a - b) ** 2 for a, b in zip(first, second, strict=True)) / len(first))
