"""Adapters put together, and compared.

sum.py          Composition: Σ λᵢ ΔRᵢ on one basis, exact; Interference of the parts
null_space.py   project: adapters less a share of what lies in the row spaces of the others
batched.py      Live: compositions on a denoiser, changed while it runs, one for each picture of a batch
truncation.py   compose_delta_weights: Σ λᵢ ΔWᵢ of any adapters, cut back to a rank
similarity.py   similarity: cosines of Q, R, ΔR, ΔW of two adapters
parts.py        what they share
"""

from __future__ import annotations

from qrlora.method.composition.batched import Live
from qrlora.method.composition.null_space import default_strength, project
from qrlora.method.composition.similarity import Similarity, similarity
from qrlora.method.composition.sum import Composition, Interference, LayerInterference
from qrlora.method.composition.truncation import TruncationLoss, compose_delta_weights

__all__ = [
    "Composition",
    "Interference",
    "LayerInterference",
    "Live",
    "Similarity",
    "TruncationLoss",
    "compose_delta_weights",
    "default_strength",
    "project",
    "similarity",
]
