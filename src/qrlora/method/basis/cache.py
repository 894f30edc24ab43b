"""Bases on disk: Q of every weight in a file of its own, computed once.

Of `method.basis` and `method.tuner` this is the one module that touches files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from jaxtyping import Float
from torch import Tensor

from qrlora._files import default_cache_dir, make_folder, write_atomically
from qrlora._tensor_file import packed_entry, read_entry
from qrlora.errors import BasisError, OutputError
from qrlora.method.basis import factor
from qrlora.method.basis.factor import (
    LayerBasis,
    checked_matrix,
    clipped_rank,
    full_precision,
    off_orthonormal,
    with_coordinates,
)
from qrlora.method.basis.identity import fingerprint, weight_digest

_CACHED = 1e-4  # what a sound cached Q may be off orthonormal by, and QᵀW off triangular, with room


class Basis(Mapping[str, LayerBasis]):
    """Q and R of every target weight of one base model at one rank, by layer name.

    Attributes:
        rank, algorithm, seed: what the basis was asked for; a small layer has fewer columns (:func:`clipped_rank`).
        digests: layer name -> digest of its weight.
        fingerprint: identity of all of it; two bases are the same if and only if their fingerprints are.
    """

    def __init__(
        self, layers: Mapping[str, LayerBasis], digests: Mapping[str, str], rank: int, algorithm: str, seed: int
    ):
        self._layers, self.digests = dict(layers), dict(digests)
        self.rank, self.algorithm, self.seed = rank, algorithm, seed
        self.fingerprint = fingerprint(self.digests, rank, algorithm, seed)

    @classmethod
    def of(
        cls,
        weights: Mapping[str, Tensor],
        rank: int,
        *,
        algorithm: str = "fast",
        seed: int = 0,
        cache_dir: Path | None = None,
        progress: Callable[[int, int, str], None] | None = None,
    ) -> Basis:
        """Return the basis of named weights, each taken from the cache on disk, or computed and put there.

        Args:
            weights: layer name -> weight as for :func:`layer_basis`.
            cache_dir: folder of the cache; :func:`default_cache_dir` unless given.
            progress: called with (layers done, layers in all, name of the layer just done).

        Raises:
            BasisError: as :func:`layer_basis`, and when the cache cannot be read or written.
        """
        layers, digests = {}, {}
        for done, (name, weight) in enumerate(weights.items(), start=1):
            digests[name] = weight_digest(weight)
            layers[name] = cached_layer_basis(
                weight, digests[name], rank, algorithm=algorithm, seed=seed, name=name, cache_dir=cache_dir
            )
            if progress is not None:
                progress(done, len(weights), name)
        return cls(layers, digests, rank, algorithm, seed)

    def __getitem__(self, name: str) -> LayerBasis:
        return self._layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)


def cached_layer_basis(
    weight: Tensor,
    digest: str,
    rank: int,
    *,
    algorithm: str = "fast",
    seed: int = 0,
    name: str = "",
    cache_dir: Path | None = None,
) -> LayerBasis:
    """Return :func:`layer_basis` through the cache on disk. ``digest`` is :func:`weight_digest` of ``weight``."""
    matrix, scale = checked_matrix(weight, rank, algorithm, name)
    rank = clipped_rank(matrix.shape, rank)
    path = cache_path(digest, rank, algorithm=algorithm, seed=seed, cache_dir=cache_dir)
    with full_precision(matrix.device.type):
        q = _read_columns(path, matrix, rank) if path.exists() else None
        if q is None:
            q = factor.orthonormal_columns(matrix, rank, algorithm, seed, name)
            # R is QᵀW and cheap to have again, so the file holds Q alone.
            _cache(path, packed_entry({"q": q.cpu()}, path.stem))
        return with_coordinates(matrix, scale, q.to(matrix.device))


def cache_path(
    digest: str, rank: int, *, algorithm: str = "fast", seed: int = 0, cache_dir: Path | None = None
) -> Path:
    """Return the cache file of a weight's Q, a safetensors file that exists once Q was computed.

    rank: of the file's Q, so :func:`clipped_rank` of what the whole basis was asked for.
    """
    identity = fingerprint({"": digest}, rank, algorithm, seed)
    return (default_cache_dir() if cache_dir is None else Path(cache_dir)) / f"{identity}.safetensors"


def _read_columns(path: Path, matrix: Float[Tensor, "out in"], rank: int) -> Float[Tensor, "out rank"] | None:
    """Read Q from the cache; None, with a note, if the file is not what was written."""
    found = read_entry(path, path.stem, {"q": (matrix.shape[0], rank)})
    if found is None:
        return None
    q = found["q"].float()
    below = torch.tril(q.T @ matrix[:, :rank].cpu(), diagonal=-1).abs().max()
    off = {"QᵀQ = 1": off_orthonormal(q), "QᵀW = R": float(below / torch.linalg.vector_norm(matrix).cpu())}
    if not all(share <= _CACHED for share in off.values()):  # NaN is not
        raise BasisError(
            "a cached basis is of another weight",
            expected=f"orthonormal columns with QᵀW = R, a triangle, to {_CACHED}",
            got=f"off by {off}",
            remedy=f"delete {path}; it will be computed again",
        )
    return q


def _cache(path: Path, content: Callable[[BinaryIO], None]) -> None:
    try:
        make_folder(path.parent)
        write_atomically(path, content, rescue=False)
    except OutputError as error:
        raise BasisError(
            "a basis cannot be cached",
            expected=f"a writable folder {path.parent}",
            got=error.got,
            remedy="free space there, or point QRLORA_CACHE to another folder",
        ) from error
