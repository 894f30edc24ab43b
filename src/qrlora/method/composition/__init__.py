"""Compose and compare adapters.

sum.py          Composition: Σ λᵢ ΔRᵢ on one basis, exact
null_space.py   project_out: adapters less a share of what lies in the row spaces of the others
batched.py      Live: compositions on a denoiser, changed while it runs, one for each picture of a batch
truncation.py   compose_delta_weights: Σ λᵢ ΔWᵢ of any adapters, cut back to a rank
interference.py Interference of a composition's parts; similarity: cosines of Q, R, ΔR, ΔW of two adapters
parts.py        what they share
"""

from __future__ import annotations

from qrlora.method.composition.batched import Live
from qrlora.method.composition.interference import Interference, LayerInterference, Similarity, similarity
from qrlora.method.composition.null_space import default_strength, project_out
from qrlora.method.composition.sum import Composition
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
    "project_out",
    "similarity",
]
