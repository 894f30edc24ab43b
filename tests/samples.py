"""Small adapters for tests: random ΔR on the basis of random weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from qrlora.method.adapter import Adapter, AdapterMetadata
from qrlora.method.adapter.record import triangular_mask
from qrlora.method.basis import Basis, fingerprint, sketch

EPS = torch.finfo(torch.float32).eps
NETWORK = 2048
"""Terms of :func:`assert_rounded` for a tiny denoiser: some 32 products in a row, of some 64 terms each."""

SHAPES = {"blocks.0.attn.to_q": (24, 16), "blocks.0.ff": (16, 40), "conv": (12, 4, 3, 3), "proj_out": (3, 20)}
"""The last holds fewer columns than the bases of these tests have."""


def make_weights(seed: int = 0, shapes: dict[str, tuple[int, ...]] = SHAPES) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def make_basis(folder: Path, rank: int = 8, seed: int = 0, **options: Any) -> Basis:
    return Basis.of(make_weights(seed), rank, cache_dir=folder, **options)


def make_adapter(
    basis: Basis,
    columns: tuple[int, ...] = (0, 1, 2, 3),
    *,
    seed: int = 1,
    alpha: float | None = None,
    triangular: bool = True,
    shapes: dict[str, tuple[int, ...]] = SHAPES,
    **fields: Any,
) -> Adapter:
    """An adapter on `basis`, trained by chance; alpha is the rank unless given."""
    generator = torch.Generator().manual_seed(seed)
    deltas = {}
    held = {name: tuple(column for column in columns if column < basis[name].q.shape[1]) for name in shapes}
    shapes = {name: shape for name, shape in shapes.items() if held[name]}
    for name, shape in shapes.items():
        width = torch.Size(shape[1:]).numel()
        delta = torch.randn(len(held[name]), width, generator=generator)
        deltas[name] = delta * triangular_mask(held[name], width) if triangular else delta
    digests = {name: basis.digests[name] for name in shapes}
    metadata = AdapterMetadata(
        method="qrlora",
        rank=len(columns),
        alpha=float(len(columns)) if alpha is None else alpha,
        basis_rank=basis.rank,
        columns=columns,
        triangular=triangular,
        algorithm=basis.algorithm,
        basis_seed=basis.seed,
        basis_fingerprint=fingerprint(digests, basis.rank, basis.algorithm, basis.seed),
        **{"family": "sd3", "base_model": "tiny", **fields},
    )
    known = {name: sketch(basis[name].q) for name in shapes}
    return Adapter(metadata, deltas, dict(shapes), digests, sketches=known)


def make_lora(rank: int = 3, *, seed: int = 2, alpha: float | None = None, **fields: Any) -> Adapter:
    """A plain LoRA on the layers of SHAPES."""
    generator = torch.Generator().manual_seed(seed)
    deltas = {n: torch.randn(rank, torch.Size(s[1:]).numel(), generator=generator) for n, s in SHAPES.items()}
    ups = {n: torch.randn(s[0], rank, generator=generator) for n, s in SHAPES.items()}
    metadata = AdapterMetadata(method="lora", rank=rank, alpha=float(rank) if alpha is None else alpha, **fields)
    return Adapter(metadata, deltas, dict(SHAPES), ups=ups)


def changed(adapter: Adapter, **fields: Any) -> Adapter:
    """The same adapter with other metadata."""
    return dataclasses.replace(adapter, metadata=dataclasses.replace(adapter.metadata, **fields))


def delta_weights(adapter: Adapter, basis: Basis | None = None) -> dict[str, torch.Tensor]:
    """ΔW of every layer, explicitly."""
    return {n: adapter.delta_weight(n, None if basis is None else basis[n].q).double() for n in adapter.deltas}


def assert_rounded(got: Any, expected: Any, *, terms: int, size: float | None = None) -> None:
    """`got` is `expected` up to the rounding of float32.

    A sum of n products is off by at most n eps times the sum of their magnitudes, whatever the order of the additions
    (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1). So the bound belongs to the arithmetic and
    holds for every width of vector registers, every library and number of threads.

    Args:
        terms: of the sums, added up over the products that follow one another.
        size: of the numbers that are added; the largest of `expected` unless given.
    """
    got, expected = (torch.as_tensor(value).detach().double() for value in (got, expected))
    assert got.shape == expected.shape
    bound = terms * EPS * float(expected.abs().max() if size is None else size) + torch.finfo(torch.float32).tiny
    off = float((got - expected).abs().max())
    assert off <= bound, f"off by {off:.3g}, rounding explains {bound:.3g}"


def pixels(image: Image.Image) -> np.ndarray:
    return np.array(image).astype(int)


def close(one: Image.Image, other: Image.Image) -> bool:
    """Equal up to the rounding that other batch sizes bring."""
    return bool(abs(pixels(one) - pixels(other)).max() <= 1)
