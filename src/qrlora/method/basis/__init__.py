"""The basis of a weight: orthonormal columns Q and a triangular R with Q R = the best rank-r approximation.

factor.py     layer_basis: W -> Q, R; verify; clipped_rank
identity.py   weight_digest, fingerprint, sketch: whether two bases are the same
cache.py      Basis: Q and R of all target weights, from files or computed and written to files
"""

from __future__ import annotations

from qrlora.method.basis.cache import Basis, cache_path, cached_layer_basis
from qrlora.method.basis.factor import (
    LayerBasis,
    Verification,
    block_width,
    clipped_rank,
    clipping,
    layer_basis,
    verify,
)
from qrlora.method.basis.identity import (
    ALGORITHMS,
    TURNED,
    VERSIONS,
    fingerprint,
    sketch,
    turned,
    version_of,
    weight_digest,
)

__all__ = [
    "ALGORITHMS",
    "TURNED",
    "VERSIONS",
    "Basis",
    "LayerBasis",
    "Verification",
    "block_width",
    "cache_path",
    "cached_layer_basis",
    "clipped_rank",
    "clipping",
    "fingerprint",
    "layer_basis",
    "sketch",
    "turned",
    "verify",
    "version_of",
    "weight_digest",
]
