"""Adapters put together, and compared.

compose.py         Composition: Σ λᵢ ΔRᵢ on one basis, exact; Interference of the parts
live.py            Live: compositions on a denoiser, changed while it runs, one for each picture of a batch
delta_weights.py   compose_delta_weights: Σ λᵢ ΔWᵢ of any adapters, cut back to a rank
similarity.py      similarity: cosines of Q, R, ΔR, ΔW of two adapters
parts.py           what they share; giving_way: adapters less what they read where others read
"""

from __future__ import annotations

from qrlora.method.composition.batched import Live
from qrlora.method.composition.parts import giving_way
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
    "giving_way",
    "similarity",
]
